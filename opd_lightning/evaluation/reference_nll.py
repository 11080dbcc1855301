"""Negative log-likelihood of held-out references, by skill."""

from collections import Counter
from collections.abc import Sequence

import torch

from opd_lightning.contracts import Renderer
from opd_lightning.evaluation.divergence import batches, chunks, reader
from opd_lightning.evaluation.estimate import Estimate
from opd_lightning.models import Student
from opd_lightning.rollout import DatasetRollout
from opd_lightning.rollout.dataset import reference_sample
from opd_lightning.types import Example, Sample, SamplingParams

ROWS = 16
"""References that are read at a time."""


def reference_nll(student: Student, renderer: Renderer, examples: Sequence[Example]) -> dict[str, Estimate]:
    """`<skill>/nll` for each skill and group of skills: nats per token of the references, EOS included.

    Empty without references. Those that the chat template cannot render, or the model's window cannot hold, are left out.
    """
    written = [example for example in examples if has_reference(example, renderer)]
    rollout = DatasetRollout(renderer, SamplingParams(10**6))
    nats: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    prompts: Counter[str] = Counter()
    for batch in batches(written, renderer, ROWS):
        samples = [sample for sample in rollout(batch).samples if len(sample.token_ids) <= student.window]
        if not samples:
            continue
        for sample, value in zip(samples, sums(student, renderer, samples), strict=True):
            for name in {sample.example.skill, sample.example.skill.split("/")[0]}:
                nats[name] += value  # type: ignore[assignment]
                tokens[name] += sample.trainable
                prompts[name] += 1
    return {f"{name}/nll": Estimate(nats[name] / tokens[name], prompts[name]) for name in sorted(tokens)}


def has_reference(example: Example, renderer: Renderer) -> bool:
    """Whether an example has a completion that the chat template renders."""
    try:
        return example.reference is not None and reference_sample(renderer, example).trainable > 0
    except ValueError:
        return False


def sums(student: Student, renderer: Renderer, samples: Sequence[Sample]) -> list[float]:
    """The negative log-likelihood of each sample's completion, in nats."""
    targets = torch.cat([sample.token_ids[sample.loss_mask] for sample in samples]).to(student.lm.device)
    found = [read["student"] for read in chunks({"student": reader(student, renderer)}, samples)]
    rows = targets.split([len(x.valid) for x in found])
    each = torch.cat([-x.of(target) for x, target in zip(found, rows, strict=True)])
    return [float(part.double().sum()) for part in each.split([sample.trainable for sample in samples])]
