"""The walk: prompts -> rollout -> score -> loss -> update. No method has a line of its own here."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.batching import packed_index, plan_micro_batches
from opd_lightning.losses.head import NotFinite
from opd_lightning.losses.objective import Objective
from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.models.flops import Sizes, rollout_flops, update_flops
from opd_lightning.models.optimizer import Optim
from opd_lightning.models.sharding import shard, whole
from opd_lightning.teachers.local import Scorer, ask
from opd_lightning.types import Attempt, Batch, Example, Prompts, Rollout, RolloutPolicy, Tokens, Verdict
from opd_lightning.utils.metrics import Ledger, StepMetrics
from opd_lightning.utils.seeds import derive_seed, seeded

POSITIONS = (0, 4, 16, 64, 256, 1024, 10**9)
"""Where the parts of a completion begin whose KL is logged apart: contexts leak their phrasing into the first tokens."""


class DistillationModule(L.LightningModule):
    """A student that learns from completions: its own or others', scored by a teacher, a verifier or neither.

    Args:
        model: the student's start weights.
        tokenizer: the student's.
        rollout: who writes the completions; see `opd_lightning.rollout`.
        objective: what is minimised; see `opd_lightning.losses`.
        scorers: the other models, such as {"teacher": ...}; those that neither objective nor rollout asks are not loaded.
        optim: optimizer, schedule and clip.
        seed: of everything that is drawn during training.
        verify: judges a completion, for objectives that read rewards.
        micro_tokens: padded tokens per forward pass; None takes the whole batch at once.
        chunk: rows of logits that exist at a time.
        adapter: a PEFT configuration; None trains all weights.
    """

    def __init__(
        self,
        model: Pretrained,
        tokenizer: PreTrainedTokenizerBase,
        rollout: RolloutPolicy,
        objective: Objective,
        scorers: Mapping[str, Scorer],
        optim: Optim,
        seed: int,
        verify: Callable[[Example, str], Verdict] | None = None,
        micro_tokens: int | None = None,
        chunk: int = 256,
        adapter: Any = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.tokenizer, self.rollout, self.objective = model, tokenizer, rollout, objective
        self.scorers = {name: scorers[name] for name in sorted(objective.sources | rollout.sources)}
        self.optim, self.seed, self.verify = optim, seed, verify
        self.micro_tokens, self.chunk, self.adapter = micro_tokens, chunk, adapter
        self.strict_loading = adapter is None  # a checkpoint holds what is trained
        self.ledger = Ledger()
        self.row: dict[str, float] = {}
        self.latest: Rollout | None = None
        self.batch: Batch | None = None
        self.stopped_by: str | None = None  # what ended training before max_steps, set by callbacks
        self.signal: int | None = None  # the signal that asked for it
        self.student: Student = None  # type: ignore[assignment]
        self.sizes: Sizes = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        """Load the student and attach the teachers, on their device and before a checkpoint is restored."""
        if self.student is None:
            lm = self.model.model()
            if self.adapter is not None:
                with seeded(derive_seed(self.seed, "adapter"), lm.device):
                    adapters.add(lm, self.adapter)
            self.student = Student(lm, self.chunk).to(self.trainer.strategy.root_device).train()
            self.student.verify_head(f"model.path={self.model.path}")
            self.sizes = Sizes.of(lm)
            for scorer in self.scorers.values():
                scorer.weights.attach(self.student)
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                shard(self.student, self.device_mesh["data_parallel"], self.objective)

    def configure_optimizers(self):
        optimizer, schedule = self.optim.build(self.student.parameters(), self.trainer.max_steps)
        return [optimizer], [schedule]

    def training_step(self, prompts: Prompts, batch_idx: int) -> None:
        """One rollout and the updates it is worth."""
        metrics = StepMetrics()
        with self.ledger.timing("rollout"):
            seed = derive_seed(self.seed, "rollout", self.global_step, self.global_rank)
            rollout = self.latest = self.rollout(self.student, prompts, seed, self.scorers)
            rollout.describe(metrics)
            metrics.total("flops/rollout", rollout.lengths.new_tensor(rollout_flops(self.sizes, rollout)))
        with self.ledger.timing("score"):
            batch = self.batch = self.score(rollout, metrics)
        for _ in range(self.rollout.updates_per_rollout):
            dropout = derive_seed(self.seed, "update", self.global_step, self.global_rank)
            with self.ledger.timing("update"), seeded(dropout, self.device):
                self.update(batch, metrics)
        self.report(metrics)

    def score(self, rollout: Rollout, metrics: StepMetrics) -> Batch:
        """What the loss will know of each token: its weight, its advantage, the teachers' distributions on it."""
        if int(rollout.lengths.min()) < 1:
            empty = rollout.prompts.examples[int(rollout.lengths.argmin())].id
            raise ValueError(f"the completion of example {empty} is empty; a completion holds EOS at least.")
        attempts = self.judge(rollout, metrics) if self.judges else None
        advantages = self.reward(rollout, attempts, metrics) if self.objective.rewarded else None
        asked = {name: self.scorers[name] for name in sorted(self.objective.sources)}
        sources, told = ask(asked, self.student, rollout, self.micro_tokens, attempts, metrics)
        if told is not None and self.objective.terms == {"divergence"}:
            rollout = replace(rollout, counts=rollout.counts & told)
        weight, normaliser = self.objective.weights(rollout)
        active = self.objective.active(weight, advantages, told)
        normaliser, active = self.all_sum(torch.stack([normaliser.float(), active.float()])).unbind()
        mask, silent = rollout.mask, bool(active == 0)
        if normaliser == 0 and self.global_step == 0 and told is None:
            raise ValueError(
                "loss.weight leaves no token of the first rollout, so nothing would ever be learned; weigh more positions, "
                "raise rollout.max_new_tokens, or set rollout.truncated=keep."
            )
        position = torch.arange(rollout.ids.shape[1], device=self.device).expand_as(mask)
        tokens = Tokens(
            ids=rollout.ids[mask],
            position=position[mask],
            weight=(weight / normaliser.clamp_min(1e-12))[mask],
            advantage=None if advantages is None else advantages[:, None].expand_as(mask)[mask],
            sampler_logprob=None if rollout.logprobs is None else rollout.logprobs[mask],
            told=None if told is None else told[:, None].expand_as(mask)[mask],
        )
        rows = (weight != 0).any(1).nonzero().flatten().tolist() or [0]
        batch = Batch(rollout, tokens, sources, silent, rows)
        repeated = self.rollout.updates_per_rollout > 1 and self.objective.compares_updates and not silent
        if not repeated:
            return batch
        metrics.total("flops/forward", rollout.lengths.new_tensor(update_flops(self.sizes, batch, [])["forward"]))
        return self.remember(batch)

    def update(self, batch: Batch, metrics: StepMetrics) -> None:
        """Gradients of all micro-batches, one clip, one optimizer step, then the teachers follow."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(schedule, LRScheduler)
        optimizer.zero_grad(set_to_none=True)
        plan = [] if batch.silent else self.plan(batch)
        losses = batch.tokens.weight.new_zeros(batch.tokens.weight.shape)
        for i, (rows, live) in enumerate(plan):
            with self.syncing(last=i == len(plan) - 1):
                sequences, tokens, sources = batch.micro(rows, self.tokenizer.pad_token_id)
                try:
                    loss, stats = self.student(sequences, tokens.scaled(live), sources, self.objective)
                except NotFinite as error:
                    raise self.broken(str(error), batch, losses) from error
                # DDP and FSDP average over devices; the normaliser is already global, so undo the average.
                self.manual_backward(loss * self.trainer.world_size)
            metrics.total("train/loss", loss)
            losses[packed_index(rows, batch.rollout.lengths)] = stats["loss"].to(losses.dtype)
            counted = (tokens.weight > 0) & live
            for name, values in stats.items():
                metrics.mean(f"train/{name}", values, where=counted & ~values.isnan())
            for low, high in pairwise(POSITIONS):
                for name in sorted({"forward_kl", "reverse_kl", "top1_agreement"} & set(stats)):
                    inside = counted & (tokens.position >= low) & (tokens.position < high) & ~stats[name].isnan()
                    metrics.mean(f"position/{name}_from_{low}", stats[name], where=inside)
        if plan:
            norm = whole(self.optim.clip(self.student.parameters()))
            if not torch.isfinite(norm):
                raise self.broken("the gradient is not finite. Lower optim.lr or optim.clip_norm.", batch, losses)
            metrics.mean("train/grad_norm", norm)
        # A silent step has no gradients at all: AdamW leaves such weights alone, and would move them on zero gradients.
        optimizer.step()
        schedule.step()
        metrics.mean("train/skipped", torch.tensor(float(batch.silent), device=self.device))
        if plan:
            others = [self.scorers[name].weights.sizes(self.student) for name in batch.sources]
            for part, flops in update_flops(self.sizes, batch, others).items():
                metrics.total(f"flops/{part}", batch.rollout.lengths.new_tensor(flops))
        for scorer in self.scorers.values():
            scorer.weights.after_update(self.student)

    def plan(self, batch: Batch) -> list[tuple[list[int], bool]]:
        """Micro-batches of the rows that count, as many on every device; those that only fill up count nothing (False)."""
        prompts, lengths = batch.rollout.prompts.ids, batch.rollout.lengths.tolist()
        parts = plan_micro_batches([len(prompts[b]) + lengths[b] for b in batch.rows], self.micro_tokens)
        plan = [([batch.rows[i] for i in part], True) for part in parts]
        most = self.trainer.strategy.reduce(torch.tensor(float(len(plan)), device=self.device), reduce_op="max")
        return plan + [(plan[-1][0][-1:], False)] * (int(most) - len(plan))

    @property
    def judges(self) -> bool:
        """Does anyone ask for verdicts on the rollout?"""
        return self.objective.rewarded or any(scorer.context.reads_attempts for scorer in self.scorers.values())

    def judge(self, rollout: Rollout, metrics: StepMetrics) -> list[Attempt]:
        """The B completions with their verdicts."""
        assert self.verify is not None, "an objective that reads rewards, and a context that reads attempts, need a verifier"
        texts = rollout.texts(self.tokenizer)
        attempts = [Attempt(t, self.verify(e, t)) for e, t in zip(rollout.prompts.examples, texts, strict=True)]
        metrics.mean("rollout/reward", torch.tensor([a.verdict.content for a in attempts], device=self.device))
        return attempts

    def reward(self, rollout: Rollout, attempts: list[Attempt] | None, metrics: StepMetrics) -> Tensor:
        """Advantages [B] of judged completions."""
        assert attempts is not None
        rewards = torch.tensor([attempt.verdict.content for attempt in attempts], device=self.device)
        groups = rewards.view(-1, rollout.samples)
        metrics.mean("rollout/dead_groups", (groups == groups[:, :1]).all(1).float())
        gathered = self.all_gather(groups)  # a baseline may be the whole batch's
        assert isinstance(gathered, Tensor)
        everywhere = gathered.reshape(-1, rollout.samples)
        first = self.global_rank * len(groups)
        return self.objective.advantages(everywhere)[first : first + len(groups)].flatten()

    def remember(self, batch: Batch) -> Batch:
        """The batch with each token's log-probability before the first update on it."""
        old: Tensor | None = None
        with self.student.evaluating():  # the ratio is between policies, not between draws of dropout
            for rows, _ in self.plan(batch):
                sequences, tokens, _ = batch.micro(rows, self.tokenizer.pad_token_id)
                _, stats = self.student(sequences, tokens, {}, self.objective.log_prob)
                old = stats["loss"].new_zeros(batch.tokens.ids.shape) if old is None else old
                old[packed_index(rows, batch.rollout.lengths)] = stats["loss"]
        return replace(batch, tokens=replace(batch.tokens, old_logprob=old))

    def broken(self, reason: str, batch: Batch, losses: Tensor) -> ValueError:
        """What to raise when an update cannot be made; the batch is saved for a look at it, one file per device."""
        path = Path(self.trainer.default_root_dir) / f"nonfinite-step-{self.global_step + 1}-rank-{self.global_rank}.pt"
        torch.save({"step": self.global_step + 1, **batch.describe(self.tokenizer), "loss": losses.cpu()}, path)
        return ValueError(
            f"update {self.global_step + 1}: {reason} The weights are still those before it, the batch is in {path}, and the "
            "last rows of metrics.csv show how it came."
        )

    def report(self, metrics: StepMetrics) -> None:
        """One reduction over devices, one log call, and the ledger."""
        means, totals = metrics.reduce(self.all_sum)
        self.ledger.add(totals)
        loss = {k: v / self.rollout.updates_per_rollout for k, v in totals.items() if k == "train/loss"}
        rate = {"train/lr": float(self.trainer.optimizers[0].param_groups[0]["lr"])}
        cost = {f"cost/{name}": value for name, value in self.ledger.so_far().items()}
        self.row = means | loss | rate | cost
        self.log_dict(self.row, logger=False, batch_size=1)
        # Lightning would log after the callbacks, one of which writes the checkpoint, and again what only earlier steps had.
        for logger in self.trainer.loggers:
            logger.log_metrics(self.row, self.global_step)
            logger.save()

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum over devices."""
        return self.trainer.strategy.reduce(value, reduce_op="sum")

    def syncing(self, last: bool) -> AbstractContextManager:
        """Exchange gradients on the last micro-batch only; one device has nothing to exchange."""
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        return nullcontext() if last else block()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["ledger"] = self.ledger.state_dict()
        checkpoint["teachers"] = {name: scorer.weights.state_dict() for name, scorer in self.scorers.items()}
        if self.adapter is not None:
            trained = {f"student.{name}" for name, p in self.student.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.check_foreign(checkpoint)
        self.ledger.load_state_dict(checkpoint["ledger"])
        for name, scorer in self.scorers.items():
            scorer.weights.load_state_dict(checkpoint["teachers"][name])

    def check_foreign(self, checkpoint: dict) -> None:
        """Raises ValueError if a checkpoint is of another program, method or model."""
        if "ledger" not in checkpoint or set(checkpoint.get("teachers", {})) != set(self.scorers):
            raise ValueError("checkpoints/last.ckpt is of another program or method; remove it, or choose another study.name.")
        own = {name: value.shape for name, value in self.state_dict().items()}
        for name, value in checkpoint.get("state_dict", {}).items():  # FSDP2 reads it apart
            if own.get(name) != value.shape:
                raise ValueError(
                    f"checkpoints/last.ckpt is of another model: its {name} is {tuple(value.shape)}; remove it, or choose "
                    "another study.name."
                )
