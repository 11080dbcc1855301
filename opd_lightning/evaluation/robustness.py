"""Robustness: accuracy under perturbations of the model, its prompts or its tokens."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from opd_lightning.contracts import Generator, Renderer, Task
from opd_lightning.evaluation.estimate import Estimate, proportion
from opd_lightning.models import Student
from opd_lightning.models.adapters import substituted
from opd_lightning.types import Example, Rendered, SamplingParams
from opd_lightning.utils.seeds import derive_seed


@dataclass(frozen=True)
class Perturbations:
    """Perturbations of a model or its prompts; each entry of a list gives one number.

    Attributes:
        openings: texts that a completion is made to begin with; the answer with its opening is judged.
        corrupted: token positions (from 0). There the greedy answer gets another answer's token, and the model continues. Its
            answer is judged with that token restored, so that only the continuation counts. Answers that end at that
            position or before are left out.
        distractors: texts put before the last message.
        temperatures: of sampled answers.
        noises: Gaussian noise on every weight matrix, in standard deviations of that matrix.
        seed: of noise, samples and foreign tokens; the same for every run.

    Raises:
        ValueError: nothing is perturbed, or a value is out of range.
    """

    openings: Sequence[str] = ()
    corrupted: Sequence[int] = ()
    distractors: Sequence[str] = ()
    temperatures: Sequence[float] = ()
    noises: Sequence[float] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.openings or self.corrupted or self.distractors or self.temperatures or self.noises):
            raise ValueError(
                "evaluation.suite.robustness.perturbations is empty; give openings, temperatures or another of its lists."
            )
        if any(k < 0 for k in self.corrupted) or any(x <= 0 for x in [*self.temperatures, *self.noises]):
            raise ValueError(
                "evaluation.suite.robustness.perturbations: positions must not be negative, temperatures and noises positive."
            )


class Robustness:
    """Accuracy on the same held-out prompts under one perturbation at a time, with their mean and the worst of them.

    Args:
        task, split: give the examples and the verdicts.
        renderer: the student's.
        max_new_tokens: of a completion, forced tokens included.
        perturbations: see `Perturbations`.
        skill: prompts of this skill or group of skills alone; None takes all.
        n: prompts.
        batch_size: completions at a time.

    Raises:
        ValueError: no example has the skill, or the task has no verifier.
    """

    ends_only = True

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        max_new_tokens: int,
        perturbations: "Perturbations",
        skill: str | None = None,
        split: str = "test",
        n: int = 128,
        batch_size: int = 128,
    ):
        matching = [e for e in task.examples(split) if skill is None or skill in (e.skill, e.skill.split("/")[0])]
        if not matching:
            raise ValueError(f"evaluation: no example of the {split} split has the skill {skill!r}.")
        if not task.verifies:
            raise ValueError("evaluation=robustness judges answers, and this task has no verifier; choose another evaluation.")
        self.task, self.renderer, self.examples = task, renderer, matching[:n]
        self.perturbations, self.seed = perturbations, perturbations.seed
        self.sampling, self.batch_size = SamplingParams(max_new_tokens, temperature=0.0), batch_size
        self.prompts = [self.renderer.render(e.messages, e.tools).token_ids for e in self.examples]

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """`robust/<perturbation>`, `robust/none` (greedy, nothing perturbed), `robust/mean` and `robust/worst`."""
        rows, settings = self.write(generator, self.prompts, self.sampling), self.perturbations
        estimates = {f"opening_{name(text)}": self.forced(generator, text) for text in settings.openings}
        for k in settings.corrupted:
            if (accuracy := self.recovered(generator, rows, k)) is not None:
                estimates[f"corrupted_{k}"] = accuracy
        estimates |= {f"distracted_{name(text)}": self.distracted(generator, text) for text in settings.distractors}
        for t in settings.temperatures:
            sampling = replace(self.sampling, temperature=t)
            estimates[f"temperature_{t}"] = self.judged(self.write(generator, self.prompts, sampling))
        for sigma in settings.noises:
            with noisy(student, sigma, derive_seed(self.seed, "noise")):
                generator.update_weights(student, None)
                estimates[f"noise_{sigma}"] = self.judged(self.write(generator, self.prompts, self.sampling))
            generator.update_weights(student, None)
        values = [estimate.value for estimate in estimates.values()]
        estimates |= {"mean": Estimate(fmean(values)), "worst": Estimate(min(values)), "none": self.judged(rows)}
        return {f"robust/{name}": estimate for name, estimate in estimates.items()}

    def forced(self, generator: Generator, opening: str) -> Estimate:
        """Accuracy of answers that begin with a given text."""
        # As the template begins such a reply, with whatever it writes before the reply's own text.
        forced = [self.renderer.reply(opening, example.messages, example.tools)[:-1] for example in self.examples]
        rest = replace(self.sampling, max_new_tokens=max(1, self.sampling.max_new_tokens - max(map(len, forced))))
        rows = self.write(generator, [[*ids, *begin] for ids, begin in zip(self.prompts, forced, strict=True)], rest)
        return self.judged([[*begin, *row] for begin, row in zip(forced, rows, strict=True)])

    def recovered(self, generator: Generator, rows: Sequence[Sequence[int]], k: int) -> Estimate | None:
        """Accuracy after a foreign token at position k; None if no answer is that long."""
        foreign = {b: t for b in range(len(rows)) if (t := foreign_token(rows, b, k)) is not None}
        if not foreign:
            return None
        prompts = [[*self.prompts[b], *rows[b][:k], token] for b, token in foreign.items()]
        rest = replace(self.sampling, max_new_tokens=max(1, self.sampling.max_new_tokens - k - 1))
        ends = self.write(generator, prompts, rest)
        restored = [[*rows[b][: k + 1], *end] for b, end in zip(foreign, ends, strict=True)]
        return self.judged(restored, [self.examples[b] for b in foreign])

    def distracted(self, generator: Generator, text: str) -> Estimate:
        """Accuracy on prompts with a distractor before the last message."""
        chats = [[*e.messages[:-1], e.messages[-1] | {"content": f"{text} {e.messages[-1]['content']}"}] for e in self.examples]
        prompts = [self.renderer.render(chat, e.tools).token_ids for chat, e in zip(chats, self.examples, strict=True)]
        return self.judged(self.write(generator, prompts, self.sampling))

    def write(self, generator: Generator, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[list[int]]:
        """Token ids of a completion of each prompt."""
        rows = []
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            done = generator.generate([Rendered(ids) for ids in batch], sampling, derive_seed(self.seed, "robustness", start))
            rows += [completion.token_ids for completion in done]
        return rows

    def judged(self, rows: Sequence[Sequence[int]], examples: Sequence[Example] | None = None) -> Estimate:
        """The share of right answers."""
        texts = self.renderer.decode_all(rows)
        judged = self.examples if examples is None else examples
        return proportion([float(self.task.verify(e, t).content >= 1) for e, t in zip(judged, texts, strict=True)])


def foreign_token(rows: Sequence[Sequence[int]], b: int, k: int) -> int | None:
    """The token at position k of the next answer that has another one there; None if row b ends there.

    If all answers agree at k, as on a separator, it is the next answer's token after k.
    """
    if len(rows[b]) <= k + 1:
        return None
    others = [rows[(b + i) % len(rows)] for i in range(1, len(rows))]
    tokens = [row[at] for at in (k, k + 1) for row in others if len(row) > at + 1 and row[at] != rows[b][k]]
    return tokens[0] if tokens else None


@contextmanager
def noisy(student: Student, sigma: float, seed: int) -> Iterator[None]:
    """The student with noise on its weight matrices; its own weights are restored afterwards."""
    generator = torch.Generator().manual_seed(seed)
    noise = {}
    for key, weight in student.named_parameters():
        if weight.dim() >= 2:
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            noise[key] = weight.detach() + sigma * weight.detach().std() * drawn
    with substituted(student, noise):
        yield


def name(text: str) -> str:
    """A text in the form of a metric name."""
    return re.sub(r"\W+", "_", text).strip("_")[:24] or "text"
