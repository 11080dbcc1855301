"""EpisodeAccuracy: success, turns and tokens of held-out episodes in the environment of training."""

from collections.abc import Callable, Mapping
from statistics import fmean as mean
from typing import Any

from opd_lightning.contracts import Environment, Generator, Renderer, Task
from opd_lightning.evaluation.estimate import Estimate, average, proportion
from opd_lightning.models import Student
from opd_lightning.rollout.conversation_text import conversation_text
from opd_lightning.rollout.episodes import Episodes, refuse_failures
from opd_lightning.types import Sample, SamplingParams, Verdict
from opd_lightning.utils.seeds import derive_seed


class EpisodeAccuracy:
    """Episodes of held-out prompts, greedy by default.

    Args:
        task: gives the examples, and the verdicts that the environment does not give.
        renderer: the student's.
        environment: makes the episodes; None is a single reply.
        max_new_tokens: of all replies of an episode together.
        split: "validation" or "test".
        n: at most so many prompts of the split; None takes all.
        temperature: 0 is greedy.
        batch_size: episodes that are played at a time.
        window: tokens that the student reads at once; None has no end.
        prefix: of the numbers' names.

    Attributes:
        outcomes: skill, content and the conversation by example id, of the last call.
    """

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        max_new_tokens: int,
        environment: Callable[[], Environment] | None = None,
        split: str = "test",
        n: int | None = None,
        temperature: float = 0.0,
        batch_size: int = 64,
        window: int | None = None,
        prefix: str = "",
    ):
        if environment is None:
            raise ValueError(
                "evaluation=episodes plays an environment, and environment=single_turn is none; choose evaluation=accuracy."
            )
        self.task, self.renderer, self.batch_size, self.prefix = task, renderer, batch_size, prefix
        self.examples = list(task.examples(split))[:n]
        sampling = SamplingParams(max_new_tokens, temperature)
        self.episodes = Episodes(environment, renderer, sampling, mask_truncated=False, window=window)
        self.outcomes: dict[str, dict[str, Any]] = {}

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """For each skill and group of skills: accuracy, and means of turns, tokens by writer and the environment's numbers."""
        samples: list[Sample] = []
        for start in range(0, len(self.examples), self.batch_size):
            part = self.examples[start : start + self.batch_size]
            samples += self.episodes.play_some(part, derive_seed(0, "episodes", start), generator)
        judged = [(sample, self.verdict(sample)) for sample in refuse_failures(samples)]
        self.outcomes = {
            sample.example.id: {
                "skill": sample.example.skill,
                "content": 0.0 if verdict is None else verdict.content,
                "answer": conversation_text(self.renderer, sample),
            }
            for sample, verdict in judged
        }
        groups: dict[str, list[tuple[Sample, Verdict | None]]] = {}
        for sample, verdict in judged:
            for name in sorted({sample.example.skill, sample.example.skill.split("/")[0]}):
                groups.setdefault(name, []).append((sample, verdict))
        numbers = {skill: summary(group) for skill, group in groups.items()}
        names = dict.fromkeys(name for group in numbers.values() for name in group)
        return {
            f"{self.prefix}{skill}/{name}": found[name] for name in names for skill, found in numbers.items() if name in found
        }

    def verdict(self, sample: Sample) -> Verdict | None:
        """The environment's verdict, else the task's on the last reply; None without a verifier."""
        if sample.verdict is not None or not self.task.verifies:
            return sample.verdict
        return self.task.verify(sample.example, self.renderer.decode(sample.reply_ids))


def summary(group: list[tuple[Sample, Verdict | None]]) -> dict[str, Estimate]:
    """The numbers of one skill."""
    scores = [verdict.content for _, verdict in group if verdict is not None]
    found = {"accuracy": proportion([float(score >= 1.0) for score in scores])} if scores else {}
    if any(0.0 < score < 1.0 for score in scores):
        found["score"] = Estimate(mean(scores), len(scores))
    found["length"] = average([float(sample.trainable) for sample, _ in group])
    found["truncated"] = proportion([float(sample.finish_reason == "length") for sample, _ in group])
    for name in dict.fromkeys(name for sample, _ in group for name in sample.metrics):
        found[name] = average([float(sample.metrics.get(name, 0.0)) for sample, _ in group])
    return found
