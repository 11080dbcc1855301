"""Accuracy by skill: what was learned, what was forgotten, and whether it is written as the task asks."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean as mean
from typing import Any

from opd_lightning.contracts import Generator, Renderer, Task
from opd_lightning.evaluation.estimate import Estimate, average, pass_at, proportion
from opd_lightning.models import Student
from opd_lightning.types import Example, SamplingParams, Verdict
from opd_lightning.utils.seeds import derive_seed


@dataclass(frozen=True)
class Answer:
    """One completion of a held-out prompt.

    Attributes:
        verdict: the task's.
        length: tokens, EOS included.
        truncated: did it run into the token limit?
    """

    verdict: Verdict
    length: int
    truncated: bool


class GreedyAccuracy:
    """Greedy completions of held-out prompts, judged by the task.

    Args:
        task: gives the examples and the verdicts.
        renderer: the student's.
        max_new_tokens: a completion that has not ended by then is judged as it stands.
        split: "validation" or "test".
        batch_size: completions decoded at a time.
        prefix: of the numbers' names, such as "validation/"; tells apart two accuracies in one suite.

    Attributes:
        outcomes: skill and content by example id, of the last call.
    """

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        max_new_tokens: int,
        split: str = "test",
        batch_size: int = 256,
        prefix: str = "",
    ):
        self.prefix = prefix
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.task, self.batch_size, self.examples = task, batch_size, task.examples(split)
        self.renderer = renderer
        self.sampling = SamplingParams(max_new_tokens, temperature=0.0)

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """For each skill, and each group of skills ("prior" of "prior/sort"): accuracy, format, length, truncated.

        Accuracy is the share that is right; where a task gives partial scores, `score` is their mean. Without a verifier there
        is neither.
        """
        answers = ask(generator, self, samples=1, seed=0)
        told = zip(self.examples, answers, strict=True)
        self.outcomes = {e.id: {"skill": e.skill, "content": some[0].verdict.content} for e, some in told}
        found = by_skill(self.examples, answers, partial(summarise, self.task))
        return {f"{self.prefix}{name}": estimate for name, estimate in found.items()}


class SampledAccuracy:
    """k sampled completions per held-out prompt: their mean score (avg@k), and whether any of them is right (pass@k).

    Args:
        task, renderer, split, batch_size: as for `GreedyAccuracy`.
        sampling: of its n completions per prompt.
        passes: the k of pass@k; each at most n.
        seed: of the draws, the same at every evaluation of a run.
        solved: the least content that counts as right; verifiers with partial scores make it matter.

    Raises:
        ValueError: a k of `passes` exceeds n.
    """

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        sampling: SamplingParams,
        passes: Sequence[int] = (1,),
        seed: int = 0,
        solved: float = 1.0,
        split: str = "test",
        batch_size: int = 256,
    ):
        for k in passes:
            if not 1 <= k <= sampling.n:
                raise ValueError(
                    f"evaluation.suite.sampled.passes={list(passes)}: pass@{k} needs {k} samples; set sampling.n={k} or more."
                )
        if sampling.temperature == 0:
            raise ValueError(
                "evaluation.suite.sampled.sampling.temperature=0 makes all samples equal; GreedyAccuracy measures that."
            )
        self.task, self.batch_size, self.examples = task, batch_size, task.examples(split)
        self.renderer = renderer
        self.sampling, self.samples = replace(sampling, n=1), sampling.n  # `ask` lays out the samples itself
        self.passes, self.seed, self.solved = passes, seed, solved

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """For each skill and group of skills: `avg@<samples>`, each `pass@<k>`, and how the samples are written."""
        return by_skill(self.examples, ask(generator, self, self.samples, self.seed), self.passing)

    def passing(self, prompts: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
        """The numbers of one skill."""
        scores = [[a.verdict.content for a in answers] for answers in prompts]
        right = [sum(score >= self.solved for score in some) for some in scores]
        mean = {f"avg@{self.samples}": proportion([sum(some) / len(some) for some in scores])}
        passes = {f"pass@{k}": proportion([pass_at(k, self.samples, c) for c in right]) for k in self.passes}
        return mean | passes | {f"sampled_{name}": e for name, e in describe(prompts).items()}


def ask(generator: Generator, what: GreedyAccuracy | SampledAccuracy, samples: int, seed: int) -> list[list[Answer]]:
    """`samples` completions of each example, judged."""
    rows = [(i, example) for i, example in enumerate(what.examples) for _ in range(samples)]
    answers: list[list[Answer]] = [[] for _ in what.examples]
    for start in range(0, len(rows), what.batch_size):
        some = rows[start : start + what.batch_size]
        prompts = [what.renderer.render(example.messages) for _, example in some]
        done = generator.generate(prompts, what.sampling, derive_seed(seed, "evaluation", start))
        texts = what.renderer.decode_all([completion.token_ids for completion in done])
        for (i, example), text, completion in zip(some, texts, done, strict=True):
            verdict = what.task.verify(example, text)
            answers[i].append(Answer(verdict, len(completion.token_ids), completion.finish_reason == "length"))
    return answers


def summarise(task: Task, prompts: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
    """The numbers of one skill from one answer per prompt."""
    scores = [some[0].verdict.content for some in prompts]
    numbers = {"accuracy": proportion([float(score >= 1.0) for score in scores])} if task.verifies else {}
    if task.verifies and getattr(task, "partial_scores", False):
        numbers["score"] = proportion(scores)
    return numbers | describe(prompts)


def describe(prompts: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
    """How completions are written, as means over the prompts of what each prompt's samples show."""
    formats = [[a.verdict.format for a in some if a.verdict.format is not None] for some in prompts]
    told = {"format": proportion([mean(some) for some in formats])} if all(formats) else {}
    return told | {
        "length": average([mean([a.length for a in some]) for some in prompts]),
        "truncated": proportion([mean([float(a.truncated) for a in some]) for some in prompts]),
    }


def by_skill(
    examples: Sequence[Example],
    answers: Sequence[list[Answer]],
    summary: Callable[[Sequence[Sequence[Answer]]], dict[str, Estimate]],
) -> dict[str, Estimate]:
    """`<skill>/<number>` for each skill and for each group of skills."""
    skills: dict[str, list[list[Answer]]] = defaultdict(list)
    for example, some in zip(examples, answers, strict=True):
        for name in sorted({example.skill, example.skill.split("/")[0]}):
            skills[name].append(some)
    summaries = {skill: summary(some) for skill, some in skills.items()}
    # All skills' accuracy first, then all their formats: what is compared stands together.
    names = dict.fromkeys(name for numbers in summaries.values() for name in numbers)
    return {f"{skill}/{name}": numbers[name] for name in names for skill, numbers in summaries.items() if name in numbers}
