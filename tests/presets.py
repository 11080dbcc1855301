"""Every preset on many architectures: the second table of docs/architectures.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.config import CONF_DIR, compose
from opd_lightning.training.run import run
from tests import architectures

PRESETS = sorted(path.stem for path in (Path(CONF_DIR) / "method").glob("*.yaml"))
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "gpt2", "mistral", "olmo2", "phi3", "granite", "qwen3_moe", "mixtral"]
ARCHITECTURES += ["falcon_h1", "jamba", "bamba", "zamba2", "qwen3_next", "lfm2", "granitemoehybrid", "qwen2_5_vl"]

VARIANTS = {
    "full": [],
    "LoRA": ["adapter=lora", "adapter.r=2", "optim.lr=0.01"],
    "EMA": ["teacher=ema", "teacher.rate=0.3"],
    "LoRA + EMA": ["adapter=lora", "adapter.r=2", "optim.lr=0.01", "teacher=ema", "teacher.rate=0.3"],
}
HEADER = ["architecture", *VARIANTS]


def chosen(preset: str, group: str) -> str:
    """The option of a group that a preset chooses."""
    defaults: list[Any] = yaml.safe_load((Path(CONF_DIR) / "method" / f"{preset}.yaml").read_text())["defaults"]
    return next(entry[f"override /{group}"] for entry in defaults if f"override /{group}" in entry)


def overrides(preset: str, variant: str) -> list[str] | None:
    """What to set for a preset and a variant; None for an average where the preset has no teacher."""
    given = [f"method={preset}", *VARIANTS[variant]]
    if "teacher=ema" not in given:
        return given
    if chosen(preset, "teacher") == "none":
        return None
    # An average of the student needs something that the student is not shown.
    return [*given, "context=demonstration"] if chosen(preset, "context") == "none" else given


def train(path: str, other: str, folder: Path, given: list[str]) -> Path:
    """Two updates of a few short completions."""
    return run(compose([*architectures.two_updates(path, other, folder, batch=2), "task.max_new_tokens=12", *given]))


def tried(name: str, variant: str, folder: Path, presets: list[str] = PRESETS) -> dict[str, str]:
    """By preset, what came of two updates: "works", or the field that a refusal names."""
    path, other = architectures.save(name, folder / "student"), architectures.save(name, folder / "teacher", seed=1)
    lines = {preset: overrides(preset, variant) for preset in presets}
    return {
        preset: architectures.tried(lambda line=line: train(path, other, folder, line))
        for preset, line in lines.items()
        if line is not None
    }


def cell(found: dict[str, str]) -> str:
    """A cell: how many presets work, and which do not, and why."""
    failed = {preset: told for preset, told in found.items() if told != "works"}
    if len(set(failed.values())) == 1 and len(failed) == len(found):
        return f"all {next(iter(failed.values()))}"
    return ", ".join([f"{len(found) - len(failed)} work", *(f"{preset} {told}" for preset, told in failed.items())])


def row(name: str, folder: Path) -> str:
    """An architecture's row of the table."""
    return architectures.line([name, *(cell(found) for found in results(name, folder))])


def results(name: str, folder: Path) -> Iterator[dict[str, str]]:
    """By variant, what came of every preset."""
    for i, variant in enumerate(VARIANTS):
        yield tried(name, variant, folder / str(i))
