"""python -m opd_lightning.export run=<run folder> [to=<folder>]: the student as a plain Hugging Face folder.

The folder (by default the run's own model/) holds safetensors, the tokenizer with its chat template, and a model card;
`from_pretrained`, vLLM and every other tool read it without this package.
"""

import json
import os
import sys
from pathlib import Path

import yaml

from opd_lightning.config.aliases import read_run
from opd_lightning.models import Pretrained, is_run


def export(run: Path, to: Path) -> Path:
    """Write the folder.

    Raises:
        ValueError: `run` is no run folder with a checkpoint, or `to` holds something else.
    """
    if not is_run(str(run)):
        raise ValueError(f"run={run} is no run folder with config.yaml and checkpoints/last.ckpt.")
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"to={to} is not empty; choose another folder or remove it.")
    source = Pretrained(str(run), dtype=read_run(run)["model"]["dtype"])
    partial = to.with_name(f"{to.name}.partial")
    source.model().save_pretrained(partial)
    source.tokenizer().save_pretrained(partial)
    (partial / "README.md").write_text(card(run, source.lineage()))
    if to.exists():
        to.rmdir()
    os.replace(partial, to)
    return to


def card(run: Path, lineage: list[str]) -> str:
    """A model card: how the model was made and what was measured, from the run's files."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text()) if (run / "evaluation.json").is_file() else {}
    start, end = evaluation.get("start", {}), evaluation.get("end", {})
    rows = [f"| {name} | {start[name]:.4f} | {value:.4f} |" for name, value in end.items() if name != "step"]
    table = ["", "| evaluation | start | end |", "|---|---|---|", *rows] if rows else []
    return "\n".join(
        [
            "---",
            f"base_model: {lineage[-1]}",
            "library_name: transformers",
            "tags: [on-policy-distillation, opd-lightning]",
            "---",
            f"# {config['name']}, seed {config['seed']}",
            "",
            f"Trained with OPD-Lightning, method `{config['name']}`, {end.get('step', 'an unknown number of')} updates, "
            f"from `{' < '.join(lineage[1:])}`. The resolved configuration is in the run's config.yaml.",
            *table,
            "",
        ]
    )


def main() -> None:
    """The command of the export."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    given = {key: value for key, _, value in (word.partition("=") for word in sys.argv[1:])}  # paths, whatever is in them
    if not given.get("run") or set(given) - {"run", "to"} or not given.get("to", "model"):
        sys.exit(__doc__)
    run = Path(given["run"])
    try:
        print(f"exported: {export(run, Path(given.get('to', run / 'model')))}")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
