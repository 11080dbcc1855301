"""GreedyAccuracy and SampledAccuracy: accuracy, format and length of completions by skill."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean as mean
from typing import Any

from opd_lightning.contracts import Generator, Renderer, Task
from opd_lightning.evaluation.estimate import Estimate, average, pass_at, proportion
from opd_lightning.evaluation.reference_nll import reference_nll
from opd_lightning.models import Student
from opd_lightning.types import Example, SamplingParams, Verdict
from opd_lightning.utils.seeds import derive_seed


@dataclass(frozen=True)
class Answer:
    """One completion of a held-out prompt.

    Attributes:
        text: without special tokens.
        verdict: the task's.
        length: tokens, EOS included.
        truncated: did it run into the token limit?
    """

    text: str
    verdict: Verdict
    length: int
    truncated: bool


class GreedyAccuracy:
    """Greedy completions of held-out prompts, judged by the task.

    Args:
        task: gives the examples and the verdicts.
        renderer: the student's.
        max_new_tokens: longer completions are cut there, and judged as they are.
        split: "validation" or "test".
        batch_size: completions decoded at a time.
        prefix: of the numbers' names, such as "validation/"; distinguishes two accuracies in one suite.

    Attributes:
        outcomes: skill, content and the answer by example id, of the last call.
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

        Accuracy is the share that is right; for tasks with partial scores, `score` is their mean. Tasks without a verifier have
        neither, and `nll` of their references, nats per token.
        """
        answers = sample_answers(generator, self, samples=1, seed=0)
        pairs = zip(self.examples, answers, strict=True)
        self.outcomes = {
            e.id: {"skill": e.skill, "content": first.verdict.content, "answer": first.text} for e, (first,) in pairs
        }
        likelihood = {} if self.task.verifies else reference_nll(student, self.renderer, self.examples)
        estimates = likelihood | by_skill(self.examples, answers, partial(summarise, self.task))
        return {f"{self.prefix}{name}": estimate for name, estimate in estimates.items()}


class SampledAccuracy:
    """k sampled completions per held-out prompt: their mean score (avg@k), and whether any of them is right (pass@k).

    Args:
        task, renderer, split, batch_size: as for `GreedyAccuracy`.
        sampling: of its n completions per prompt.
        passes: the k of pass@k; each at most n.
        seed: of the draws, the same at every evaluation of a run.
        solved: the least content that counts as right, for verifiers with partial scores.

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
        self.sampling, self.samples = replace(sampling, n=1), sampling.n  # `sample_answers` repeats prompts itself
        self.passes, self.seed, self.solved = passes, seed, solved

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """For each skill and group of skills: `avg@<samples>`, each `pass@<k>`, and their format and length."""
        return by_skill(self.examples, sample_answers(generator, self, self.samples, self.seed), self.passing)

    def passing(self, prompts: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
        """The numbers of one skill."""
        scores = [[a.verdict.content for a in answers] for answers in prompts]
        right = [sum(score >= self.solved for score in of_prompt) for of_prompt in scores]
        mean = {f"avg@{self.samples}": proportion([sum(of_prompt) / len(of_prompt) for of_prompt in scores])}
        passes = {f"pass@{k}": proportion([pass_at(k, self.samples, c) for c in right]) for k in self.passes}
        return mean | passes | {f"sampled_{name}": e for name, e in describe(prompts).items()}


def sample_answers(
    generator: Generator, evaluation: GreedyAccuracy | SampledAccuracy, samples: int, seed: int
) -> list[list[Answer]]:
    """`samples` completions of each example, judged."""
    rows = [(i, example) for i, example in enumerate(evaluation.examples) for _ in range(samples)]
    answers: list[list[Answer]] = [[] for _ in evaluation.examples]
    for start in range(0, len(rows), evaluation.batch_size):
        batch = rows[start : start + evaluation.batch_size]
        prompts = [evaluation.renderer.render(example.messages, example.tools) for _, example in batch]
        done = generator.generate(prompts, evaluation.sampling, derive_seed(seed, "evaluation", start))
        texts = evaluation.renderer.decode_all([completion.token_ids for completion in done])
        for (i, example), text, completion in zip(batch, texts, done, strict=True):
            verdict = evaluation.task.verify(example, text)
            answers[i].append(Answer(text, verdict, len(completion.token_ids), completion.finish_reason == "length"))
    return answers


def summarise(task: Task, prompts: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
    """The numbers of one skill from one answer per prompt."""
    scores = [answers[0].verdict.content for answers in prompts]
    numbers = {"accuracy": proportion([float(score >= 1.0) for score in scores])} if task.verifies else {}
    if task.verifies and getattr(task, "partial_scores", False):
        numbers["score"] = proportion(scores)
    return numbers | describe(prompts)


def describe(prompts: Sequence[Sequence[Answer]]) -> dict[str, Estimate]:
    """Format, length and truncation, averaged over each prompt's samples, then over prompts."""
    formats = [[a.verdict.format for a in answers if a.verdict.format is not None] for answers in prompts]
    shares = {"format": proportion([mean(values) for values in formats])} if all(formats) else {}
    return shares | {
        "length": average([mean([a.length for a in answers]) for answers in prompts]),
        "truncated": proportion([mean([float(a.truncated) for a in answers]) for answers in prompts]),
    }


def by_skill(
    examples: Sequence[Example],
    answers: Sequence[list[Answer]],
    summary: Callable[[Sequence[Sequence[Answer]]], dict[str, Estimate]],
) -> dict[str, Estimate]:
    """`<skill>/<number>` for each skill and for each group of skills."""
    skills: dict[str, list[list[Answer]]] = defaultdict(list)
    for example, samples in zip(examples, answers, strict=True):
        for name in sorted({example.skill, example.skill.split("/")[0]}):
            skills[name].append(samples)
    summaries = {skill: summary(prompts) for skill, prompts in skills.items()}
    # Accuracies of all skills first, then all formats, and so on.
    names = dict.fromkeys(name for numbers in summaries.values() for name in numbers)
    return {f"{skill}/{name}": numbers[name] for name in names for skill, numbers in summaries.items() if name in numbers}
