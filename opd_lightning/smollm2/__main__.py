"""python -m opd_lightning.smollm2 <folder>: the old name of python -m opd_lightning.models.smollm2."""

import runpy

from opd_lightning.utils.deprecation import warn

if __name__ == "__main__":
    warn("python -m opd_lightning.smollm2", "python -m opd_lightning.models.smollm2")
    runpy.run_module("opd_lightning.models.smollm2", run_name="__main__", alter_sys=True)
