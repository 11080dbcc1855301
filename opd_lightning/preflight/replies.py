"""Replies: what ends them for student and teacher, and whether references are trained as the chat template writes them."""

from collections.abc import Iterator, Sequence

from opd_lightning.data.chat_template import special_pattern, spellings
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.preflight.checks import Finding
from opd_lightning.preflight.components import Components
from opd_lightning.teachers.base import all_parts
from opd_lightning.types import Example

MOST = 2000
"""Examples that are looked at; of more, so many that are evenly spread."""


def replies(parts: Components) -> Iterator[Finding]:
    """Findings on the ends of replies, on references and on special tokens in texts."""
    yield ends(parts)
    for name, teacher in all_parts(parts.teachers):
        if teacher.source is not None:
            yield from teacher_ends(name, teacher, parts)
    if parts.renderer.template.dated:
        yield Finding(
            "date", "pass", f"the chat template writes a date; this run keeps {parts.renderer.template.today:%Y-%m-%d}"
        )
    examples = parts.examples[:: max(1, len(parts.examples) // MOST)]
    if parts.rollout.reads_references:
        yield from references([e for e in examples if e.completion is not None], parts.renderer)
    yield from special_tokens(examples, parts.renderer)


def ends(parts: Components) -> Finding:
    """What ends the student's replies; a base model seldom writes the token that its template closes a turn with."""
    renderer, own = parts.renderer, parts.model.generation_ends()
    text = f"replies end with {names(renderer, [renderer.end_id])}"
    if others := [i for i in renderer.end_ids if i != renderer.end_id]:
        text += f"; rollouts also stop at {names(renderer, others)}"
    if own is None or renderer.end_id in own or renderer.end_token is not None:
        return Finding("replies", "pass", text)
    return Finding(
        "replies",
        "warn",
        f"{text}; the model's own generation_config ends with {names(renderer, own)}, so this model may never write the first: "
        "begin with SFT, take its instruction-tuned sibling, or set model.end_token.",
    )


def teacher_ends(name: str, teacher: object, parts: Components) -> Iterator[Finding]:
    """Does the teacher end replies as the student does? If not, it drives the student from its end, and replies never stop."""
    renderer, source = parts.renderer, teacher.source  # type: ignore[attr-defined]
    try:
        other = source.renderer()
    except ValueError:
        return  # without tokenizer or chat template of its own; see `checks.models`
    mine = str(renderer.tokenizer.convert_ids_to_tokens(renderer.end_id))
    theirs = [str(other.tokenizer.convert_ids_to_tokens(i)) for i in other.end_ids]
    if mine in theirs:
        return
    text = f"the student's replies end with {mine!r}, those of {source.field}={source.path} with {theirs[0]!r}"
    if renderer.end_token is not None:
        yield Finding(f"{name}'s replies", "warn", f"{text}, as model.end_token allows.")
        return
    yield Finding(
        f"{name}'s replies",
        "fail",
        f"{text}, so that the student would unlearn to end. Set model.end_token={theirs[0]!r} (after SFT if the student never "
        f"writes it), or model.end_token={mine!r} to allow the difference.",
    )


def references(examples: Sequence[Example], renderer: ChatRenderer) -> Iterator[Finding]:
    """Are prompt and reference together the chat as the template writes it?"""
    apart, doubled = [], []
    for example in examples:
        assert example.completion is not None
        chat = [*example.messages, {"role": "assistant", "content": renderer.without_end(example.completion)}]
        try:
            exact = renderer.behind(chat)[1]
        except ValueError as error:
            yield Finding("replies", "fail", f"example {example.id}: {error}")
            return
        apart += [] if exact else [example.id]
        doubled += [example.id] if renderer.without_end(example.completion) != example.completion else []
    if apart:
        yield Finding(
            "replies",
            "warn",
            f"{len(apart)} of {len(examples)} references, {apart[0]} first, are tokenized by themselves: the tokens of the "
            "whole chat do not begin with the prompt's.",
        )
    if doubled:
        yield Finding(
            "replies",
            "warn",
            f"{len(doubled)} of {len(examples)} references, {doubled[0]} first, end with an end token; it is trained once.",
        )
    if examples and not apart:
        yield Finding("replies", "pass", "prompt and reference have the tokens of the rendered chat")


def special_tokens(examples: Sequence[Example], renderer: ChatRenderer) -> Iterator[Finding]:
    """Texts that spell special tokens."""
    pattern = special_pattern(renderer.tokenizer)
    if pattern is None:
        return
    found = {}
    for example in examples:
        reply = [] if example.completion is None else [{"content": renderer.without_end(example.completion)}]
        if words := spellings([*example.messages, *reply], pattern):
            found[example.id] = words[0]
    if found:
        first, word = next(iter(found.items()))
        split = renderer.template.split_special_tokens
        how = "as text" if split else "as the tokens"
        other = f"model.split_special_tokens={str(not split).lower()}"
        yield Finding(
            "special tokens",
            "warn",
            f"{len(found)} of {len(examples)} examples spell special tokens, {first} first ({word!r}); they are read {how} "
            f"({other} changes that).",
        )


def names(renderer: ChatRenderer, ids: Sequence[int]) -> str:
    """Tokens as they are written."""
    return " and ".join(repr(str(renderer.tokenizer.convert_ids_to_tokens(i))) for i in ids)
