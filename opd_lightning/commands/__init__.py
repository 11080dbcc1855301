"""opd-lightning [COMMAND] [group=option] [key=value] ...: the commands of the package under one name.

opd-lightning method=sdft              train, as python -m opd_lightning does
opd-lightning -m method=sft,opd        a sweep
opd-lightning check method=sdft        checks of a run before it is made
opd-lightning evaluate run=<folder>    the evaluation suite, without training
opd-lightning export run=<folder>      a run's model as a folder, or on the hub
opd-lightning score out=<folder>       a teacher's scores, written once
opd-lightning study <folder>           table, figures and report of a study
opd-lightning dashboard ...            a W&B workspace of a study

opd-lightning COMMAND --help tells more of each; opd-lightning --help lists the options of a run.
"""

import os
import sys
from importlib import import_module

COMMANDS = {
    **{name: f"opd_lightning.{name}" for name in ("check", "evaluate", "export", "study", "dashboard")},
    "score": "opd_lightning.score.__main__",
}


def main() -> None:
    """Run the command that the first argument names; without one, train."""
    sys.path.insert(0, os.getcwd())  # as python -m does, so that modules in the working directory are found
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in COMMANDS:
        sys.argv[:2] = [f"{sys.argv[0]} {first}"]
        import_module(COMMANDS[first]).main()
    elif first in ("help", "commands"):
        print(__doc__)
    elif first and "=" not in first and not first.startswith(("-", "+", "~")):
        from opd_lightning.config.names import nearest

        sys.exit(f"error: {first} is no command{nearest(first, COMMANDS)}")
    else:
        from opd_lightning.__main__ import entry

        entry()
