"""python -m opd_lightning.check [--fast] [group=option] [key=value] ...

Checks of a run before GPU time is spent: configuration, data, verifier, memory,
disk and teacher. A table of pass, warn and fail; the exit code is 1 if anything
fails. Nothing is trained and no run folder is made.

  python -m opd_lightning.check method=sdft model.path=<folder or hub id>

Options
  --fast              no weights are loaded: no probe of student and teacher
  --config-dir DIR    options of your own, as of python -m opd_lightning
"""

import sys

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opd_lightning.config.overrides import configured
from opd_lightning.config.values import check_made, check_values
from opd_lightning.preflight.results import CheckResult
from opd_lightning.utils.secrets import redact_secrets


def examine(cfg: DictConfig, fast: bool = False) -> list[CheckResult]:
    """The results of all checks, in the order in which the errors would occur."""
    from opd_lightning.preflight.examine import examine as checks  # takes seconds

    return checks(cfg, fast)


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
    try:
        cfg = configured(arguments)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {redact_secrets(str(error))}")
    results = refusal(cfg) or examined(cfg, fast)
    show(results)
    sys.exit(any(result.state == "fail" for result in results))


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
