"""Check results on the texts of rendered chats: a template may change or leave out what a row says, or begin no reply."""

from collections.abc import Iterator, Sequence

from opd_lightning.data.renderer import PROBE, ChatRenderer
from opd_lightning.preflight.results import CheckResult
from opd_lightning.types import Example

CHANGE = "give model.chat_template=<file> that keeps it, or write the rows as the template does (task.prepare)"


def header(renderer: ChatRenderer) -> Iterator[CheckResult]:
    """The failure of a template that ignores add_generation_prompt, and writes a role before a reply."""
    user = [{"role": "user", "content": "x"}]
    try:
        prompt, bare = (renderer.template.text(user, reply_follows=follows) for follows in (True, False))
        whole = renderer.template.text([*user, {"role": "assistant", "content": PROBE}], reply_follows=False)
    except ValueError:
        return  # reported when the examples are rendered
    written = whole.removeprefix(prompt).partition(PROBE)[0]
    if prompt == bare and whole.startswith(prompt) and written.strip():
        yield CheckResult(
            "replies",
            "fail",
            f"the chat template ignores add_generation_prompt and writes {written[:40]!r} before a reply, which would be "
            "trained and sampled as part of it; give model.chat_template=<file> whose prompts end with it (in Jinja: "
            "{% if add_generation_prompt %}...{% endif %}).",
        )


def changed_texts(examples: Sequence[Example], renderer: ChatRenderer, with_references: bool) -> Iterator[CheckResult]:
    """Check results on references and users' texts that the rendered chat lacks; blanks do not count."""
    prompts, replies = list[str](), list[str]()
    for example in examples:
        reply = renderer.without_end(example.completion) if with_references and example.completion is not None else None
        last = [] if reply is None else [{"role": "assistant", "content": reply}]
        try:
            text = packed(renderer.template.text([*example.messages, *last], reply_follows=reply is None))
        except ValueError:
            continue  # reported with the row
        asked = [str(turn["content"]) for turn in example.messages if turn["role"] == "user"]
        prompts += [example.id] if any(packed(content) not in text for content in asked) else []
        replies += [example.id] if reply is not None and packed(reply) not in text else []
    if replies:
        count = f"{len(replies)} of {len(examples)} references, {replies[0]} first"
        text = f"the chat template changes the text of {count}, or leaves out a part such as a thought, so something else"
        yield CheckResult("replies", "fail", f"{text} than the rows say would be trained; {CHANGE}.")
    if prompts:
        count = f"{len(prompts)} of {len(examples)} prompts, {prompts[0]} first"
        yield CheckResult("replies", "warn", f"the chat template changes or cuts the user's text in {count}; {CHANGE}.")


def packed(text: str) -> str:
    """A text without blanks."""
    return "".join(text.split())
