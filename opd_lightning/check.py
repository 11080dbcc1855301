"""python -m opd_lightning.check [group=option] [key=value] ...: checks of a run before GPU time is spent.

A table of pass, warn and fail; the exit code is 1 if anything fails. Nothing is trained and no run folder is made.
Options: --fast (no weights are loaded: no probe of student and teacher), --config-dir FOLDER (options of your own),
--advise (also a table of what the teacher, and its weights behind each context, would tell this student).
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

from opd_lightning.config import CONF_DIR, build
from opd_lightning.config.compatibility import check
from opd_lightning.config.limits import limited
from opd_lightning.config.overrides import configured, unwritable
from opd_lightning.models import Student
from opd_lightning.preflight.advice import Advice, advise
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


def contexts_of(arguments: list[str]) -> dict[str, DictConfig]:
    """The context of each option of its group, in a run with these arguments."""
    others = [a for a in arguments if not a.lstrip("+~").startswith(("context=", "context."))]
    found = {}
    for path in sorted((Path(CONF_DIR) / "context").glob("*.yaml")):
        if path.stem != "none":
            found[path.stem] = configured([*others, f"context={path.stem}"]).context
    return found


def advice(cfg: DictConfig, contexts: dict[str, DictConfig]) -> list[Advice]:
    """What each candidate would tell the student; the models are loaded."""
    made = assemble(cfg, None)
    return advise(made, load(made, limited(cfg, made.task.max_new_tokens)), contexts)


def show_advice(rows: list[Advice]) -> None:
    """Print the table of advice, and a sentence on each candidate."""
    columns = ("candidate", "right", "student", "KL(S|T)", "KL(T|S)", "changed", "aligned")
    table = Table(*columns, title="asked about the student's completions, before training", title_justify="left")
    for row in rows:
        numbers = (row.accuracy, row.student_accuracy, row.reverse_kl, row.forward_kl, row.changed, row.alignment)
        cells = ["" if number is None else f"{number:.3g}" for number in numbers]
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
    quiet()
    try:
        cfg = configured(arguments)
        results = examine(cfg, fast or advising)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {redact_secrets(str(error))}")
    show(results)
    failed = any(result.state == "fail" for result in results)
    if advising and not failed:
        show_advice(advice(cfg, contexts_of(arguments)))
    sys.exit(failed)


if __name__ == "__main__":
    main()
