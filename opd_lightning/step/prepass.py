"""The pass of the student without gradient before the first update on a rollout, for parts that read the whole batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.data.batching import Batch, packed_index
from opd_lightning.models.flops import update_flops
from opd_lightning.types import Sample, Tokens
from opd_lightning.utils.metrics import StepMetrics


def observed(module: Any, samples: list[Sample], tokens: Tokens, scores: dict[str, Any], metrics: StepMetrics) -> Tokens:
    """The tokens with statistics of student and teacher, and what follows from them, if the objective reads these."""
    if not module.objective.reads_scores:
        return tokens
    assert tokens.sample is not None
    rows = tokens.sample[tokens.weight != 0].unique().tolist() or [0]
    batch = Batch(samples, tokens, scores, skip_update=False, active=rows)
    seen = read(module, batch, module.objective.observe, scores, metrics)
    tokens = replace(tokens, seen=seen)
    if module.rollout.num_iterations > 1:
        tokens = replace(tokens, old_logprob=seen["loss"])
    return module.objective.with_returns(tokens)


def with_old_logprobs(module: Any, batch: Batch, metrics: StepMetrics) -> Batch:
    """The batch with each token's log-probability before the first update on it, if a term compares with it."""
    compares = module.rollout.num_iterations > 1 and module.objective.compares_updates
    if not compares or batch.skip_update or batch.tokens.old_logprob is not None:
        return batch
    old = read(module, batch, module.objective.log_prob, {}, metrics)["loss"]
    return replace(batch, tokens=replace(batch.tokens, old_logprob=old))


def read(module: Any, batch: Batch, loss: Callable, scores: dict[str, Any], metrics: StepMetrics) -> dict[str, Tensor]:
    """The statistics [N] that a loss gives on the active samples, in eval mode, for a ratio compares policies without dropout.

    Statistics are 0 on the other samples.
    """
    metrics.total("flops/forward", update_flops(module.sizes, [batch.samples[b] for b in batch.active])["forward"])
    counts = [sample.trainable for sample in batch.samples]
    columns: dict[str, Tensor] = {}
    with module.student.eval_mode():
        for rows, _ in module.plan(batch):
            sequences, tokens, targets = batch.micro(rows, module.renderer.tokenizer.pad_token_id)
            _, stats = module.student(sequences, tokens, targets if scores else {}, loss)
            index = packed_index(rows, counts).to(batch.tokens.ids.device)
            for name, values in stats.items():
                if name not in columns:
                    columns[name] = values.new_zeros(batch.tokens.ids.shape)
                columns[name][index] = values
    return {name: column for name, column in columns.items() if torch.is_floating_point(column)}
