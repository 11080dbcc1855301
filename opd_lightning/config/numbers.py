"""Checks of numbers in a configuration that no constructor makes."""

from typing import Any

from transformers import SchedulerType

from opd_lightning.config.composing import ENDLESS_SCHEDULES
from opd_lightning.config.names import nearest
from opd_lightning.config.schema import check_type
from opd_lightning.config.trainer_arguments import check_trainer, epochs_of


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
    schedule, schedules = cfg["optim"]["schedule"], [s.value for s in SchedulerType]
    if schedule not in schedules:
        raise ValueError(f"optim.schedule={schedule} is no schedule{nearest(schedule, schedules)}")
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
    check_type("max_tokens_per_microbatch", cfg["max_tokens_per_microbatch"], int | None)
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1.")
    if (most := cfg["max_tokens_per_microbatch"]) is not None and most < 1:
        raise ValueError(f"max_tokens_per_microbatch={most} must be at least 1; null takes the whole batch at once.")
    if cfg["evaluation"]["every"] < 1:
        raise ValueError(f"evaluation.every={cfg['evaluation']['every']} must be at least 1; evaluation=none switches it off.")
