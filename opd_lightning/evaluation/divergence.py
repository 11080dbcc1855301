"""Evaluations of free text, where no verifier exists: distance to the teacher, and likelihood of ordinary answers."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.renderer import encode_chat
from opd_lightning.evaluation.estimate import Estimate
from opd_lightning.losses.objective import diagnose
from opd_lightning.models import Pretrained, Student
from opd_lightning.rollout import DatasetRollout, StudentRollout
from opd_lightning.teachers import FrozenStart, Live, Scorer
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, Prompts, Rollout, Task
from opd_lightning.utils.seeds import derive_seed


class TeacherDivergence:
    """KL to the teacher, both ways and per token, on the student's own completions of held-out prompts.

    Args:
        task, split, n: the first n examples of a split.
        tokenizer: the student's.
        max_new_tokens, seed: of the sampled completions, at temperature 1.
        batch_size: completions at a time.
        template_options: keyword arguments for the student's chat template.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        split: str = "test",
        n: int = 48,
        seed: int = 0,
        batch_size: int = 48,
        template_options: dict | None = None,
    ):
        self.examples = list(task.examples(split))[:n]
        self.rollout = StudentRollout(tokenizer, max_new_tokens)
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size
        self.template_options = template_options or {}

    def __call__(self, student: Student, scorers: Mapping[str, Scorer]) -> dict[str, Estimate]:
        """`heldout/reverse_kl` and `heldout/forward_kl`, nats per token; nothing without a teacher that knows what to read."""
        teacher = scorers.get("teacher")
        if teacher is None or teacher.context.reads_attempts:
            return {}
        return self.measure(student, teacher, "heldout")

    def measure(self, student: Student, other: Scorer, group: str) -> dict[str, Estimate]:
        """Both KLs to another model, under names that begin with a group's."""
        itself = Scorer(Live(), NoContext(self.template_options), self.tokenizer)
        sums, count = {"reverse_kl": 0.0, "forward_kl": 0.0}, 0
        for i, prompts in enumerate(batches(self.examples, self.tokenizer, self.batch_size, self.template_options)):
            rollout = self.rollout(student, prompts, derive_seed(self.seed, "evaluation", i))
            for logits in chunks({"student": itself, "teacher": other}, student, rollout):
                stats = diagnose({name: x.log_softmax(-1) for name, x in logits.items()})
                sums = {name: total + stats[name].sum().item() for name, total in sums.items()}
            count += int(rollout.lengths.sum())
        return {f"{group}/{name}": Estimate(total / count, len(self.examples)) for name, total in sums.items()}


class StartDivergence(TeacherDivergence):
    """KL to the start model, both ways and per token, on the student's own completions: how far it has moved.

    Args:
        model: the student's start; a copy is loaded, so a run pays its memory once more.
        task, tokenizer, max_new_tokens, split, n, seed, batch_size, template_options: as for `TeacherDivergence`.
        skill: prompts of this skill or group of skills alone, such as "prior"; None takes all.
    """

    def __init__(
        self,
        model: Pretrained,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        split: str = "test",
        n: int = 48,
        seed: int = 0,
        batch_size: int = 48,
        template_options: dict | None = None,
        skill: str | None = None,
    ):
        super().__init__(task, tokenizer, max_new_tokens, split, n, seed, batch_size, template_options)
        mine = [e for e in task.examples(split) if skill is None or skill in (e.skill, e.skill.split("/")[0])]
        if not mine:
            raise ValueError(f"evaluation: no example of the {split} split has the skill {skill!r}.")
        self.examples, self.model, self.group = mine[:n], model, f"start/{skill or 'all'}"
        self.start: Scorer | None = None

    def __call__(self, student: Student, scorers: Mapping[str, Scorer]) -> dict[str, Estimate]:
        """`start/<skill>/reverse_kl` and `start/<skill>/forward_kl`, nats per token."""
        if self.start is None:
            weights = FrozenStart()
            weights.model = Student(self.model.model(), student.chunk).requires_grad_(False).eval().to(student.lm.device)
            self.start = Scorer(weights, NoContext(self.template_options), self.tokenizer)
        return self.measure(student, self.start, self.group)


class ReferenceLikelihood:
    """Log-likelihood of reference answers to held-out prompts: does the model still find ordinary answers ordinary?

    Args: as for `TeacherDivergence`.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        split: str = "test",
        n: int = 96,
        batch_size: int = 16,
        template_options: dict | None = None,
    ):
        self.examples = [e for e in task.examples(split) if e.completion is not None][:n]
        if not self.examples:
            raise ValueError(f"evaluation: no example of the {split} split has a completion to measure; leave it out.")
        self.rollout = DatasetRollout(tokenizer, max_new_tokens=10**6)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.template_options = template_options or {}

    def __call__(self, student: Student, scorers: Mapping[str, Scorer]) -> dict[str, Estimate]:
        """`heldout/log_likelihood` of the student, and of the teacher if there is one; nats per token."""
        itself = Scorer(Live(), NoContext(self.template_options), self.tokenizer)
        readers = {"log_likelihood": itself}
        if "teacher" in scorers:
            readers["teacher_log_likelihood"] = Scorer(scorers["teacher"].weights, itself.context, self.tokenizer)
        sums, count = dict.fromkeys(readers, 0.0), 0
        for prompts in batches(self.examples, self.tokenizer, self.batch_size, self.template_options):
            rollout = self.rollout(student, prompts, 0)
            targets = rollout.ids[rollout.mask].split(CHUNK)
            for logits, target in zip(chunks(readers, student, rollout), targets, strict=True):
                for name, x in logits.items():
                    sums[name] += x.log_softmax(-1).gather(1, target[:, None]).sum().item()
            count += int(rollout.lengths.sum())
        return {f"heldout/{name}": Estimate(total / count, len(self.examples)) for name, total in sums.items()}


CHUNK = 256


def batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, size: int, template_options: dict
) -> Iterator[Prompts]:
    """The examples' prompts, `size` at a time."""
    for start in range(0, len(examples), size):
        some = list(examples[start : start + size])
        yield Prompts(some, [encode_chat(tokenizer, e.messages, **template_options) for e in some])


@torch.no_grad()
def chunks(readers: Mapping[str, Scorer], student: Student, rollout: Rollout) -> Iterator[dict[str, Tensor]]:
    """Logits of each reader on the rollout's packed tokens, CHUNK rows [n, V] at a time."""
    scores = {name: reader.score(student, rollout, None) for name, reader in readers.items()}
    assert all(bool(score.told.all()) for score in scores.values()), "a reader that is told nothing has nothing to compare"
    sources = {name: score.source for name, score in scores.items()}
    for start in range(0, int(rollout.lengths.sum()), CHUNK):
        rows = slice(start, start + CHUNK)
        shared = min(s.vocabulary for s in sources.values())
        yield {name: s.project(s.hidden[rows])[:, :shared] for name, s in sources.items()}
