"""All checks of a run before training, in order."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from opd_lightning.config import build
from opd_lightning.config.compatibility import check
from opd_lightning.config.limits import limited
from opd_lightning.config.overrides import unwritable
from opd_lightning.config.precision import with_precision
from opd_lightning.models import Student
from opd_lightning.preflight.architecture import architecture, load, logits
from opd_lightning.preflight.automatic_precision import precision_of
from opd_lightning.preflight.checks import data, models, probe, prompts, updates, verifier, warmup
from opd_lightning.preflight.components import Components, assemble
from opd_lightning.preflight.devices import devices
from opd_lightning.preflight.logger import check_logger
from opd_lightning.preflight.narrow import bfloat16
from opd_lightning.preflight.precision import precision
from opd_lightning.preflight.references import references
from opd_lightning.preflight.rendering import left_rows
from opd_lightning.preflight.replies import replies
from opd_lightning.preflight.resources import disk, memory
from opd_lightning.preflight.results import CheckResult
from opd_lightning.preflight.seconds import seconds
from opd_lightning.preflight.weights import weights
from opd_lightning.runs.identity import run_folder


def examine(cfg: DictConfig, fast: bool = False) -> list[CheckResult]:
    """The results of all checks, in the order in which the errors would occur."""
    results: list[CheckResult] = []

    def attempt(name: str, step: Callable[[], Iterator[CheckResult]]) -> bool:
        try:
            results.extend(said_once(result, results) for result in step())
        except (ValueError, OmegaConfBaseException, OSError) as error:
            results.append(said_once(CheckResult(name, "fail", str(error)), results))
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
        text = ", ".join(f"{key} {value}" for key, value in settings.items())
        yield CheckResult("trainer", "pass", f"{text} (auto: {choice.reason})" if choice.reason else text)

    if not attempt("configuration", configuration):
        return results
    choice = precision_of(cfg, run_folder(cfg))
    cfg = with_precision(cfg, choice.precision)
    attempt("trainer", trainer)
    attempt("devices", lambda: devices(cfg))
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
    with closing(components[0].generator):
        limits = limited(cfg, components[0].task.max_new_tokens)
        examine_parts(components[0], limits, fast, attempt, choice.tentative)
    return results


def examine_parts(made: Components, cfg: DictConfig, fast: bool, attempt: Callable[..., bool], tentative: bool) -> None:
    """The checks that need the components."""
    attempt("models", lambda: models(made))
    attempt("weights", lambda: weights(made))
    attempt("data", lambda: data(made, cfg))
    attempt("data", lambda: left_rows(made))
    attempt("replies", lambda: replies(made))
    attempt("references", lambda: references(made))
    attempt("updates", lambda: updates(made, cfg))
    attempt("warm-up", lambda: warmup(made, cfg))
    attempt("verifier", lambda: verifier(made))
    attempt("prompts", lambda: prompts(made))
    for name, estimate in {"memory": memory, "seconds": seconds, "disk": disk}.items():
        attempt(name, partial(estimate, made, cfg))
    attempt("precision", lambda: precision(made, cfg, fast))
    students: list[Student] = []

    def student() -> Iterator[CheckResult]:
        students.append(load(made, cfg))
        yield from architecture(made, students[0])

    if not fast and attempt("architecture", student):
        attempt("logits", lambda: logits(made, students[0]))
        attempt("teacher", lambda: probe(made, students[0]))
        attempt("bfloat16", lambda: bfloat16(made, cfg, students[0], tentative))


def said_once(result: CheckResult, before: Sequence[CheckResult]) -> CheckResult:
    """The result; of a failure whose text is in one before, a pointer there."""
    said = next((b.name for b in before if result.state == b.state == "fail" and result.text in b.text), None)
    return result if said is None else CheckResult(result.name, "fail", f"not checked, because of what is said of {said}")
