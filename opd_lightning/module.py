"""The training step: prompts -> rollout -> score -> loss -> update. It is the same for all methods."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from opd_lightning.contracts import Generator, RolloutPolicy, Teacher
from opd_lightning.data.batching import Batch, packed_index, plan_micro_batches
from opd_lightning.losses.head import NotFinite
from opd_lightning.losses.objective import Objective
from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.models.cpu import fast_on_cpu
from opd_lightning.models.flops import Sizes, rollout_flops
from opd_lightning.models.optimizer import Optim
from opd_lightning.models.sharding import full_tensor, shard
from opd_lightning.step.checkpoint import dump, restore, save
from opd_lightning.step.log import log_flops, log_rollout, log_tokens
from opd_lightning.step.prepass import observed, with_old_logprobs
from opd_lightning.step.rollouts import rollouts_of
from opd_lightning.step.scoring import Scoring
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.types import Example, Prompts, Sample, Verdict
from opd_lightning.utils import freed_memory
from opd_lightning.utils.interrupts import Interrupted
from opd_lightning.utils.metrics import Ledger, StepMetrics
from opd_lightning.utils.seeds import derive_seed, seeded


class DistillationModule(L.LightningModule):
    """The training of a student on completions of any rollout, scored by teachers, a verifier or neither.

    Args:
        model: the student's start weights.
        renderer: the student's tokenizer and chat template.
        generator: the inference engine.
        rollout: the source of completions; see `opd_lightning.rollout`.
        objective: what is minimised; see `opd_lightning.losses`.
        teachers: such as {"teacher": ...}; those that neither objective nor rollout reads are not loaded.
        optim: optimizer, schedule and clip.
        seed: of all random numbers in training.
        verify: judges a completion, where verdicts are needed and no environment gives them.
        max_tokens_per_microbatch: padded tokens per forward pass; None takes the full batch at once.
        logits_chunk_size: rows of logits in memory at a time.
        adapter: a PEFT configuration; None trains all weights.
    """

    def __init__(
        self,
        model: Pretrained,
        renderer: Any,
        generator: Generator,
        rollout: RolloutPolicy,
        objective: Objective,
        teachers: Mapping[str, Teacher],
        optim: Optim,
        seed: int,
        verify: Callable[[Example, str], Verdict] | None = None,
        max_tokens_per_microbatch: int | None = None,
        logits_chunk_size: int = 256,
        adapter: Any = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.renderer, self.rollout, self.objective = model, renderer, rollout, objective
        self.engine = type(generator).__name__
        self.rollouts = rollouts_of(rollout, generator)
        self.generator = self.rollouts.generator
        self.teachers: dict[str, Any] = {name: teachers[name] for name in sorted(objective.teachers | rollout.teachers)}
        mixed = rollout.student_writes and not rollout.on_policy
        self.scoring = Scoring(objective, self.teachers, renderer, verify, rollout.sampling.n, max_tokens_per_microbatch, mixed)
        self.optim, self.seed = optim, seed
        self.max_tokens_per_microbatch, self.chunk, self.adapter = max_tokens_per_microbatch, logits_chunk_size, adapter
        self.strict_loading = adapter is None  # a checkpoint holds what is trained
        self.base: Fingerprint | None = None  # of the weights that a checkpoint with an adapter lacks
        self.ledger = Ledger()
        self.student: Student = None  # type: ignore[assignment]
        self.sizes: Sizes = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        """Load the student and set up the teachers, on their device and before a checkpoint is restored."""
        if self.student is None:
            lm = self.model.model()
            if self.adapter is not None:
                with seeded(derive_seed(self.seed, "adapter"), lm.device):
                    adapters.add(lm, self.adapter)
            self.student = Student(lm, self.chunk, self.renderer.valid_ids).to(self.trainer.strategy.root_device).train()
            self.student.sharding = getattr(self.trainer.strategy, "sharding", None)
            self.student.verify_head(f"model.path={self.model.path}")
            if self.adapter is not None:
                self.base = Fingerprint.of(f"model.path={self.model.path}", self.student)
            self.sizes = Sizes.of(lm)
            self.generator.update_weights(self.student, 0)
            for teacher in self.teachers.values():
                teacher.setup(self.student, self.renderer)
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                shard(self.student, self.trainer.strategy, self.objective)

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.student.parameters(), self.trainer.max_steps)
        return [optimizer], [schedule]

    def on_train_start(self) -> None:
        freed_memory.keep(self.device.type)
        self.rollouts.start(self)

    def training_step(self, prompts: Prompts, batch_idx: int) -> dict[str, Any]:
        """One rollout and its updates; returns samples, scored batch and metrics (`outputs` in callbacks)."""
        metrics = StepMetrics(self.device)
        with self.ledger.timing("rollout"):
            rollout = self.rollouts.take(self, prompts, metrics)
            log_rollout(metrics, rollout, rollout_flops(self.sizes, rollout.samples))
        with self.ledger.timing("score"):
            batch = self.score(rollout.samples, metrics, rollout.scores)
        for _ in range(self.rollout.num_iterations):
            dropout = derive_seed(self.seed, "update", self.global_step, self.global_rank)
            with self.ledger.timing("update"), seeded(dropout, self.device):
                self.update(batch, metrics)
        with suppress(Interrupted):  # the run ends behind this step; a resumed one gives the engine its weights
            self.rollouts.after_update(self, metrics)
        return {"samples": batch.samples, "batch": batch, "metrics": self.report(metrics)}

    def score(self, samples: list[Sample], metrics: StepMetrics, known: Mapping[str, Any] | None = None) -> Batch:
        """The batch with each token's weight and advantage, and the teachers' scores; `known` are those at hand."""
        samples, tokens = self.scoring.pack(samples, metrics, self)
        scores = self.scoring.teacher_scores(samples, metrics, known or {})
        valid = scores["teacher"].valid if "teacher" in scores else None
        tokens = observed(self, samples, tokens, scores, metrics)
        weight, normaliser = self.objective.weights(tokens, len(samples), valid)
        tokens = replace(tokens, weight=weight, seen=None)
        active = self.objective.active(tokens, valid)
        normaliser, active = self.all_sum(torch.stack([normaliser.float(), active.float()])).unbind()
        fixed = valid is None and tokens.own is None and not self.objective.weighs_verdicts
        if normaliser == 0 and self.global_step == 0 and fixed:
            raise ValueError(
                "loss.weight leaves no token of the first rollout, so nothing would ever be learned; weigh more positions, "
                "raise rollout.sampling.max_new_tokens, or set rollout.mask_truncated_completions=false."
            )
        rows = tokens.sample[weight != 0].unique().tolist() or [0]  # type: ignore[index]
        tokens = replace(tokens, weight=weight / normaliser.clamp_min(1e-12))
        return with_old_logprobs(self, Batch(samples, tokens, scores, skip_update=bool(active == 0), active=rows), metrics)

    def update(self, batch: Batch, metrics: StepMetrics) -> None:
        """Gradients of all micro-batches, one clip, one optimizer step, then the teachers' updates."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(schedule, LRScheduler)
        optimizer.zero_grad(set_to_none=True)
        plan = [] if batch.skip_update else self.plan(batch)
        losses = batch.tokens.weight.new_zeros(batch.tokens.weight.shape)
        counts = [sample.trainable for sample in batch.samples]
        for i, (rows, live) in enumerate(plan):
            with self.syncing(last=i == len(plan) - 1), fast_on_cpu(self.student.lm):
                sequences, tokens, scores = batch.micro(rows, self.renderer.tokenizer.pad_token_id)
                try:
                    loss, stats = self.student(sequences, tokens.scaled(live), scores, self.objective)
                except NotFinite as error:
                    raise dump(self, str(error), batch, losses) from error
                # DDP and FSDP average over devices; the normaliser is already global, so undo the average.
                self.manual_backward(loss * self.trainer.world_size)
            losses[packed_index(rows, counts).to(losses.device)] = stats["loss"].to(losses.dtype)
            log_tokens(metrics, loss, stats, tokens, live, scores)
        if plan:
            norm = full_tensor(self.optim.clip(self.student.parameters()))
            if not torch.isfinite(norm):
                raise dump(self, "the gradient is not finite. Lower optim.lr or optim.clip_norm.", batch, losses)
            metrics.mean("train/grad_norm", norm)
        # A skipped step has gradients None, which AdamW ignores; zero gradients would still change weights.
        optimizer.step()
        schedule.step()
        metrics.mean("train/skipped", torch.tensor(float(batch.skip_update), device=self.device))
        if plan:
            log_flops(metrics, self.sizes, batch, [self.teachers[name] for name in batch.scores])
        for teacher in self.teachers.values():
            teacher.after_update()

    def plan(self, batch: Batch) -> list[tuple[list[int], bool]]:
        """Micro-batches of the active samples, equally many on every device; padding ones have weight 0 (False)."""
        lengths = [len(batch.samples[b].token_ids) for b in batch.active]
        plan = [([batch.active[i] for i in part], True) for part in plan_micro_batches(lengths, self.max_tokens_per_microbatch)]
        most = self.trainer.strategy.reduce(torch.tensor(float(len(plan)), device=self.device), reduce_op="max")
        return plan + [(plan[-1][0][-1:], False)] * (int(most) - len(plan))

    def report(self, metrics: StepMetrics) -> dict[str, float]:
        """Reduce metrics over devices, log them, and update the ledger."""
        means, totals = metrics.reduce(self.all_sum)
        self.ledger.add(totals)
        row = means | {k: v / self.rollout.num_iterations for k, v in totals.items() if k == "train/loss"}
        row["train/lr"] = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        row |= {f"cost/{name}": value for name, value in self.ledger.so_far().items()} | getattr(self.generator, "metrics", {})
        self.log_dict(row, logger=False, batch_size=1)
        # Lightning would log after the callbacks, one of which writes the checkpoint, and repeat metrics of earlier steps.
        for logger in self.trainer.loggers:
            logger.log_metrics(row, self.global_step)
            logger.save()
        return row

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum over devices."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def syncing(self, last: bool) -> AbstractContextManager:
        """Exchange gradients on the last micro-batch only; one device has nothing to exchange."""
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return nullcontext() if last else block()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        save(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        restore(self, checkpoint)
