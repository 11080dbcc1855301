"""The peak memory of a run beside its plan, in MiB: python -m tests.memory_of_a_run FOLDER OVERRIDES (Linux)."""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from opd_lightning.config import compose
from opd_lightning.config.limits import limited
from opd_lightning.preflight.components import assemble
from opd_lightning.preflight.resources import plans_of
from opd_lightning.training.run import run


def resident(field: str) -> float:
    """A memory field of this process, in MiB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def main(small: list[str], words: list[str]) -> None:
    torch.set_num_threads(1)
    run(compose([*words, *small, "study.name=first", "trainer.max_steps=1"]))  # libraries allocate at their first use
    cfg = compose(words)
    parts = assemble(cfg, None)
    planned, _ = plans_of(parts, limited(cfg, parts.task.max_new_tokens))
    del parts
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the first run has freed counts no more
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident("VmRSS")
    run(cfg)
    measured = resident("VmHWM") - before
    sizes = {name: round(size / 2**20, 1) for name, size in planned.parts.items()}
    print(json.dumps({"measured": measured, "planned": planned.peak / 2**20, "phase": planned.phase, "parts": sizes}))


if __name__ == "__main__":
    main(sys.argv[1].split(), sys.argv[2:])
