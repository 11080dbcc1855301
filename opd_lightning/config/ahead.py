"""Check of rollouts that are written ahead of training, which not every engine, rollout and loss allows."""

from typing import Any

from opd_lightning.config.names import find


def check_ahead(cfg: dict[str, Any], rollout: Any, support: Any) -> None:
    """Check that what is chosen allows `rollout.async_steps`.

    Args:
        rollout, support: built from their nodes; support may be None.

    Raises:
        ValueError: it does not.
    """
    ahead = getattr(rollout, "async_steps", 0)
    if not ahead:
        return
    place, engine = f"rollout.async_steps={ahead}", find(cfg["generator"]["_target_"])
    if not getattr(engine, "holds_weights", False):
        raise ValueError(
            f"{place}: {engine.__name__} writes with the weights that are trained, so it cannot write meanwhile; choose an "
            "engine with a copy of them, such as generator=vllm, or rollout.async_steps=0."
        )
    if cfg["generator"].get("sleep"):
        raise ValueError(
            f"{place}: generator.sleep=true gives the engine's memory to training between rollouts, and there is no such "
            "time; set generator.sleep=false, or rollout.async_steps=0."
        )
    if rollout.teachers:
        raise ValueError(
            f"{place}: a teacher writes too, with the engine that holds the student's weights, or with weights that follow "
            "those in training; set rollout.async_steps=0."
        )
    loss = cfg["loss"]
    sampled = {
        "loss.policy_gradient": loss["policy_gradient"],
        "loss.vocab_support": loss["vocab_support"] if support is not None and support.needs_own_samples else None,
    }
    for term, node in sampled.items():
        if node and node.get("importance_sampling_cap") is None:
            raise ValueError(
                f"{place}: {term} takes the samples for the current weights' own, and they are by older ones; correct for it "
                f"({term}.importance_sampling_cap=2), or set rollout.async_steps=0."
            )
