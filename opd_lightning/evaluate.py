"""python -m opd_lightning.evaluate run=FOLDER [key=value] ...
python -m opd_lightning.evaluate [group=option] [key=value] ...

The evaluation suite of a run or of any model, without training, as a table.

A run as it was configured, and on more prompts:
  python -m opd_lightning.evaluate run=outputs/demo/sft-1a2b3c4d/seed-0
  python -m opd_lightning.evaluate run=outputs/demo/sft-1a2b3c4d/seed-0 \\
      task.n_eval=1024

Any model:
  python -m opd_lightning.evaluate model.path=<folder or hub id> task=world

Options
  to=FILE             also write the numbers to FILE, .json or .csv
  --config-dir DIR    options of your own, as of python -m opd_lightning
"""

import csv
import io
import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from opd_lightning.config import CONF_DIR, build
from opd_lightning.config.aliases import read_run
from opd_lightning.config.grammar import grammar_error, parse, quote_override
from opd_lightning.config.hints import hint
from opd_lightning.config.limits import limited
from opd_lightning.config.overrides import configured
from opd_lightning.config.values import check_made, check_values
from opd_lightning.runs.identity import is_run
from opd_lightning.runs.status import started
from opd_lightning.utils.atomic_files import replace_text
from opd_lightning.utils.secrets import redact_secrets

if TYPE_CHECKING:
    from opd_lightning.evaluation import Estimate


def evaluate(cfg: DictConfig) -> "dict[str, Estimate]":
    """The numbers of the configured suite for the model at `model.path`.

    Raises:
        ValueError: something is wrong with the configuration or the model.
    """
    import torch  # takes seconds, as what follows

    from opd_lightning.models import Student
    from opd_lightning.models.files import check_vocabulary
    from opd_lightning.preflight.references import limit_for
    from opd_lightning.preflight.rendering import check_rows
    from opd_lightning.teachers.contexts import NoContext

    check_values(cfg)
    model: Any = build(cfg.model)
    renderer, task = model.renderer(started(Path(model.path))), build(cfg.task)
    tokenizer = renderer.tokenizer
    if task.max_new_tokens is None:
        task.max_new_tokens = limit_for(task, renderer, model.window())
    cfg = limited(cfg, task.max_new_tokens)
    check_rows(task, renderer, {"student": NoContext(model.template_options)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = Student(model.model(), cfg.logits_chunk_size, renderer.valid_ids).to(device)
    check_vocabulary(tokenizer.get_vocab(), student.head.weight.shape[0], model.name)
    student.verify_head(f"model.path={model.path}")
    with closing(build(cfg.generator, tokenizer=tokenizer, renderer=renderer)) as generator:
        generator.update_weights(student, 0)
        return measure(cfg, model, task, renderer, student, generator)


def measure(cfg: DictConfig, model: Any, task: Any, renderer: Any, student: Any, generator: Any) -> "dict[str, Estimate]":
    """The numbers of the configured suite, with an engine that has the student's weights."""
    from opd_lightning.config.compatibility import inherited_teacher
    from opd_lightning.models import Student
    from opd_lightning.teachers.alignment import aligned

    teachers = {}
    if inherited := inherited_teacher(cfg):
        print(f"no teacher is measured: {inherited} is that of another model; teacher.path=<...> sets one.", file=sys.stderr)
    elif cfg.teacher is not None and cfg.loss.divergence is not None:
        teacher = build(cfg.teacher, context=build(cfg.context))
        if teacher.frozen:
            teacher = aligned(teacher, renderer)
            # A teacher with the student's start weights has those of the run's start, not of its result.
            teacher.setup(
                Student(model.start().model(), cfg.logits_chunk_size, renderer.valid_ids).to(student.lm.device), renderer
            )
            teachers["teacher"] = teacher
    arguments = {"task": task, "tokenizer": renderer.tokenizer, "renderer": renderer}
    arguments |= {"model": model.start(), "window": model.window()}
    arguments["environment"] = build(cfg.get("environment"), task=task, renderer=renderer)
    suite = [build(node, **arguments) for node in cfg.evaluation.suite.values() if node is not None]
    return {name: value for evaluation in suite for name, value in evaluation(student, teachers, generator).items()}


def configuration(arguments: list[str]) -> DictConfig:
    """The configuration of a run with its result as the model, or one composed from overrides."""
    runs = [a.removeprefix("run=") for a in arguments if a.startswith("run=")]
    if not runs:
        return configured(arguments)
    if not is_run(runs[0]):
        raise ValueError(f"run={runs[0]} is no run folder with config.yaml and checkpoints/last.ckpt.")
    cfg = OmegaConf.create(read_run(runs[0]))
    for word in (quote_override(a) for a in arguments if not a.startswith("run=")):
        if problem := grammar_error([word], sweep=False):
            raise ValueError(problem)
        override = parse(word)
        key = override.key_or_group
        if "." not in key and key not in cfg and not word.startswith("-"):
            tree: Any = OmegaConf.to_container(cfg)
            raise ValueError(f"{word} is no key{hint(key, '', tree, tree, [Path(CONF_DIR)])}")
        if word.startswith("-") or override.is_delete() or "." not in override.key_or_group:
            raise ValueError(f"{word}: with run= only single keys such as task.n_eval=512 can be changed, not whole groups.")
        OmegaConf.update(cfg, override.key_or_group, override.value())
    cfg.model.path, cfg.model.stand_in = runs[0], False
    return cfg


FIELDS = ("value", "prompts", "low", "high")


def target(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of to=, None without it, and the other arguments.

    Raises:
        ValueError: the file's kind is unknown, or its folder is not there.
    """
    given = [word.removeprefix("to=") for word in arguments if word.startswith("to=")]
    if not given:
        return None, arguments
    path = Path(given[-1])
    if path.suffix not in (".json", ".csv"):
        raise ValueError(f"to={path} should end in .json or .csv.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"to={path}: {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}; give a file.")
    return path, [word for word in arguments if not word.startswith("to=")]


def write(estimates: "dict[str, Estimate]", path: Path) -> None:
    """Write the numbers with their intervals over prompts."""
    rows = {name: {k: v for k, v in asdict(estimate).items() if v is not None} for name, estimate in estimates.items()}
    if path.suffix == ".json":
        return replace_text(path, json.dumps(rows, indent=1) + "\n")
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["name", *FIELDS])
    writer.writeheader()
    writer.writerows({"name": name, **row} for name, row in rows.items())
    replace_text(path, text.getvalue())


def show(estimates: "dict[str, Estimate]", title: str) -> None:
    """Print the numbers as a table."""
    table = Table("evaluation", "value [95 % over prompts]", "prompts", title=title, title_justify="left")
    for name, estimate in estimates.items():
        table.add_row(name, str(estimate), "" if estimate.prompts is None else str(estimate.prompts))
    Console().print(table)


def main() -> None:
    """The command of the evaluation suite."""
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    try:
        path, arguments = target(sys.argv[1:])
        cfg = configuration(arguments)
        check_values(cfg)
        check_made(cfg)
        print("loading torch, lightning and transformers ...", file=sys.stderr, flush=True)
        estimates = evaluate(cfg)
        show(estimates, str(cfg.model.path))
        if path is not None:
            write(estimates, path)
            print(f"written: {path}")
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {redact_secrets(str(error))}")


if __name__ == "__main__":
    main()
