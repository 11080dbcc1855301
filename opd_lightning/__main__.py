"""python -m opd_lightning [group=option] [key=value] ...: one run, or with -m a sweep of them."""

import logging
import os
import re
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from opd_lightning import __version__
from opd_lightning.config import CONF_DIR
from opd_lightning.config.aliases import updated
from opd_lightning.config.grammar import quote_arguments
from opd_lightning.config.help import page
from opd_lightning.config.overrides import explain
from opd_lightning.config.trainer_arguments import processes_of
from opd_lightning.config.values import check_made, check_values
from opd_lightning.preflight.logger import check_logger
from opd_lightning.reporting.overview import Overview, overview
from opd_lightning.runs.status import loading, record_failure
from opd_lightning.utils.secrets import redact_secrets

log = logging.getLogger(__name__)


class RunFailed(CompactHydraException):
    """An error that ends a run; Hydra prints it without a traceback unless HYDRA_FULL_ERROR=1."""


@hydra.main(config_path=CONF_DIR, config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Make one run; in a sweep, Hydra calls this once per cell. Returns the value of `optimize`, for Hydra's sweepers."""
    try:
        cfg = updated(cfg)
        if "sweep" in cfg.study and HydraConfig.get().mode == RunMode.RUN:
            raise ValueError(f"study={cfg.study.name} is a sweep over several runs; add -m (python -m opd_lightning -m ...).")
        if HydraConfig.get().mode == RunMode.MULTIRUN and processes_of(cfg.trainer) != 1:
            raise ValueError(
                f"trainer.devices={cfg.trainer.devices} trainer.num_nodes={cfg.trainer.num_nodes} with -m: each process would "
                "repeat the whole sweep; run one command per cell, or use one device per cell."
            )
        check_values(cfg, loading)
        check_made(cfg)
        check_logger(cfg)
        loading()
        from opd_lightning.training.result import result  # takes seconds, so after what can be wrong without it
        from opd_lightning.training.run import run

        return result(cfg, run(cfg))
    except KeyboardInterrupt as stop:
        log.error(str(stop) or "interrupted; the same command goes on with the run")
        sys.exit(getattr(stop, "code", 130))  # ends a sweep; an error in one cell does not
    except (ValueError, OmegaConfBaseException) as error:
        sentence = redact_secrets(explained(error))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error(f"error: {sentence}")  # the sweep goes on
            try:
                record_failure(cfg, error)
            except (ValueError, OmegaConfBaseException, OSError):
                Overview.refused.append(f"{' '.join(HydraConfig.get().overrides.task)} is refused: {sentence}")
        raise RunFailed(sentence) from error


def explained(error: Exception) -> str:
    """The error's message; a clearer one if a study has no learning rate for a method."""
    match = re.search(r"Interpolation key 'study\.lr\.([\w.-]+)' not found", str(error))
    if match is None:
        return str(error)
    return f"study.lr has no learning rate for {match[1]}; add one (+study.lr.{match[1]}=1e-4), or set optim.lr for all."


def entry() -> None:
    """Run `main` after checking the names on the command line; its text is quoted for Hydra."""
    if sys.argv[1:] == ["--version"]:
        print(f"opd-lightning {__version__}")
        return
    if {"-h", "--help"} & set(sys.argv[1:]):
        try:
            print(page(sys.argv[1:]), flush=True)
        except BrokenPipeError:  # of a reader such as head, which has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        except ValueError as error:
            sys.exit(f"error: {error}")
        return
    sys.argv[1:] = quote_arguments(sys.argv[1:])
    if problem := explain(sys.argv[1:]):
        sys.exit(f"error: {redact_secrets(problem)}")
    try:
        main()
    finally:
        if Overview.folder is not None:
            print(overview(Overview.folder), flush=True)
            Overview.folder = None


if __name__ == "__main__":
    entry()
