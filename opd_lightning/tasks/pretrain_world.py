"""python -m opd_lightning.tasks.pretrain_world --out <folder>: the old name of python -m opd_lightning.toy.pretrain."""

import runpy

from opd_lightning.utils.deprecation import warn

if __name__ == "__main__":
    warn("python -m opd_lightning.tasks.pretrain_world", "python -m opd_lightning.toy.pretrain")
    runpy.run_module("opd_lightning.toy.pretrain", run_name="__main__", alter_sys=True)
