"""Check results on replies: their end tokens for student and teachers, and references against the rendered chat."""

from collections.abc import Iterator, Sequence

from opd_lightning.data.chat_template import special_pattern, spellings
from opd_lightning.data.conversations import learned
from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.preflight.checks import CheckResult
from opd_lightning.preflight.components import Components
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
    if parts.rollout.reads_references:
        yield from references([e for e in examples if e.completion is not None and e.turns is None], parts.renderer)
        yield from conversations([e for e in examples if e.turns is not None], parts.renderer)
    yield from special_tokens(examples, parts.renderer)


def student_end(parts: Components) -> CheckResult:
    """The result on the student's end tokens; a base model seldom generates that of its template."""
    renderer, model_ends = parts.renderer, parts.model.generation_ends()
    text = f"replies end with {names(renderer, [renderer.end_id])}"
    if others := [i for i in renderer.end_ids if i != renderer.end_id]:
        text += f"; rollouts also stop at {names(renderer, others)}"
    if model_ends is None or renderer.end_id in model_ends or renderer.end_token is not None:
        return CheckResult("replies", "pass", text)
    return CheckResult(
        "replies",
        "warn",
        f"{text}; the model's own generation_config ends with {names(renderer, model_ends)}, so this model may never write "
        "the first: begin with SFT, take its instruction-tuned sibling, or set model.end_token.",
    )


def teacher_ends(name: str, teacher: object, parts: Components) -> Iterator[CheckResult]:
    """Check results on a teacher with another end token, which lowers the probability of the student's own."""
    renderer, source = parts.renderer, teacher.source  # type: ignore[attr-defined]
    try:
        teacher_renderer = source.renderer()
    except ValueError:
        return  # without tokenizer or chat template of its own; see `checks.models`
    student_token = str(renderer.tokenizer.convert_ids_to_tokens(renderer.end_id))
    teacher_tokens = [str(teacher_renderer.tokenizer.convert_ids_to_tokens(i)) for i in teacher_renderer.end_ids]
    if student_token in teacher_tokens:
        return
    text = f"the student's replies end with {student_token!r}, those of {source.field}={source.path} with {teacher_tokens[0]!r}"
    if renderer.end_token is not None:
        yield CheckResult(f"{name}'s replies", "warn", f"{text}, as model.end_token allows.")
        return
    yield CheckResult(
        f"{name}'s replies",
        "fail",
        f"{text}, so that the student would unlearn to end. Set model.end_token={teacher_tokens[0]!r} (after SFT if the "
        f"student never writes it), or model.end_token={student_token!r} to allow the difference.",
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


def names(renderer: ChatRenderer, ids: Sequence[int]) -> str:
    """The texts of tokens, joined by "and"."""
    return " and ".join(repr(str(renderer.tokenizer.convert_ids_to_tokens(i))) for i in ids)
