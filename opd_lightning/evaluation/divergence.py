"""Evaluations without a verifier: KL to the teacher or the start model, and likelihood of reference answers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import Generator, Renderer, Task
from opd_lightning.evaluation.estimate import Estimate
from opd_lightning.losses.diagnostics import diagnose
from opd_lightning.losses.targets import FullLogits, FullLogProbs
from opd_lightning.models import Pretrained, Student
from opd_lightning.rollout import DatasetRollout, StudentRollout
from opd_lightning.teachers import external, live
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.types import Example, Prompts, Sample, SamplingParams, Tokens
from opd_lightning.utils.seeds import derive_seed
from opd_lightning.utils.vocabulary import ValidIds, valid_ids_of


class TeacherDivergence:
    """KL to the teacher, both ways and per token, on the student's own completions of held-out prompts.

    Args:
        task, split, n: the first n examples of a split.
        renderer: the student's.
        max_new_tokens: limit of the sampled completions, at temperature 1.
        batch_size: completions per batch.
    """

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        max_new_tokens: int,
        split: str = "test",
        n: int = 48,
        batch_size: int = 48,
    ):
        self.examples = list(task.examples(split))[:n]
        self.renderer = renderer
        self.rollout = StudentRollout(self.renderer, SamplingParams(max_new_tokens))
        self.batch_size = batch_size

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """`heldout/reverse_kl` and `heldout/forward_kl`, nats per token; none where the teacher has no full vocabulary."""
        teacher = teachers.get("teacher")
        if teacher is None or "full" not in teacher.provides or not teacher.scores_any_text:
            return {}
        if any(part.context.needs_rollouts for part in teacher.parts):
            return {}
        return self.measure(student, teacher, generator, "heldout")

    def measure(self, student: Student, teacher: Any, generator: Generator, group: str) -> dict[str, Estimate]:
        """Both KLs to another model (a teacher that is set up) on the tokens of both models, named `<group>/<kl>`.

        Of one with another tokenizer they are over the tokens that are the same bytes, and named `<kl>_shared`; there are none
        where it is compared in another way.
        """
        student_reader = reader(student, self.renderer)
        sums: dict[str, float] = {}
        count = 0
        for i, prompts in enumerate(batches(self.examples, self.renderer, self.batch_size)):
            samples = self.rollout(prompts, derive_seed(0, "evaluation", i), generator, {}).samples
            for read in chunks({"student": student_reader, "teacher": teacher}, samples):
                stats, valid = compared(read["student"], read["teacher"]), read["teacher"].valid
                for name in KLS & set(stats):
                    sums[name] = sums.get(name, 0.0) + stats[name][valid].sum().item()
                count += int(valid.sum())
        return {f"{group}/{name}": Estimate(total / max(count, 1), len(self.examples)) for name, total in sums.items()}


class StartDivergence(TeacherDivergence):
    """KL to the start model, both ways and per token, on the student's own completions: how far training moved it.

    Args:
        model: the student's start model; a second copy is loaded and takes memory.
        task, renderer, max_new_tokens, split, n, batch_size: as for `TeacherDivergence`.
        skill: only prompts of this skill or group of skills, such as "prior"; None takes all.
    """

    def __init__(
        self,
        model: Pretrained,
        task: Task,
        renderer: Renderer,
        max_new_tokens: int,
        split: str = "test",
        n: int = 48,
        batch_size: int = 48,
        skill: str | None = None,
    ):
        super().__init__(task, renderer, max_new_tokens, split, n, batch_size)
        matching = [e for e in task.examples(split) if skill is None or skill in (e.skill, e.skill.split("/")[0])]
        if not matching:
            raise ValueError(f"evaluation: no example of the {split} split has the skill {skill!r}.")
        self.examples, self.model, self.group = matching[:n], model, f"start/{skill or 'all'}"
        self.start: Any = None

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """`start/<skill>/reverse_kl` and `start/<skill>/forward_kl`, nats per token."""
        if self.start is None:
            dtype = str(self.model.dtype).removeprefix("torch.")
            context = NoContext(self.renderer.template_options)
            self.start = external(self.model.path, dtype, self.model.attention, context, self.model.field)
            self.start.setup(student, self.renderer)
        return self.measure(student, self.start, generator, self.group)


class ReferenceLikelihood:
    """Log-likelihood of reference answers to held-out prompts, nats per token.

    Args: as for `TeacherDivergence`.
    """

    def __init__(
        self,
        task: Task,
        renderer: Renderer,
        split: str = "test",
        n: int = 96,
        batch_size: int = 16,
    ):
        self.examples = [e for e in task.examples(split) if e.reference is not None][:n]
        if not self.examples:
            raise ValueError(f"evaluation: no example of the {split} split has a completion to measure; leave it out.")
        self.renderer, self.batch_size = renderer, batch_size
        self.rollout = DatasetRollout(self.renderer, SamplingParams(10**6))

    def __call__(self, student: Student, teachers: Mapping[str, Any], generator: Generator) -> dict[str, Estimate]:
        """`heldout/log_likelihood` of the student, and of the teacher if it is a local model; nats per token."""
        readers = {"log_likelihood": reader(student, self.renderer)}
        weights = getattr(teachers.get("teacher"), "weights", None)
        if hasattr(weights, "source"):  # a mixture has numbers by that name
            readers["teacher_log_likelihood"] = reader(student, self.renderer, weights)
        sums, counts = dict.fromkeys(readers, 0.0), dict.fromkeys(readers, 0)
        for prompts in batches(self.examples, self.renderer, self.batch_size):
            samples = self.rollout(prompts).samples
            targets = torch.cat([sample.token_ids[sample.loss_mask] for sample in samples]).to(student.lm.device).split(CHUNK)
            for read, target in zip(chunks(readers, samples), targets, strict=True):
                for name, x in read.items():
                    sums[name] += x.of(torch.where(x.valid, target, 0))[x.valid].sum().item()
                    counts[name] += int(x.valid.sum())
        return {f"heldout/{name}": Estimate(total / max(counts[name], 1), len(self.examples)) for name, total in sums.items()}


CHUNK = 256
KLS = {"reverse_kl", "forward_kl", "reverse_kl_shared", "forward_kl_shared"}
"""The divergences that are reported."""


def compared(student: Any, teacher: Any) -> dict[str, Tensor]:
    """Statistics [n] of the log-probabilities of student and teacher, on the outcomes that both have."""
    if hasattr(teacher, "compared"):
        unread = torch.zeros(len(student.log_p), dtype=torch.long, device=student.log_p.device)
        log_s, target, _, _ = teacher.compared(student.log_p, Tokens(unread, unread, unread))
        return diagnose(log_s, {"teacher": target})
    shared = student.shared.intersection([teacher.shared])
    log_s, log_t = (x.log_p if x.shared == shared else shared.cut(x.log_p).log_softmax(-1) for x in (student, teacher))
    return diagnose(log_s, {"teacher": FullLogProbs(log_t)})


class ReaderLogProbs(FullLogProbs):
    """Log-probabilities [n, V] of a reader over its tokens, `shared`; valid [n] where the reader has a target for the token."""

    shared: ValidIds
    valid: Tensor

    def __init__(self, log_p: Tensor, valid_ids: ValidIds, valid: Tensor | None):
        super().__init__(log_p, torch.ones_like(log_p[:, 0], dtype=torch.bool) if valid is None else valid, valid_ids)


def reader(student: Student, renderer: Renderer, weights: Any = None) -> Any:
    """A teacher on the student's own prompt, with the student's weights or those of a teacher that is set up."""
    teacher = live(NoContext(renderer.template_options))
    teacher.setup(student, renderer)
    if weights is not None:
        teacher.weights, teacher.source = weights, weights.source
    return teacher


def batches(examples: Sequence[Example], renderer: Renderer, size: int) -> Iterator[Prompts]:
    """The examples' prompts, `size` at a time."""
    for start in range(0, len(examples), size):
        batch = list(examples[start : start + size])
        yield Prompts(batch, [renderer.render(example.messages, example.tools) for example in batch])


@torch.no_grad()
def chunks(readers: Mapping[str, Any], samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """The log-probabilities of each reader on the samples' packed tokens, CHUNK rows at a time."""
    scores = {name: model.score(samples) for name, model in readers.items()}
    for start in range(0, sum(sample.trainable for sample in samples), CHUNK):
        rows = slice(start, start + CHUNK)
        targets = {name: score.chunk(rows) for name, score in scores.items()}
        yield {
            name: ReaderLogProbs(target.logits.log_softmax(-1), valid_ids_of(scores[name]), target.valid)
            if isinstance(target, FullLogits)
            else target.log_probs(1.0)
            for name, target in targets.items()
        }
