"""Model card: how an exported model was made, what was measured, and how to load it, from the run's files."""

import re
from pathlib import Path
from typing import Any

import yaml

from opd_lightning.evaluation import headlines
from opd_lightning.utils.atomic_files import read_object

LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = AutoModelForCausalLM.from_pretrained("{place}")"""

LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{place}")"""


def card(run: Path, lineage: list[str], place: str, base: str | None = None) -> str:
    """The text of README.md.

    Args:
        run: the run's folder.
        lineage: the paths that the weights come from, the run's own first.
        place: the folder or repository that is loaded.
        base: the model of an adapter; None for merged weights.
    """
    config = yaml.safe_load((run / "config.yaml").read_text())
    status, evaluation = read_object(run / "status.json"), read_object(run / "evaluation.json")
    origin = base or lineage[-1]
    front: dict[str, Any] = {"base_model": origin} if is_hub_id(origin) else {}
    front |= {"library_name": "peft" if base else "transformers", "tags": ["on-policy-distillation", "opd-lightning"]}
    load = (LOAD_ADAPTER if base else LOAD).format(place=place, base=named(base) if base else "")
    made = ", itself made from ".join(f"`{named(path)}`" for path in lineage[1:])
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {config['name']}, seed {config['seed']}",
        f"{'A low-rank adapter' if base else 'Weights'} trained with OPD-Lightning by the method `{config['name']}`, "
        f"from {made}.",
        "## Training",
        "\n".join(f"- {name}: {value}" for name, value in training(config, status, evaluation).items()),
        *measured(evaluation),
        "## Use",
        f"```python\n{load}\n```",
        "The chat template is part of the tokenizer.",
        "## License",
        "The terms of the base model, of the training data and of a teacher apply to these weights. Add their license here "
        "before you share them.",
    ]
    return "\n\n".join(parts) + "\n"


def training(config: dict[str, Any], status: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The settings to name, by what they are; those that a run lacks are left out."""
    data, task = status.get("data", {}), config["task"]
    source = f"`{kind(task)}`" + (f" of `{named(str(task['path']))}`" if task.get("path") else "")
    counted = f", {data['train']} training examples (digest {data['digest']})" if data else ""
    teacher, loss = config.get("teacher"), config["loss"]
    terms = [f"`{kind(loss[term])}`" for term in ("divergence", "policy_gradient", "cross_entropy") if loss.get(term)]
    path = teacher.get("path") if teacher else None
    given = {
        "data": source + counted,
        "updates": evaluation.get("end", {}).get("step"),
        "prompts per rollout": config["data"]["batch_size"],
        "completions": f"by `{kind(config['rollout'])}`",
        "loss": ", ".join(terms),
        "teacher": f"`{kind(teacher)}`" + (f", `{named(path)}`" if path else "") if teacher else None,
        "learning rate": f"{config['optim']['lr']}, {config['optim']['schedule']}",
        "adapter": f"`{kind(config['adapter'])}`, rank {config['adapter'].get('r')}" if config.get("adapter") else None,
        "versions": ", ".join(f"{k} {v}" for k, v in status.get("machine", {}).items() if k != "threads"),
    }
    return {name: value for name, value in given.items() if value not in (None, "")}


def measured(evaluation: dict[str, Any]) -> list[str]:
    """The section of held-out numbers at the start and the end; empty where nothing was measured."""
    start, end = evaluation.get("start", {}), evaluation.get("end", {})
    intervals = evaluation.get("intervals", {}).get("end", {})
    rows = []
    for name in headlines(end):
        before = f"{start[name]:.4f}" if name in start else ""
        bounds = f" [{intervals[name]['low']:.4f}, {intervals[name]['high']:.4f}]" if name in intervals else ""
        rows.append(f"| {name} | {before} | {end[name]:.4f}{bounds} |")
    table = "\n".join(["| held out | start | end [95 % over prompts] |", "|---|---|---|", *rows])
    return ["## Evaluation", table, "The intervals do not cover other seeds."] if rows else []


def kind(node: dict[str, Any]) -> str:
    """The last part of a node's target."""
    return str(node["_target_"]).rpartition(".")[2]


def is_hub_id(path: str) -> bool:
    """Whether a path can only be a repository of the hub."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)) and not Path(path).exists()


def named(path: str) -> str:
    """A path to publish: a folder of this machine by its last name, or a run by its last two."""
    if "://" in path or is_hub_id(path):
        return path
    parts = Path(path).parts
    return "/".join(parts[-2:] if re.fullmatch(r"seed-\d+", parts[-1]) else parts[-1:])
