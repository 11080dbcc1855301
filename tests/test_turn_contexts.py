"""Privileged context in conversations, in the first prompt or before every reply: what the teacher reads, and what follows."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.environments import Calculator
from opd_lightning.losses.divergences import forward_kl, reverse_kl
from opd_lightning.losses.vocab_support import FullVocabulary
from opd_lightning.models import Pretrained
from opd_lightning.rollout.episodes import Episodes
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.teachers import external, frozen
from opd_lightning.teachers.contexts import Feedback, FirstOf, NoContext, PrivilegedContext, Rule, Sibling
from opd_lightning.teachers.reading import read
from opd_lightning.training.run import run
from opd_lightning.types import Example, Sample, SamplingParams
from tests.templates import tokenizer
from tests.test_contracts import (  # noqa: F401
    Judge,
    Scripted,
    by_autograd,
    by_package,
    close,
    renderer,
    student,
)
from tests.test_tools import CALL, played

SOLUTION = partial(PrivilegedContext, "solution", "{prompt} [ {solution} ]")


def episodes_of(renderer: ChatRenderer) -> list[Sample]:  # noqa: F811
    """Four episodes with the calculator, of one or two replies each of two prompts."""
    asked = [Example(str(i), [{"role": "user", "content": f"rotate {i} 4"}], solution=f"7 {i}") for i in range(2)]
    replies = ["3", "4 5", "3 1", "9", "answer 7", "red", "7 7 7", "done"]
    player = Episodes(partial(Calculator, Judge()), renderer, SamplingParams(20, n=2), False)
    return player.play(asked, 0, Scripted(renderer, replies))


class Lone:
    """What `reading.read` reads of a teacher."""

    def __init__(self, context: NoContext, renderer: ChatRenderer):  # noqa: F811
        self.context, self.renderer = context, renderer

    def rendering(self, chat, tools=None):
        return self.renderer.render(chat, tools)


def texts(context: NoContext, renderer: ChatRenderer, some: list[Sample], window: int = 10**6) -> list[str]:  # noqa: F811
    """What a teacher reads of each sample, as text."""
    found = read(Lone(context, renderer), some, window, None, torch.device("cpu"))
    return [
        renderer.tokenizer.decode([*found.prompts[b], *found.samples[b].token_ids[found.samples[b].prompt_length :].tolist()])
        for b in found.rows
    ]


def test_where_a_solution_stands(renderer):  # noqa: F811
    """The calculator's answer is quoted as the prompt is; the student's tokens are the same everywhere."""
    some = episodes_of(renderer)[:1]
    (none,) = texts(NoContext(at="every"), renderer, some)
    (first,) = texts(SOLUTION(), renderer, some)
    (every,) = texts(SOLUTION(at="every"), renderer, some)
    assert none == renderer.tokenizer.decode(some[0].token_ids) == "rotate 0 4 = 3 <eos> 3 = answer 7 <eos>"
    assert first == "rotate 0 4 [ 7 0 ] = 3 <eos> 3 = answer 7 <eos>"
    assert every == "rotate 0 4 [ 7 0 ] = 3 <eos> 3 [ 7 0 ] = answer 7 <eos>"
    (rule,) = texts(Rule(system="[ result ]", at="every"), renderer, some)
    assert rule == "[ result ] rotate 0 4 = 3 <eos> 3 = answer 7 <eos>"


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_teacher_equal_to_the_student_without_words_of_its_own_teaches_nothing(student, renderer, divergence):  # noqa: F811
    some = episodes_of(renderer)
    gradient = by_package(student, frozen(NoContext(at="every")), some, divergence, FullVocabulary(), renderer)
    shown = by_package(student, frozen(SOLUTION(at="every")), some, divergence, FullVocabulary(), renderer)
    assert gradient.abs().max() < 1e-6 and shown.abs().max() > 1e-3


@pytest.mark.parametrize("at", ["first", "every"])
def test_the_teacher_is_a_plain_forward_pass_over_what_it_reads(student, renderer, other, at):  # noqa: F811
    """Its distributions are those at the student's tokens, behind the context before each; exact in their places."""
    some, lm = episodes_of(renderer), Pretrained(other).model()
    assert {s.metrics["turns"] for s in some} == {2}

    def target(sample: Sample) -> torch.Tensor:
        words = renderer.tokenizer.decode(sample.token_ids).split()
        shown = ["[", *sample.example.solution.split(), "]"]
        places = [i for i, word in enumerate(words) if word == "="][: 1 if at == "first" else 2]
        for i in reversed(places):
            words[i:i] = shown
        ids = renderer.tokenizer.convert_tokens_to_ids(words)
        ends = [i for i, word in enumerate(words) if word == "<eos>"]
        starts = [i for i, word in enumerate(words) if word == "="]
        at_tokens = [i - 1 for a, b in zip(starts, ends, strict=True) for i in range(a + 1, b + 1)]
        assert [ids[i + 1] for i in at_tokens] == sample.token_ids[sample.loss_mask].tolist()
        return lm(input_ids=torch.tensor([ids])).logits[0, at_tokens].log_softmax(-1).detach()

    found = by_package(student, external(other, context=SOLUTION(at=at)), some, reverse_kl, FullVocabulary(), renderer)
    exact = by_autograd(student, target, some, lambda s, t, _: (s.exp() * (s - t)).sum(-1))
    assert close(found, exact)


@pytest.mark.parametrize("template", CALL)
def test_contexts_stand_in_the_tools_answers(template):
    """In each template of tools: no words leave all tokens as they are, others stand before both replies."""
    words = ChatRenderer(tokenizer(template))
    sample, _ = played(template, CALL[template], "It is 5.")
    sample = replace(sample, example=replace(sample.example, solution="Five it is"))
    assert texts(NoContext(at="every"), words, [sample]) == [words.tokenizer.decode(sample.token_ids)]
    context = PrivilegedContext("solution", "{prompt}\nHint: {solution}.", at="every")
    (text,) = texts(context, words, [sample])
    head, call, middle = text.partition(CALL[template])[0], CALL[template], text.partition(CALL[template])[2]
    assert head.count("Hint: Five it is.") == 1 and call in text and middle.count("Hint: Five it is.") == 1
    assert middle.index("Hint") < middle.index("It is 5.")


def test_feedback_and_siblings_of_conversations(renderer):  # noqa: F811
    """Feedback and a right sibling stand before each reply; a sibling is the whole conversation, not its last reply alone."""
    words = ChatRenderer(tokenizer("chatml"))
    wrong, _ = played("chatml", '<tool_call>{"name": "add", "arguments": {"c": 1}}</tool_call>', "no")
    right, _ = played("chatml", CALL["chatml"], "It is 5.")
    context = FirstOf(
        {"sibling": Sibling("{prompt} Right: {sibling}"), "feedback": Feedback("{prompt} Wrong: {feedback}")}, at="every"
    )
    (text,) = texts(context, words, [wrong])
    assert text.count("Wrong: error: TypeError: add() got an unexpected") == 2
    text = texts(context, words, [wrong, right])[0]
    assert text.count("Right: assistant: <tool_call>") == 2 and text.count("assistant: It is 5.") == 2
    (alone,) = texts(replaced(context, "first"), words, [wrong])
    assert alone.count("Wrong: ") == 1


def replaced(context: NoContext, at: str) -> NoContext:
    """The context at another place."""
    context.at = at
    return context


def test_what_is_too_long_for_the_teacher_is_not_learned(renderer):  # noqa: F811
    some = episodes_of(renderer)
    length = max(len(s.token_ids) for s in some)
    found = read(Lone(SOLUTION(at="every"), renderer), some, length + 7, None, torch.device("cpu"))
    longest = {b for b, s in enumerate(some) if len(s.token_ids) == length}
    assert found.valid is not None and not set(found.rows) & longest
    assert found.metrics["overlong"].sum() == len(longest) > 0
    kept = read(Lone(SOLUTION(at="every"), renderer), some, length + 8, None, torch.device("cpu"))
    assert kept.valid.all() and len(kept.rows) == 4


def test_places_that_cannot_be_are_refused(renderer):  # noqa: F811
    with pytest.raises(ValueError, match=r"context\.at='last' is unknown; choose first, or every"):
        NoContext(at="last")
    some = [replace(sample, turns=[]) for sample in episodes_of(renderer)]
    with pytest.raises(ValueError, match=r"context\.at=every: the messages between the replies of example 0 are not known"):
        texts(SOLUTION(at="every"), renderer, some)

    class Appends(NoContext):
        def __call__(self, example, own=None, others=()):
            return [*example.messages, {"role": "user", "content": "1"}]

    with pytest.raises(ValueError, match="Appends changes more than the last turn"):
        texts(Appends(at="every"), renderer, episodes_of(renderer))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["demonstration", "solution", "feedback", "sibling", "sibling_or_feedback", "rule"])
def test_every_context_trains_before_every_reply(small, context):
    cfg = [f"method={'sdpo' if 'i' in context and context != 'demonstration' else 'sdft'}", "environment=lookup"]
    cfg += ["model.path=pkg://opd_lightning/toy/assets/world/start"]  # which is right at times
    folder = run(small(*cfg, f"context={context}", "context.at=every", "evaluation=none", "trainer.max_steps=1"))
    assert "train/forward_kl" in read_csv(folder / "metrics.csv")[-1]
