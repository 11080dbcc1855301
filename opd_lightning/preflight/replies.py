"""Check results on replies: their end tokens for student and teachers, and references against the rendered chat."""

from collections.abc import Iterator, Sequence

from opd_lightning.data.chat_template import special_pattern, spellings
from opd_lightning.data.conversations import learned
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.models.ends import usual_ends
from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.components import Components
from opd_lightning.preflight.texts import changed_texts, header
from opd_lightning.runs.identity import is_run
from opd_lightning.teachers.base import all_parts
from opd_lightning.types import Example

MAX_EXAMPLES = 2000
"""Examples that are checked, evenly spread over the data."""


def replies(parts: Components) -> Iterator[CheckResult]:
    """Check results on the ends of replies, on references and on special tokens in texts."""
    yield student_end(parts)
    for name, teacher in all_parts(parts.teachers):
        if teacher.source is not None and not teacher.aligned:  # an aligned one's end token stands for the student's
            yield from teacher_ends(name, teacher, parts)
    if parts.renderer.template.dated:
        yield CheckResult(
            "date", "pass", f"the chat template writes a date; this run keeps {parts.renderer.template.today:%Y-%m-%d}"
        )
    examples = parts.examples[:: max(1, len(parts.examples) // MAX_EXAMPLES)]
    yield from header(parts.renderer)
    yield from changed_texts(examples, parts.renderer, parts.rollout.reads_references)
    if parts.rollout.reads_references:
        yield from references([e for e in examples if e.completion is not None and e.turns is None], parts.renderer)
        yield from conversations([e for e in examples if e.turns is not None], parts.renderer)
    yield from special_tokens(examples, parts.renderer)


def student_end(parts: Components) -> CheckResult:
    """The result on the student's end tokens; a base model seldom generates that of its template."""
    renderer, own = parts.renderer, parts.model.generation_ends() or []
    text = f"replies end with {names(renderer, [renderer.end_id])}"
    if others := [i for i in renderer.end_ids if i != renderer.end_id]:
        text += f"; rollouts also stop at {names(renderer, others)}"
    elif renderer.end_token is not None:
        text += ", as model.end_token says, and rollouts stop at no other token"
    if not own or renderer.end_id in own or is_run(parts.model.path):
        return CheckResult("replies", "pass", text)
    begin = f"begin with SFT (method=sft model.end_token={renderer.end_token})"
    remedy = "begin with SFT, take its instruction-tuned sibling, or set model.end_token" if others else begin
    return CheckResult(
        "replies",
        "warn",
        f"{text}; the model's own generation_config ends with {names(renderer, own)}, so this model may never write "
        f"the first: {remedy}.",
    )


def teacher_ends(name: str, teacher: object, parts: Components) -> Iterator[CheckResult]:
    """Check results on a teacher with another end token, which lowers the probability of the student's own."""
    renderer, source = parts.renderer, teacher.source  # type: ignore[attr-defined]
    try:
        teacher_renderer = source.renderer()
    except ValueError:
        return  # without tokenizer or chat template of its own; see `checks.models`
    student, own = usual_ends(parts.model, renderer), usual_ends(source, teacher_renderer)
    if set(student) & set(own):
        return
    text = f"the student really ends replies with {quoted(student)}, {source.field}={source.path} with {quoted(own)}"
    if renderer.end_token is None:
        yield CheckResult(
            f"{name}'s replies",
            "fail",
            f"{text}, so that the student would unlearn to end. Set model.end_token={student[0]!r}: rollouts then stop there "
            f"alone, and a teacher=external counts its own end for it. Or set model.end_token={own[0]!r}, if the student ends "
            "so after all (as it does after SFT with that option).",
        )
    elif teacher.takes_end:  # type: ignore[attr-defined]
        yield CheckResult(
            f"{name}'s replies",
            "warn",
            f"{text}; the teacher's is counted for {renderer.end_token!r}, as model.end_token says.",
        )
    else:
        yield CheckResult(
            f"{name}'s replies",
            "warn",
            f"{text}, as model.end_token allows; this kind of teacher cannot count its own end for the student's, so "
            "rollout/truncated may rise.",
        )


def references(examples: Sequence[Example], renderer: ChatRenderer) -> Iterator[CheckResult]:
    """Check results on references: their tokens against those of the rendered chat, and repeated end tokens."""
    inexact, with_end = [], []
    for example in examples:
        assert example.completion is not None
        if not renderer.without_end(example.completion).strip():
            text = f"the reference of example {example.id} is an end token alone, which teaches to say nothing"
            yield CheckResult("replies", "fail", f"{text}; leave such rows out (task.prepare).")
            return
        chat = [*example.messages, {"role": "assistant", "content": renderer.without_end(example.completion)}]
        try:
            exact = renderer.continuation(chat, example.tools)[1]
        except ValueError as error:
            yield CheckResult("replies", "fail", f"example {example.id}: {error}")
            return
        inexact += [] if exact else [example.id]
        with_end += [example.id] if renderer.without_end(example.completion) != example.completion else []
    if inexact:
        yield CheckResult(
            "replies",
            "warn",
            f"{len(inexact)} of {len(examples)} references, {inexact[0]} first, are tokenized separately: the tokens of the "
            "full chat do not begin with the prompt's.",
        )
    if with_end:
        yield CheckResult(
            "replies",
            "warn",
            f"{len(with_end)} of {len(examples)} references, {with_end[0]} first, end with an end token; it is trained once.",
        )
    if examples and not inexact:
        yield CheckResult("replies", "pass", "prompt and reference have the tokens of the rendered chat")


def conversations(examples: Sequence[Example], renderer: ChatRenderer) -> Iterator[CheckResult]:
    """Check results on references of several turns: their tokens against those of the rendered chat."""
    inexact, replies = [], 0
    for example in examples:
        assert example.turns is not None
        try:
            found = renderer.conversation(example.messages, example.turns, example.tools)
        except ValueError as error:
            yield CheckResult("conversations", "fail", f"example {example.id}: {error}")
            return
        replies += sum(learned(turn) for turn in example.turns)
        inexact += [] if found.exact else [example.id]
    if inexact:
        text = f"{len(inexact)} of {len(examples)} conversations, {inexact[0]} first, have a token that spans the begin of a"
        yield CheckResult("conversations", "warn", f"{text} reply in the rendered chat, and are tokenized in parts.")
    elif examples:
        text = f"{replies} replies in {len(examples)} conversations are learned, with the tokens of the rendered chat"
        yield CheckResult("conversations", "pass", text)


def special_tokens(examples: Sequence[Example], renderer: ChatRenderer) -> Iterator[CheckResult]:
    """Check results on texts that contain special tokens."""
    pattern = special_pattern(renderer.tokenizer)
    if pattern is None:
        return
    spelled = {}
    for example in examples:
        reply = [{**turn, "content": renderer.without_end(turn["content"])} for turn in example.reference or []]
        if words := spellings([*example.messages, *reply], pattern):
            spelled[example.id] = words[0]
    if spelled:
        first, word = next(iter(spelled.items()))
        as_text = renderer.template.split_special_tokens
        reading = "as text" if as_text else "as the tokens"
        option = f"model.split_special_tokens={str(not as_text).lower()}"
        yield CheckResult(
            "special tokens",
            "warn",
            f"{len(spelled)} of {len(examples)} examples spell special tokens, {first} first ({word!r}); they are read "
            f"{reading} ({option} changes that).",
        )


def quoted(tokens: Sequence[str]) -> str:
    """Tokens in quotes, joined by "and"."""
    return " and ".join(map(repr, tokens))


def names(renderer: ChatRenderer, ids: Sequence[int]) -> str:
    """The texts of tokens, joined by "and"."""
    return quoted([str(renderer.tokenizer.convert_ids_to_tokens(i)) for i in ids])
