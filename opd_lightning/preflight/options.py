"""Options of an adapter and an optimizer that their libraries would refuse only after the models are loaded."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from opd_lightning.config import build, plain
from opd_lightning.config.names import nearest
from opd_lightning.models import Pretrained


def check_optimizer(cfg: DictConfig) -> None:
    """Take a step on one weight, and look up what FSDP2 lacks.

    Raises:
        ValueError: the optimizer cannot take a step as training does, or not on sharded weights.
    """
    node, weight = cfg.optim.optimizer, torch.nn.Parameter(torch.zeros(1))
    optimizer, _ = build(cfg.optim).build([weight], 1)
    weight.grad = torch.zeros(1)
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"optim.optimizer={node.get('_target_')} cannot take a step here ({' '.join(str(error).split())[:200]}); choose "
            "one that needs gradients alone, such as torch.optim.AdamW."
        ) from error
    if "ModelParallel" not in str(cfg.trainer.strategy):
        return
    if type(optimizer).__module__.startswith("bitsandbytes."):
        raise ValueError(
            f"optim.optimizer={type(optimizer).__name__} updates no weights that trainer=fsdp2 shards; choose "
            "optim=adamw, whose averages are sharded too, or trainer=ddp."
        )
    fused = optimizer.defaults.get("fused") and not isinstance(optimizer, torch.optim.Adam)  # AdamW is an Adam
    if fused or isinstance(optimizer, torch.optim.Adafactor):
        name, option = type(optimizer).__name__, "fused=true on " if fused else ""
        remedy = "set optim.optimizer.fused=false" if fused else "choose torch.optim.AdamW"
        raise ValueError(f"optim.optimizer={name} has no {option}weights that trainer=fsdp2 shards; {remedy}, or trainer=ddp.")


def check_adapter(cfg: DictConfig, model: Pretrained) -> None:
    """Check the numbers of a low-rank adapter, and that the modules that it names are in the model.

    Raises:
        ValueError: a number is out of range, or a name is that of no module.
    """
    if cfg.adapter is None:
        return
    check_ranges(plain(cfg.adapter))
    adapter, config = build(cfg.adapter), model.config()
    if hasattr(adapter, "quantization") and "ModelParallel" in str(cfg.trainer.strategy):
        raise ValueError(
            "adapter=qlora stores weights in 4 bits, which trainer=fsdp2 does not shard; choose trainer=ddp, or adapter=lora."
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        lm: Any = AutoModelForCausalLM.from_config(config)
    modules = [name for name, _ in lm.named_modules() if name]
    linear = [name for name, module in lm.named_modules() if hasattr(module, "weight") and module.weight.ndim == 2]
    for field in ("target_modules", "exclude_modules"):
        named = getattr(adapter, field, None)
        if named != "all-linear":
            check_named(f"adapter.{field}", named, modules, linear)
    check_named("adapter.target_parameters", getattr(adapter, "target_parameters", None), [n for n, _ in lm.named_parameters()])
    layers, n = getattr(adapter, "layers_to_transform", None), config.num_hidden_layers
    if wrong := [i for i in ([layers] if isinstance(layers, int) else layers or []) if not 0 <= i < n]:
        raise ValueError(f"adapter.layers_to_transform={wrong[0]} is no layer of {model.name}, which has 0 to {n - 1}.")


def check_ranges(adapter: dict[str, Any]) -> None:
    """Raises ValueError for a rank, a scale or a dropout with which nothing can be learned."""
    numbers = {"r": adapter.get("r"), "lora_alpha": adapter.get("lora_alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{pattern}.{name}": value for name, value in (adapter.get(pattern) or {}).items()}
    for field, value in numbers.items():
        whole = field == "r" or field.startswith("rank_pattern")
        if value is None or isinstance(value, str):
            continue  # of another type, which its class refuses
        if value <= 0 or (whole and not isinstance(value, int)):
            least = "a whole number of at least 1, such as 16" if whole else "positive, such as twice adapter.r"
            raise ValueError(f"adapter.{field}={value} must be {least}.")
    dropout = adapter.get("lora_dropout")
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        raise ValueError(f"adapter.lora_dropout={dropout} must lie in [0, 1), such as 0.05; 1 drops all of the adapter.")


def check_named(field: str, named: str | Iterable[str] | None, names: list[str], shown: list[str] | None = None) -> None:
    """Raises ValueError if a name, or a regular expression, of a field matches none of a model's names."""
    if not named:
        return
    ends = dict.fromkeys(name.rpartition(".")[2] for name in shown or names)
    if isinstance(named, str):
        try:
            found = any(re.fullmatch(named, name) for name in names)
        except re.error as error:
            raise ValueError(f"{field}={named!r} is no regular expression ({error}); give a list of names.") from error
        if not found:
            raise ValueError(
                f"{field}={named!r} matches no module, as a regular expression of full names{nearest(named, ends)}"
            )
        return
    for entry in named:
        if not any(f".{name}".endswith(f".{entry}") for name in names):
            raise ValueError(f"{field}: {entry!r} is no module of the model{nearest(entry, ends)}")
