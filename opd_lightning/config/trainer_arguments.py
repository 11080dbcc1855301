"""The arguments of Lightning's Trainer: each is honoured, or refused with the option that replaces it.

Training is one endless stream of rollouts with manual optimization, so arguments on Lightning's epochs, validation batches or
checkpoints would be ignored in silence.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from opd_lightning.config.names import find

NOTHING: tuple[Any, ...] = (None,)

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": (
        (None, 1),
        "an update always takes data.batch_size prompts; max_tokens_per_microbatch splits it for memory",
    ),
    "gradient_clip_val": ((None, 0, 0.0), "the gradient's norm is clipped by optim.clip_norm"),
    "gradient_clip_algorithm": (NOTHING, "the gradient's norm is clipped by optim.clip_norm"),
    "fast_dev_run": ((None, False, 0), "for a trial run set trainer.max_steps=1 and study.name=trial"),
    "min_epochs": (NOTHING, "a run ends at trainer.max_steps, trainer.max_epochs or a budget, and not later"),
    "min_steps": (NOTHING, "a run ends at trainer.max_steps, trainer.max_epochs or a budget, and not later"),
    "max_time": (NOTHING, "budget.seconds ends a run by the clock of its updates"),
    "limit_train_batches": (
        (None, 1.0),
        "trainer.max_steps sets how many updates there are, task.n_train how many examples",
    ),
    "overfit_batches": ((None, 0, 0.0), "task.n_train=<data.batch_size> trains on the same batch again and again"),
    "limit_val_batches": ((None, 1.0), "task.n_eval and evaluation.suite.<name>.n set how many prompts are evaluated"),
    "limit_test_batches": ((None, 1.0), "task.n_eval and evaluation.suite.<name>.n set how many prompts are evaluated"),
    "limit_predict_batches": ((None, 1.0), "python -m opd_lightning.evaluate is how a model is read without training"),
    "val_check_interval": ((None, 1.0), "evaluation.every sets the updates between evaluations"),
    "check_val_every_n_epoch": ((None, 1), "evaluation.every sets the updates between evaluations"),
    "num_sanity_val_steps": ((None, 0), "the evaluation before training is always whole; evaluation=none leaves it out"),
    "log_every_n_steps": ((None, 1), "every rollout has its row in metrics.csv"),
    "enable_checkpointing": ((None, False), "callbacks.checkpoint.every and callbacks.checkpoint.keep set the checkpoints"),
    "use_distributed_sampler": ((None, False), "each device has its share of the prompts already"),
    "reload_dataloaders_every_n_epochs": ((None, 0), "prompts are shuffled anew for every pass through the data already"),
    "inference_mode": ((None, True), "evaluations of evaluation.suite never keep gradients"),
    "barebones": ((None, False), "callbacks.<name>=null, logger=none and evaluation=none switch parts off"),
    "model_registry": (NOTHING, "python -m opd_lightning.export writes the model"),
    "logger": (NOTHING, "logger=wandb or another option of logger chooses it"),
    "callbacks": (NOTHING, "callbacks.<name>._target_=... adds one"),
    "default_root_dir": (NOTHING, "output_dir and study.name set a run's folder"),
}
"""Refused arguments: the values that change nothing, and the option that replaces them."""


def refusal(name: str, value: Any) -> str | None:
    """The error if an argument of Lightning's Trainer has a value that would be ignored."""
    allowed, remedy = REFUSED.get(name, (None, ""))
    if allowed is None or any(value == other and type(value) is type(other) for other in allowed):
        return None
    return f"trainer.{name}={value} is not how a run is set here: {remedy}."


BY_LIGHTNING = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""Arguments that Lightning refuses for a module with manual optimization, without a remedy."""


def check_optimization(arguments: dict[str, Any]) -> None:
    """Raises ValueError if an argument of `BY_LIGHTNING` asks for what options set here."""
    for name, value in arguments.items():
        if sentence := refusal(name, value):
            raise ValueError(sentence)


def ignored(names: Iterable[str], options: Any, trainer: Any) -> Iterator[str]:
    """Warnings of options under `trainer` that a user's own Trainer does not follow.

    Args:
        names: of the options that the user set.
        options: the configuration's.
        trainer: the Trainer of Lightning.
    """
    for name in names:
        own = trainer.world_size if name == "devices" else getattr(trainer, name, None)
        # A Trainer makes objects of other arguments, or does not keep them: what it was given is not known.
        if isinstance(own, int | float | str) and str(own) != str(options.get(name)):
            yield (
                f"overrides set trainer.{name}={options.get(name)}, and this Trainer has {name}={own}, which holds; give it "
                "there, or make the Trainer with d.trainer(), which follows overrides."
            )


def check_trainer(trainer: dict[str, Any]) -> None:
    """Check that no argument of Lightning's Trainer would be ignored.

    Raises:
        ValueError: one would.
    """
    for name, value in trainer.items():
        if sentence := refusal(name, value):
            raise ValueError(sentence)
    epochs = trainer.get("max_epochs")
    if not (epochs is None or type(epochs) is int) or (epochs is not None and epochs < 1 and epochs != -1):
        raise ValueError(f"trainer.max_epochs={epochs} should be a whole number of passes through the data; -1 sets no limit.")
    for plugin in plugins(trainer.get("plugins")):
        from lightning.pytorch.plugins import CheckpointIO  # takes seconds

        target = find(plugin)
        if isinstance(target, type) and issubclass(target, CheckpointIO):
            raise ValueError(f"trainer.plugins: {plugin} would write nothing, for callbacks.checkpoint does; leave it out.")


def plugins(node: Any) -> Iterator[str]:
    """The targets of trainer.plugins."""
    for part in node if isinstance(node, list) else [node]:
        if isinstance(part, dict) and isinstance(part.get("_target_"), str):
            yield part["_target_"]


def processes_of(trainer: Any) -> int | None:
    """The processes of a run, on all nodes; None where trainer.devices leaves their number open."""
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    return devices * nodes if type(devices) is int and type(nodes) is int and devices > 0 else None


def epochs_of(trainer: Any) -> int | None:
    """The passes through the data that end a run; None sets no limit."""
    epochs = trainer.get("max_epochs")
    return None if epochs in (None, -1) else int(epochs)


def last_update(trainer: Any, examples: int, batch_size: int, num_iterations: int) -> int:
    """The update that ends training: max_steps, or the end of max_epochs passes through the data, whichever is earlier.

    Batches cross the end of a pass, so two passes through 10 examples in batches of 4 are 5 rollouts.
    """
    steps, epochs = int(trainer["max_steps"]), epochs_of(trainer)
    if epochs is None:
        return steps
    passes = math.ceil(epochs * examples / batch_size) * num_iterations
    return min(steps, passes) if steps > 0 else passes
