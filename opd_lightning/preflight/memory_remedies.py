"""Remedies: the keys that make each part of a run's memory smaller, of those that would change something."""

from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

SPREAD = "trainer=fsdp2 on more devices"
DTYPES = ("model.dtype=bfloat16", "teacher.dtype=bfloat16", "teacher=remote", "a smaller model")

KEYS = {
    "activations": ("model.checkpointing=true", "a lower max_tokens_per_microbatch", "adapter=lora"),
    "logits": ("a lower logits_chunk_size",),
    "rollout cache": ("a lower data.batch_size or rollout.sampling.max_new_tokens", "generator=vllm_server on other devices"),
    "packed weights": ("generator.pack_weights=false",),
    "gathered weights": ("generator=vllm_server on other devices",),
    "optimizer": (SPREAD, "optim=adamw_8bit", "adapter=lora"),
    "gradients": (SPREAD, "adapter=lora"),
    "weights": (SPREAD, "adapter=qlora", "a smaller model"),
    "gathered teacher": ("teacher.dtype=bfloat16", "teacher=remote"),
    "scores": ("a lower data.batch_size",),
    "user": ("environment.user.dtype=bfloat16", "a smaller model for the user"),
    "files": DTYPES,
    "weights that are spread": DTYPES,
}
"""By part; those of a teacher are in `of_teacher`."""


def of_teacher(name: str) -> tuple[str, ...]:
    """The remedies of the teacher or reference with this name, which is numbered where it has several parts."""
    node = name.split(maxsplit=1)[0]
    return (f"{node}.dtype=bfloat16", SPREAD, f"{node}.offload=true", "teacher=remote")


CHANGES: dict[str, Callable[[DictConfig], bool]] = {
    "adapter=lora": lambda cfg: cfg.adapter is None,
    "adapter=qlora": lambda cfg: "quantization" not in (cfg.adapter or {}),
    "optim=adamw_8bit": lambda cfg: "8bit" not in str(OmegaConf.select(cfg, "optim.optimizer._target_")),
    "teacher=remote": lambda cfg: OmegaConf.select(cfg, "teacher.path") is not None,
    # Weights in 16 bits are refused where they are trained and the precision does not say so.
    "model.dtype=bfloat16": lambda cfg: cfg.adapter is not None or str(cfg.trainer.precision) == "bf16-true",
}
"""When an option is another than the chosen one, and can be chosen."""


def changes(remedy: str, cfg: DictConfig) -> bool:
    """Whether a remedy changes a configuration: its key is there with another value, and `CHANGES` has no objection."""
    key, _, value = remedy.partition("=")
    if remedy in CHANGES and not CHANGES[remedy](cfg):
        return False
    if "." not in key or " " in key:
        return True  # an option of a group, or words
    found = OmegaConf.select(cfg, key)
    return found is not None and str(found).lower() != value


def remedies(part: str, cfg: DictConfig) -> str:
    """The remedies of a part that would change something, as "a, b, or c"; empty where there are none."""
    words = [remedy for remedy in KEYS.get(part, of_teacher(part)) if changes(remedy, cfg)]
    return ", or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
