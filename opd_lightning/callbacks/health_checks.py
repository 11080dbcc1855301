"""HealthChecks: bounds on numbers that show a failing run before its loss does, each with a remedy."""

import logging
from typing import Any

import lightning as L
import torch

from opd_lightning.callbacks.diagnostics import repetition
from opd_lightning.contracts import Renderer

log = logging.getLogger(__name__)

REMEDIES = {
    "kl": "the student runs away from its teacher; lower optim.lr, or use another loss/divergence",
    "length": "completions grow without end; lower rollout.sampling.max_new_tokens, use "
    "rollout.mask_truncated_completions=true, or look at EOS (check)",
    "entropy": "the student hardly samples any more and explores nothing; lower optim.lr, or add loss/reference=reverse_kl",
    "frac_reward_zero_std": "all samples of a prompt score alike, so that nothing is learned; choose easier or harder "
    "prompts, or more "
    "rollout.num_generations",
    "repetition": "completions repeat themselves; lower optim.lr, or use loss/divergence=forward_kl",
    "truncated": "most completions never end with {ends}, at which rollouts stop; if the first completions did, the teacher "
    "ends replies with another token, or optim.lr is too high: see the results on replies of check, and model.end_token; "
    "otherwise begin with SFT, raise rollout.sampling.max_new_tokens, or use rollout.mask_truncated_completions=true",
}


class HealthChecks(L.Callback):
    """Warns, or stops, when a number has been out of bounds for several updates in a row.

    A loss or gradient that is not finite needs no check: the training step stops before the weights are changed.

    Args:
        kl: largest KL(student || teacher), nats per token.
        length: largest mean length, as a multiple of that of the first rollout.
        entropy: least entropy of the student, nats per token; only where completions are sampled from it.
        frac_reward_zero_std: largest share of prompts whose samples have equal rewards.
        repetition: largest share of repeated 4-grams of tokens.
        truncated: largest share of completions that ran into the token limit.
        patience: rollouts in a row, each with rollout.num_iterations updates.
        stop: end the run with an error instead of a warning. Null as a bound switches a check off.
    """

    def __init__(
        self,
        kl: float | None = 20.0,
        length: float | None = 4.0,
        entropy: float | None = 1e-4,
        frac_reward_zero_std: float | None = 0.98,
        repetition: float | None = 0.6,
        truncated: float | None = 0.95,
        patience: int = 10,
        stop: bool = False,
    ):
        if patience < 1:
            raise ValueError(f"callbacks.health_checks.patience={patience} must be at least 1 update.")
        self.bounds = {"kl": kl, "length": length, "entropy": entropy, "frac_reward_zero_std": frac_reward_zero_std}
        self.bounds |= {"repetition": repetition, "truncated": truncated}
        for name, bound in self.bounds.items():
            if bound is not None and not bound > 0:
                raise ValueError(f"callbacks.health_checks.{name}={bound} must be positive; null switches it off.")
        self.patience, self.stop = patience, stop
        self.beyond = dict.fromkeys(REMEDIES, 0)
        self.first_length: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: object) -> None:
        """Check the step.

        Raises:
            ValueError: a check stops the run.
        """
        for name, value in self.watched(trainer, module, outputs).items():
            bound = self.bounds[name]
            if bound is None:
                continue
            out = value < bound if name == "entropy" else value > bound
            self.beyond[name] = self.beyond[name] + 1 if out else 0
            if self.beyond[name] == self.patience:
                remedy = REMEDIES[name].format(ends=ends_of(module.renderer))
                message = (
                    f"update {trainer.global_step}: {name} has been {value:.3g} (bound {bound:g}) for {self.patience} updates"
                )
                if self.stop:
                    raise ValueError(f"{message}: {remedy}. callbacks.health_checks.stop=false goes on all the same.")
                log.warning(f"warning: {message}: {remedy}.")

    def watched(self, trainer: L.Trainer, module: Any, outputs: Any) -> dict[str, float]:
        """The checked numbers of this step, as far as they were measured."""
        metrics = outputs["metrics"]
        if module.rollout.sampling.n < 2:  # a single sample has no spread
            metrics = {name: value for name, value in metrics.items() if name != "rollout/frac_reward_zero_std"}
        keys = {
            "frac_reward_zero_std": "rollout/frac_reward_zero_std",
            "truncated": "rollout/truncated",
            "kl": "train/reverse_kl",
        }
        sampled = module.rollout.student_writes
        values = {name: metrics[key] for name, key in keys.items() if key in metrics and (sampled or name == "kl")}
        if not sampled:
            return values
        if "train/student_entropy" in metrics:
            values["entropy"] = metrics["train/student_entropy"]
        self.first_length = self.first_length or metrics["rollout/length"]
        repeated = [repetition(sample.token_ids[sample.loss_mask].tolist()) for sample in outputs["samples"]]
        share = sum(repeated) / len(repeated)
        if trainer.world_size > 1:  # the other numbers are means over devices already; all must stop at the same step
            share = float(trainer.strategy.reduce(torch.tensor(share, device=module.device), reduce_op="mean"))
        return values | {"length": metrics["rollout/length"] / self.first_length, "repetition": share}

    def state_dict(self) -> dict[str, Any]:
        """The updates out of bounds, for the checkpoint."""
        return {"beyond": self.beyond, "first_length": self.first_length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the updates out of bounds from a checkpoint."""
        self.beyond, self.first_length = dict(state["beyond"]), state["first_length"]


def ends_of(renderer: Renderer) -> str:
    """The tokens that end a reply, as text."""
    return " or ".join(repr(str(renderer.tokenizer.convert_ids_to_tokens(i))) for i in renderer.end_ids)
