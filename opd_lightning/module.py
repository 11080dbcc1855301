"""The training step: prompts -> rollout -> score -> loss -> update. No method has a line of its own here."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from opd_lightning.contracts import Generator, RolloutPolicy, Teacher
from opd_lightning.data.batching import Batch, pack, packed_index, plan_micro_batches
from opd_lightning.data.step_log import log_rollout, log_tokens, rewards_by_group
from opd_lightning.losses.head import NotFinite
from opd_lightning.losses.objective import Objective
from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.models.flops import Sizes, rollout_flops, update_flops
from opd_lightning.models.optimizer import Optim
from opd_lightning.models.sharding import shard, whole
from opd_lightning.types import Example, Prompts, Sample, Verdict
from opd_lightning.utils.metrics import Ledger, StepMetrics
from opd_lightning.utils.seeds import derive_seed, seeded


class DistillationModule(L.LightningModule):
    """A student that learns from completions: its own or others', scored by a teacher, a verifier or neither.

    Args:
        model: the student's start weights.
        renderer: the student's tokenizer and chat template.
        generator: the engine that writes.
        rollout: who writes the completions; see `opd_lightning.rollout`.
        objective: what is minimised; see `opd_lightning.losses`.
        teachers: such as {"teacher": ...}; those that neither objective nor rollout needs are not loaded.
        optim: optimizer, schedule and clip.
        seed: of everything that is drawn during training.
        verify: judges a completion, for objectives that read rewards and samples that no environment has judged.
        micro_tokens: padded tokens per forward pass; None takes the whole batch at once.
        chunk: rows of logits that exist at a time.
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
        micro_tokens: int | None = None,
        chunk: int = 256,
        adapter: Any = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.renderer, self.generator = model, renderer, generator
        self.rollout, self.objective = rollout, objective
        self.teachers: dict[str, Any] = {name: teachers[name] for name in sorted(objective.teachers | rollout.teachers)}
        self.optim, self.seed, self.verify = optim, seed, verify
        self.micro_tokens, self.chunk, self.adapter = micro_tokens, chunk, adapter
        self.strict_loading = adapter is None  # a checkpoint holds what is trained
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
            self.student = Student(lm, self.chunk).to(self.trainer.strategy.root_device).train()
            self.student.verify_head(f"model.path={self.model.path}")
            self.sizes = Sizes.of(lm)
            self.generator.update_weights(self.student, 0)
            for teacher in self.teachers.values():
                teacher.setup(self.student, self.renderer)
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                shard(self.student, self.device_mesh["data_parallel"], self.objective)

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.student.parameters(), self.trainer.max_steps)
        return [optimizer], [schedule]

    def training_step(self, prompts: Prompts, batch_idx: int) -> dict[str, Any]:
        """One rollout and the updates it is worth.

        Returns:
            What callbacks read as `outputs`: the samples, the scored batch and the step's metrics.
        """
        metrics = StepMetrics(self.device)
        with self.ledger.timing("rollout"):
            seed = derive_seed(self.seed, "rollout", self.global_step, self.global_rank)
            rollout = self.rollout(prompts, seed, self.generator, self.teachers)
            log_rollout(metrics, rollout, rollout_flops(self.sizes, rollout.samples))
        with self.ledger.timing("score"):
            batch = self.score(rollout.samples, metrics)
        for _ in range(self.rollout.updates_per_rollout):
            dropout = derive_seed(self.seed, "update", self.global_step, self.global_rank)
            with self.ledger.timing("update"), seeded(dropout, self.device):
                self.update(batch, metrics)
        self.generator.update_weights(self.student, self.global_step)
        return {"samples": batch.samples, "batch": batch, "metrics": self.report(metrics)}

    def score(self, samples: list[Sample], metrics: StepMetrics) -> Batch:
        """What the loss will know of each token: its weight, its advantage, the teachers' targets."""
        empty = next((sample.example.id for sample in samples if sample.trainable < 1), None)
        if empty is not None:
            raise ValueError(f"the completion of example {empty} is empty; a completion holds EOS at least.")
        tokens = pack(samples, self.device)
        if self.judges:
            samples = self.judge(samples, metrics)
            tokens = replace(tokens, reward=self.per_token([s.verdict.content for s in samples], tokens.sample))  # type: ignore[union-attr]
        if self.objective.rewarded:
            tokens = replace(tokens, advantage=self.per_token(self.advantages(samples, metrics), tokens.sample))
        scores = {name: self.ask(name, samples, metrics) for name in sorted(self.objective.teachers)}
        valid = scores["teacher"].valid if "teacher" in scores else None
        weight, normaliser = self.objective.weights(tokens, len(samples), valid)
        tokens = replace(tokens, weight=weight)
        active = self.objective.active(tokens, valid)
        normaliser, active = self.all_sum(torch.stack([normaliser.float(), active.float()])).unbind()
        if normaliser == 0 and self.global_step == 0 and valid is None:
            raise ValueError(
                "loss.weight leaves no token of the first rollout, so nothing would ever be learned; weigh more positions, "
                "raise rollout.max_new_tokens, or set rollout.truncated=keep."
            )
        assert tokens.sample is not None
        rows = tokens.sample[weight != 0].unique().tolist() or [0]
        tokens = replace(tokens, weight=weight / normaliser.clamp_min(1e-12))
        batch = Batch(samples, tokens, scores, skip_update=bool(active == 0), active=rows)
        if self.rollout.updates_per_rollout == 1 or not self.objective.compares_updates or batch.skip_update:
            return batch
        forward = update_flops(self.sizes, [samples[b] for b in rows])["forward"]
        metrics.total("flops/forward", forward)
        return self.remember(batch)

    def update(self, batch: Batch, metrics: StepMetrics) -> None:
        """Gradients of all micro-batches, one clip, one optimizer step, then the teachers follow."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(schedule, LRScheduler)
        optimizer.zero_grad(set_to_none=True)
        plan = [] if batch.skip_update else self.plan(batch)
        losses = batch.tokens.weight.new_zeros(batch.tokens.weight.shape)
        counts = [sample.trainable for sample in batch.samples]
        for i, (rows, live) in enumerate(plan):
            with self.syncing(last=i == len(plan) - 1):
                sequences, tokens, scores = batch.micro(rows, self.renderer.tokenizer.pad_token_id)
                try:
                    loss, stats = self.student(sequences, tokens.scaled(live), scores, self.objective)
                except NotFinite as error:
                    raise self.broken(str(error), batch, losses) from error
                # DDP and FSDP average over devices; the normaliser is already global, so undo the average.
                self.manual_backward(loss * self.trainer.world_size)
            losses[packed_index(rows, counts).to(losses.device)] = stats["loss"].to(losses.dtype)
            log_tokens(metrics, loss, stats, tokens, live)
        if plan:
            norm = whole(self.optim.clip(self.student.parameters()))
            if not torch.isfinite(norm):
                raise self.broken("the gradient is not finite. Lower optim.lr or optim.clip_norm.", batch, losses)
            metrics.mean("train/grad_norm", norm)
        # A skipped step has no gradients at all: AdamW leaves such weights alone, and would move them on zero gradients.
        optimizer.step()
        schedule.step()
        metrics.mean("train/skipped", torch.tensor(float(batch.skip_update), device=self.device))
        if plan:
            active = [batch.samples[b] for b in batch.active]
            flops = update_flops(self.sizes, active)
            positions = sum(sample.trainable for sample in active)
            flops["teacher"] = sum(self.teachers[name].logit_flops(positions) for name in batch.scores)
            for part, n in flops.items():
                metrics.total(f"flops/{part}", n)
        for teacher in self.teachers.values():
            teacher.after_update()

    def plan(self, batch: Batch) -> list[tuple[list[int], bool]]:
        """Micro-batches of the active samples, as many on every device; those that only fill up count nothing (False)."""
        lengths = [len(batch.samples[b].token_ids) for b in batch.active]
        plan = [([batch.active[i] for i in part], True) for part in plan_micro_batches(lengths, self.micro_tokens)]
        most = self.trainer.strategy.reduce(torch.tensor(float(len(plan)), device=self.device), reduce_op="max")
        return plan + [(plan[-1][0][-1:], False)] * (int(most) - len(plan))

    @property
    def judges(self) -> bool:
        """Does anyone ask for verdicts on the samples?"""
        contexts = [part.context for teacher in self.teachers.values() for part in teacher.parts]
        return self.objective.rewarded or any(context.reads_attempts for context in contexts)

    def judge(self, samples: list[Sample], metrics: StepMetrics) -> list[Sample]:
        """The samples with verdicts: the environment's, else the task's."""
        assert self.verify is not None, "an objective that reads rewards, and a context that reads attempts, need a verifier"
        texts = self.renderer.decode_all([sample.completion_ids for sample in samples])
        judged = [
            s if s.verdict is not None else replace(s, verdict=self.verify(s.example, text))
            for s, text in zip(samples, texts, strict=True)
        ]
        metrics.mean("rollout/reward", torch.tensor([s.verdict.content for s in judged], device=self.device))  # type: ignore[union-attr]
        return judged

    def advantages(self, samples: list[Sample], metrics: StepMetrics) -> Tensor:
        """Advantages [B] of judged samples, whose groups are of one size."""
        groups = rewards_by_group(samples, self.rollout.sampling.n).to(self.device)
        metrics.mean("rollout/dead_groups", (groups == groups[:, :1]).all(1).float())
        gathered = self.all_gather(groups)  # a baseline may be the whole batch's
        assert isinstance(gathered, Tensor)
        first = self.global_rank * len(groups)
        everywhere = gathered.reshape(-1, groups.shape[1])
        return self.objective.advantages(everywhere)[first : first + len(groups)].flatten()

    def per_token(self, values: Any, sample: Tensor | None) -> Tensor:
        """Numbers [B] of samples on their tokens [N]."""
        return torch.as_tensor(values, device=self.device)[sample]

    def ask(self, name: str, samples: list[Sample], metrics: StepMetrics) -> Any:
        """A teacher's scores of the samples, and what they cost."""
        scores = self.teachers[name].score(samples, self.micro_tokens)
        metrics.total(f"{name}_tokens", scores.cost.tokens)
        metrics.total("flops/teacher", scores.cost.flops)
        for key, values in scores.metrics.items():
            metrics.mean(f"rollout/{name}_{key}", values)
        highest = max(int(sample.token_ids[sample.loss_mask].max()) for sample in samples)
        if highest >= scores.vocabulary:
            raise ValueError(
                f"a completion holds the id {highest}, which {name} does not have (its vocabulary is {scores.vocabulary}); "
                "choose models of one family."
            )
        return scores

    def remember(self, batch: Batch) -> Batch:
        """The batch with each token's log-probability before the first update on it."""
        old = batch.tokens.weight.new_zeros(batch.tokens.ids.shape)
        counts = [sample.trainable for sample in batch.samples]
        with self.student.evaluating():  # the ratio is between policies, not between draws of dropout
            for rows, _ in self.plan(batch):
                sequences, tokens, _ = batch.micro(rows, self.renderer.tokenizer.pad_token_id)
                _, stats = self.student(sequences, tokens, {}, self.objective.log_prob)
                old = old.to(stats["loss"].dtype)
                old[packed_index(rows, counts).to(old.device)] = stats["loss"]
        return replace(batch, tokens=replace(batch.tokens, old_logprob=old))

    def broken(self, reason: str, batch: Batch, losses: Tensor) -> ValueError:
        """What to raise when an update cannot be made; the batch is saved for a look at it, one file per device."""
        path = Path(self.trainer.default_root_dir) / f"nonfinite-step-{self.global_step + 1}-rank-{self.global_rank}.pt"
        texts = self.renderer.decode_all([sample.completion_ids for sample in batch.samples])
        torch.save({"step": self.global_step + 1, **batch.describe(texts), "loss": losses.cpu()}, path)
        return ValueError(
            f"update {self.global_step + 1}: {reason} The weights are still those before it, the batch is in {path}, and the "
            "last rows of metrics.csv show how it came."
        )

    def report(self, metrics: StepMetrics) -> dict[str, float]:
        """One reduction over devices, one log call, and the ledger."""
        means, totals = metrics.reduce(self.all_sum)
        self.ledger.add(totals)
        loss = {k: v / self.rollout.updates_per_rollout for k, v in totals.items() if k == "train/loss"}
        rate = {"train/lr": float(self.trainer.optimizers[0].param_groups[0]["lr"])}
        cost = {f"cost/{name}": value for name, value in self.ledger.so_far().items()}
        row = means | loss | rate | cost
        self.log_dict(row, logger=False, batch_size=1)
        # Lightning would log after the callbacks, one of which writes the checkpoint, and again what only earlier steps had.
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
        checkpoint["ledger"] = self.ledger.state_dict()
        checkpoint["teachers"] = {name: teacher.state_dict() for name, teacher in self.teachers.items()}
        if self.adapter is not None:
            trained = {f"student.{name}" for name, p in self.student.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.check_foreign(checkpoint)
        self.ledger.load_state_dict(checkpoint["ledger"])
        for name, teacher in self.teachers.items():
            teacher.load_state_dict(checkpoint["teachers"][name])

    def check_foreign(self, checkpoint: dict) -> None:
        """Raises ValueError if a checkpoint is of another program, method or model."""
        if "ledger" not in checkpoint or set(checkpoint.get("teachers", {})) != set(self.teachers):
            raise ValueError("checkpoints/last.ckpt is of another program or method; remove it, or choose another study.name.")
        own = {name: value.shape for name, value in self.state_dict().items()}
        for name, value in checkpoint.get("state_dict", {}).items():  # FSDP2 reads it apart
            if own.get(name) != value.shape:
                raise ValueError(
                    f"checkpoints/last.ckpt is of another model: its {name} is {tuple(value.shape)}; remove it, or choose "
                    "another study.name."
                )
