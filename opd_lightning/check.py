"""python -m opd_lightning.check [group=option] [key=value] ...: checks of a run before GPU time is spent.

A table of pass, warn and fail; the exit code is 1 if anything fails. Nothing is trained and no run folder is made.
Options: --fast (no weights are loaded: no probe of student and teacher), --config-dir FOLDER (options of your own).
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_lightning.config import build
from opd_lightning.config.compatibility import check
from opd_lightning.config.limits import limited
from opd_lightning.config.overrides import configured, unwritable
from opd_lightning.models import Student
from opd_lightning.preflight.architecture import architecture, load
from opd_lightning.preflight.checks import data, models, probe, prompts, updates, verifier
from opd_lightning.preflight.components import Components, assemble
from opd_lightning.preflight.precision import precision
from opd_lightning.preflight.references import references
from opd_lightning.preflight.rendering import left_rows
from opd_lightning.preflight.replies import replies
from opd_lightning.preflight.resources import disk, memory
from opd_lightning.preflight.results import CheckResult
from opd_lightning.preflight.weights import weights
from opd_lightning.runs.identity import run_folder
from opd_lightning.training.loggers import check_logger
from opd_lightning.training.run import quiet
from opd_lightning.utils.secrets import redact_secrets


def examine(cfg: DictConfig, fast: bool = False) -> list[CheckResult]:
    """The results of all checks, in the order in which the errors would occur."""
    results: list[CheckResult] = []

    def attempt(name: str, step: Callable[[], Iterator[CheckResult]]) -> bool:
        try:
            results.extend(step())
        except (ValueError, OmegaConfBaseException, OSError) as error:
            results.append(CheckResult(name, "fail", str(error)))
            return False
        return True

    def configuration() -> Iterator[CheckResult]:
        warnings = check(cfg)
        yield from (CheckResult("configuration", "warn", warning) for warning in warnings)
        yield CheckResult("configuration", "pass", f"binds; the run's folder would be {run_folder(cfg)}")

    def access() -> Iterator[CheckResult]:
        problem = unwritable(str(cfg.output_dir))
        yield CheckResult("write access", "fail" if problem else "pass", problem or f"{Path(cfg.output_dir).absolute()}")

    def trainer() -> Iterator[CheckResult]:
        build(cfg.trainer, logger=False)
        settings = {key: cfg.trainer[key] for key in ("accelerator", "devices", "precision") if key in cfg.trainer}
        yield CheckResult("trainer", "pass", ", ".join(f"{key} {value}" for key, value in settings.items()))

    if not attempt("configuration", configuration):
        return results
    attempt("trainer", trainer)
    attempt("write access", access)
    components: list[Components] = []

    def parts() -> Iterator[CheckResult]:
        check_logger(cfg)
        components.append(assemble(cfg, None))
        yield CheckResult(
            "parts", "pass", "task, rollout, loss, teacher and evaluations can be made; optional packages are there"
        )

    if not attempt("parts", parts):
        return results
    made = components[0]
    cfg = limited(cfg, made.task.max_new_tokens)
    attempt("models", lambda: models(made))
    attempt("weights", lambda: weights(made))
    attempt("data", lambda: data(made, cfg))
    attempt("data", lambda: left_rows(made))
    attempt("replies", lambda: replies(made))
    attempt("references", lambda: references(made))
    attempt("updates", lambda: updates(made, cfg))
    attempt("verifier", lambda: verifier(made))
    attempt("prompts", lambda: prompts(made))
    attempt("memory", lambda: memory(made, cfg))
    attempt("disk", lambda: disk(made, cfg))
    attempt("precision", lambda: precision(made, cfg, fast))
    students: list[Student] = []

    def student() -> Iterator[CheckResult]:
        students.append(load(made, cfg))
        yield from architecture(made, students[0])

    if not fast and attempt("architecture", student):
        attempt("teacher", lambda: probe(made, students[0]))
    return results


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
    fast, arguments = "--fast" in arguments, [a for a in arguments if a != "--fast"]
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return
    quiet()
    try:
        results = examine(configured(arguments), fast)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {redact_secrets(str(error))}")
    show(results)
    sys.exit(any(result.state == "fail" for result in results))


if __name__ == "__main__":
    main()
