"""Values of a configuration: nodes bind to their targets, and numbers are possible. Usual ones are checked without torch."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_lightning.config import plain
from opd_lightning.config.composing import ENDLESS_SCHEDULES
from opd_lightning.config.limits import LEAST, limited
from opd_lightning.config.names import absent, nearest
from opd_lightning.config.schema import check_binding, check_finite, check_names, check_shape, check_type, targets
from opd_lightning.config.signatures import signature
from opd_lightning.config.trainer_arguments import check_trainer, epochs_of

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes of the usual types of weights; torch is asked for others."""

SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)
"""Schedules of transformers, which is asked for others."""


def check_values(cfg: DictConfig, loading: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Check all values, those first that need no import of torch.

    Args:
        loading: called before users' modules are imported, which may import torch.

    Returns:
        The resolved configuration.

    Raises:
        ValueError: the field, its value and the remedy.
    """
    check_shape(cfg)
    resolved = plain(limited(cfg, LEAST))  # limits that follow the data are set later
    check_names(resolved)
    check_finite(resolved)
    nodes = list(targets(resolved))
    imported = [(place, node) for place, node in nodes if signature(str(node["_target_"])) is None]
    for place, node in (n for n in nodes if n not in imported):
        check_binding(place, node)
    if imported:
        loading()
    for place, node in imported:
        check_binding(place, node)
    check_numbers(resolved)
    check_precision(resolved)
    return resolved


def check_made(cfg: DictConfig) -> None:
    """Raises ValueError if the start model's path is no folder and can be no id of a hub."""
    path = str(OmegaConf.select(cfg, "model.path"))
    own = OmegaConf.select(cfg, "model._target_") == "opd_lightning.models.Pretrained"
    if own and (problem := absent(path)):
        raise ValueError(f"model.path={path}{problem}")


def check_precision(cfg: dict[str, Any]) -> None:
    """Raises ValueError if weights train in a 16-bit type without trainer.precision=bf16-true.

    Float32 weights under bf16-mixed are the float32 masters: 4 bytes a weight, where bfloat16 weights with masters take 6.
    """
    precision, name, adapter = str(cfg["trainer"]["precision"]), cfg["model"].get("dtype", "float32"), cfg["adapter"]
    size = SIZES.get(str(name)) or size_of(str(name))
    if size is not None and size <= 2 and adapter is None and precision != "bf16-true" and not precision.startswith("64"):
        raise ValueError(
            f"model.dtype={name} with trainer.precision={precision} trains weights that round most updates of a usual learning "
            "rate away; keep model.dtype=float32 with trainer.precision=bf16-mixed, or choose adapter=lora, whose factors are "
            "float32 (trainer.precision=bf16-true trains in bfloat16 all the same)."
        )


def size_of(name: str) -> int | None:
    """The bytes of a floating-point type of torch; None for no type, of which the model raises its own error.

    Raises:
        ValueError: it is a type of whole numbers.
    """
    import torch  # takes seconds

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        return None
    if not dtype.is_floating_point:
        raise ValueError(f"model.dtype={name!r} is no torch dtype; choose float32 or bfloat16.")
    return dtype.itemsize


def check_schedule(schedule: object) -> None:
    """Raises ValueError for an unknown schedule."""
    if schedule in SCHEDULES:
        return
    from transformers import SchedulerType  # takes seconds

    if schedule not in (known := [s.value for s in SchedulerType]):
        raise ValueError(f"optim.schedule={schedule} is no schedule{nearest(schedule, known)}")


def check_numbers(cfg: dict[str, Any]) -> None:
    """Raises ValueError for wrong numbers that no constructor checks."""
    check_trainer(cfg["trainer"])
    precision, steps, epochs = str(cfg["trainer"]["precision"]), cfg["trainer"]["max_steps"], epochs_of(cfg["trainer"])
    if precision.startswith("16"):
        raise ValueError(f"trainer.precision={precision} needs loss scaling, which there is none of; use bf16-mixed.")
    check_type("trainer.max_steps", steps, int)
    budgets = [key for key in ("student_tokens", "flops", "seconds") if cfg["budget"][key] is not None]
    endless = bool(budgets) and steps == -1
    if steps is None or (steps < 1 and not endless and not (steps == -1 and epochs)):
        raise ValueError(
            f"trainer.max_steps={steps} must be at least 1, unless trainer.max_epochs, budget.student_tokens, flops or seconds "
            "end it."
        )
    updates = cfg["rollout"]["num_iterations"]
    if updates >= 1 and steps > 0 and steps % updates:
        raise ValueError(f"trainer.max_steps={steps} is no multiple of rollout.num_iterations={updates}; make it one.")
    schedule = cfg["optim"]["schedule"]
    check_schedule(schedule)
    if endless and not epochs and schedule not in ENDLESS_SCHEDULES:
        raise ValueError(
            f"optim.schedule={schedule} needs an end, and budget.{budgets[0]} leaves it open; choose "
            "constant_with_warmup, or set trainer.max_steps too."
        )
    counts = {"data.batch_size": cfg["data"]["batch_size"], "logits_chunk_size": cfg["logits_chunk_size"]}
    for key, value in {**counts, "seed": cfg["seed"], "evaluation.every": cfg["evaluation"]["every"]}.items():
        check_type(key, value, int)
    check_type("data.max_prompt_tokens", cfg["data"]["max_prompt_tokens"], int | None)
    if cfg["data"]["overlong"] not in ("refuse", "drop"):
        raise ValueError(f"data.overlong={cfg['data']['overlong']!r} is unknown; choose refuse or drop.")
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1.")
    if (most := cfg["max_tokens_per_microbatch"]) not in (None, "auto") and not (type(most) is int and most >= 1):
        raise ValueError(f"max_tokens_per_microbatch={most} must be at least 1, or auto, or null for the whole batch at once.")
    if cfg["evaluation"]["every"] < 1:
        raise ValueError(f"evaluation.every={cfg['evaluation']['every']} must be at least 1; evaluation=none switches it off.")
