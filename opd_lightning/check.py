"""python -m opd_lightning.check [--fast] [group=option] [key=value] ...

Checks of a run before GPU time is spent: configuration, data, verifier, memory,
disk and teacher. A table of pass, warn and fail; the exit code is 1 if anything
fails. Nothing is trained and no run folder is made.

  python -m opd_lightning.check method=sdft model.path=<folder or hub id>

Options
  --fast              no weights are loaded: no probe of student and teacher
  --advise            also a table of what the teacher, and its weights behind
                      each context, would change for this student
  --config-dir DIR    options of your own, as of python -m opd_lightning
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_lightning.config import CONF_DIR
from opd_lightning.config.overrides import configured
from opd_lightning.config.values import check_made, check_values
from opd_lightning.preflight.results import CheckResult
from opd_lightning.utils.secrets import redact_secrets

if TYPE_CHECKING:
    from opd_lightning.preflight.advice import Advice


def examine(cfg: DictConfig, fast: bool = False) -> list[CheckResult]:
    """The results of all checks, in the order in which the errors would occur."""
    from opd_lightning.preflight.examine import examine as checks  # takes seconds

    return checks(cfg, fast)


def contexts_of(arguments: list[str]) -> dict[str, DictConfig]:
    """The context of each option of its group, in a run with these arguments."""
    others = [a for a in arguments if not a.lstrip("+~").startswith(("context=", "context."))]
    found = {}
    for path in sorted((Path(CONF_DIR) / "context").glob("*.yaml")):
        if path.stem != "none":
            found[path.stem] = configured([*others, f"context={path.stem}"]).context
    return found


def advice(cfg: DictConfig, contexts: dict[str, DictConfig]) -> "list[Advice]":
    """What each candidate would tell the student; the models are loaded."""
    from opd_lightning.config.limits import limited  # takes seconds, as what follows
    from opd_lightning.config.precision import with_precision
    from opd_lightning.preflight.advice import advise
    from opd_lightning.preflight.architecture import load
    from opd_lightning.preflight.automatic_precision import precision_of
    from opd_lightning.preflight.components import assemble
    from opd_lightning.runs.identity import run_folder

    cfg = with_precision(cfg, precision_of(cfg, run_folder(cfg)).precision)
    made = assemble(cfg, None)
    with closing(made.generator):
        return advise(made, load(made, limited(cfg, made.task.max_new_tokens)), contexts)


def show_advice(rows: "list[Advice]") -> None:
    """Print the table of advice, and a sentence on each candidate."""
    columns = ("candidate", "right", "student", "KL(S|T)", "KL(T|S)", "changed", "aligned")
    table = Table(*columns, title="asked about the student's completions, before training", title_justify="left")
    for row in rows:
        numbers = (row.accuracy, row.student_accuracy, row.reverse_kl, row.forward_kl, row.changed, row.alignment)
        cells = ["" if number is None else f"{number:.3g}" for number in numbers]
        if row.alignment is not None:
            cells[-1] += f" ({row.interval[0]:.2g} to {row.interval[1]:.2g})"
        table.add_row(row.candidate, *cells)
    console = Console()
    console.print(table)
    for row in rows:
        console.print(f"{row.candidate}: {escape(redact_secrets(row.sentence))}")


COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def show(results: list[CheckResult]) -> None:
    """Print the table."""
    table = Table("", "what", "result", title_justify="left")
    for result in results:
        colour = COLOURS[result.state]
        table.add_row(f"[{colour}]{result.state}[/]", result.name, escape(redact_secrets(result.text)))
    Console().print(table)


def main() -> None:
    """The command of checks; exits with 1 if one fails."""
    arguments = sys.argv[1:]
    fast, advising = "--fast" in arguments, "--advise" in arguments
    arguments = [a for a in arguments if a not in ("--fast", "--advise")]
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return
    try:
        cfg = configured(arguments)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {redact_secrets(str(error))}")
    results = refusal(cfg) or examined(cfg, fast or advising)
    show(results)
    failed = any(result.state == "fail" for result in results)
    if advising and not failed:
        show_advice(advice(cfg, contexts_of(arguments)))
    sys.exit(failed)


def refusal(cfg: DictConfig) -> list[CheckResult]:
    """The result on a wrong value that is known without importing torch; empty without one."""
    try:
        check_values(cfg)
        check_made(cfg)
    except (ValueError, OmegaConfBaseException) as error:
        return [CheckResult("configuration", "fail", str(error))]
    return []


def examined(cfg: DictConfig, fast: bool) -> list[CheckResult]:
    """The results of all checks, after saying that they begin."""
    print("loading torch, lightning and transformers ...", file=sys.stderr, flush=True)
    from opd_lightning.training.run import quiet  # takes seconds

    quiet()
    return examine(cfg, fast)


if __name__ == "__main__":
    main()
