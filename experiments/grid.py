"""What the experiments share: start models made once, a grid of runs in a few processes, and intervals for their tables.

An experiment is a module run as `python -m experiments.<name>.run`: `main(bench)` makes the runs and writes what they showed
to CSV files, and `tell(bench)` makes all tables and figures from these files alone (`--tell`: nothing but that; the demo's
figures are its study's report's). `--small` makes a shrunken version elsewhere, to see that it still works. Finished runs are
not made again, so a command that was stopped goes on.
"""

import argparse
import csv
import ctypes
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from opd_lightning.report.runs import Run, read_json
from opd_lightning.report.statistics import over_seeds

SHIPPED = Path(__file__).resolve().parents[1] / "opd_lightning" / "assets" / "world"
KEPT = Path(__file__).resolve().parent / "starts"
"""Start models that are kept beside the code: made anew on another kind of processor, they come out as other ones."""

COMMON = (
    "logger=none",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "evaluation.answers=null",
    "trainer.accelerator=cpu",
)
SMALL = ("trainer.max_steps=2", "task.n_eval=8", "task.n_train=16", "data.batch_size=4", "evaluation.every=1")

WORDS = ("arm", "start", "lr", "skill", "taught")
"""Columns that are read back to the letter; in the others numbers are numbers."""

Row = dict[str, Any]
Cell = tuple[Row, list[str]]
"""What a run is called in tables, by column, and the overrides that make it."""


@dataclass
class Bench:
    """Where an experiment runs.

    Attributes:
        results: folder of results.csv and figures.
        out: folder of run folders and start models.
        jobs: processes at a time, one core each.
        small: a shrunken version: two updates, one run per arm.
    """

    results: Path
    out: Path = Path("outputs")
    jobs: int = 2
    small: bool = False

    def starts(self, made: Mapping[str, Sequence[str]], last: str = "teacher") -> dict[str, Path]:
        """Folders with start/ and teacher/ by name; what is neither kept nor there `pretrain_world` makes with these options.

        `last` is the folder that is written last: "start" where the options say that there is no teacher, or none is needed.
        """
        if self.small:
            return dict.fromkeys(made, SHIPPED)
        folders = {name: self.out / "starts" / name if options else SHIPPED for name, options in made.items()}
        folders |= {name: KEPT / name for name in made if (KEPT / name / last / "made.json").is_file()}
        missing = {folder: made[name] for name, folder in folders.items() if not (folder / last / "made.json").is_file()}
        line = [sys.executable, "-m", "opd_lightning.tasks.pretrain_world", "--out"]
        commands = [[*line, str(folder), *options] for folder, options in missing.items()]
        for some in batched(commands, self.jobs):
            processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in some]
            if any([process.wait() for process in processes]):
                raise RuntimeError("a start model could not be made: " + ", ".join(" ".join(command) for command in some))
        return folders

    @staticmethod
    def begin(folder: Path) -> list[str]:
        """Overrides: begin with the start model in this folder, and take the external teacher from there."""
        return [f"model.path={folder}/start", f"model.teacher={folder}/teacher"]

    def run(self, study: str, cells: Iterable[Cell], small: Sequence[str] = SMALL) -> list[tuple[Row, Run]]:
        """Make the runs that are missing, and read all of them; `small` are the overrides that shrink them."""
        cells = list(cells)
        more = [*COMMON, f"output_dir={self.out}", f"study.name={study}"]
        if self.small:
            cells = list({labels["arm"]: (labels, given) for labels, given in reversed(cells)}.values())
        lines = [[*given, *(o for o in more if not fixed(o, given))] for _, given in cells]
        if self.small:
            lines = [[*(o for o in line if not fixed(o, small)), *small] for line in lines]
        begun = time.monotonic()
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), die_with_parent) as pool:
            folders = []
            for (labels, _), folder in zip(cells, pool.map(make, lines), strict=True):
                folders.append(folder)
                told = " ".join(f"{k}={v}" for k, v in labels.items())
                print(f"[{len(folders)}/{len(cells)}, {(time.monotonic() - begun) / 60:.1f} min] {told}", flush=True)
        return [(labels, read(folder)) for (labels, _), folder in zip(cells, folders, strict=True)]

    def write(self, rows: Sequence[Row], name: str = "results.csv") -> None:
        """A CSV file of rows; columns in the order in which they first occur."""
        self.results.mkdir(parents=True, exist_ok=True)
        with (self.results / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)

    def read(self, name: str = "results.csv") -> list[Row]:
        """The rows of a file that `write` made; an empty cell is left out of its row."""
        with (self.results / name).open(newline="") as file:
            return [{k: v if k in WORDS else value(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def earlier(self, name: str = "earlier.csv") -> list[Row]:
        """The rows of a file that the command does not make here: of another kind of machine, or of a first run; or none."""
        return self.read(name) if (self.results / name).is_file() else []


def value(text: str) -> bool | int | float | str:
    """What a cell of a CSV file was before it was written."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def batched(items: list, n: int) -> Iterable[list]:
    """Lists of n items, the last one of what is left."""
    return (items[i : i + n] for i in range(0, len(items), n))


def fixed(override: str, given: Sequence[str]) -> bool:
    """Does a cell decide this key itself?"""
    return any(o.split("=")[0].lstrip("+") == override.split("=", maxsplit=1)[0] for o in given)


def die_with_parent() -> None:
    """A command that is killed takes its processes with it (Linux); their runs go on where their checkpoints are."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def make(overrides: list[str]) -> Path:
    """One run, in a process of the pool."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from opd_lightning.config import compose
    from opd_lightning.train import run

    torch.set_num_threads(1)
    logging.getLogger("opd_lightning").setLevel(logging.ERROR)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return run(compose(overrides))


def read(folder: Path) -> Run:
    """A finished run."""
    files = {name: read_json(folder / f"{name}.json") for name in ("status", "evaluation", "ledger")}
    return Run(folder, yaml.safe_load((folder / "config.yaml").read_text()), **files)


def row(labels: Row, run: Run, numbers: Iterable[str]) -> Row:
    """A line of results.csv: what the run is called, where it ended (and whether at its target, if it had one), these numbers
    of its last evaluation, and its costs."""
    end, ledger = run.evaluation["end"], run.ledger
    asked = run.config["budget"]["accuracy"] is not None
    told = labels | {"updates": ledger["steps"]} | ({"reached": not run.censored} if asked else {})
    told |= {name: end.get(name) for name in numbers}
    return told | {"student_tokens": ledger["tokens"].get("student_tokens", 0), "flops": sum(ledger["flops"].values())}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and Student's t interval over runs that differ by their seed; equal values tell of no spread to give one."""
    if len(set(values)) == 1 < len(values):
        return f"{values[0]:.{digits}f} (all equal)"
    if len(values) < 2:
        return f"{mean(values):.{digits}f}"
    told = over_seeds(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))
    return f"{told.mean:.{digits}f} [{told.low:.{digits}f}, {told.high:.{digits}f}]"


def paired(rows: Sequence[Row], arm: str, baseline: str, number: str, by: Sequence[str] = ("seed",)) -> str:
    """Mean difference of an arm to a baseline where all of `by` agree, with Student's t interval; a pair or two are told."""
    return between(rows, {"arm": arm}, {"arm": baseline}, number, by)


def between(rows: Sequence[Row], first: Row, second: Row, number: str, by: Sequence[str] = ("seed",)) -> str:
    """The same of the rows with the first labels to those with the second ones: {"arm": "sft", "lr": "5e-5"}."""
    mine, other = (
        {json.dumps([r[k] for k in by]): r[number] for r in picked(rows, **labels) if number in r} for labels in (first, second)
    )
    both = sorted(set(mine) & set(other))
    if not both:
        return ""
    if len(both) == 1:
        return f"{mine[both[0]] - other[both[0]]:+.3f} (one pair)"
    told, pairs = over_seeds(mine, other), " (two pairs)" if len(both) == 2 else ""
    return f"{told.mean:+.3f} (all equal){pairs}" if told.alike else f"{told}{pairs}"


def picked(rows: Iterable[Row], **labels: Any) -> list[Row]:
    """The rows with these labels."""
    return [r for r in rows if all(r.get(name) == label for name, label in labels.items())]


def table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    told = [list(map(str, header)), ["---"] * len(header), *(list(map(str, line)) for line in lines)]
    return "\n".join("| " + " | ".join(line) + " |" for line in told)


def start(main: Callable[[Bench], None], file: str, tell: Callable[[Bench], None] | None = None) -> None:
    """Read the command line and run an experiment, or tell again what it showed."""
    parser = argparse.ArgumentParser(description=sys.modules[main.__module__].__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of run folders and start models")
    parser.add_argument("--results", type=Path, default=Path(file).resolve().parent, help="folder of CSV files and figures")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one core each")
    parser.add_argument("--small", action="store_true", help="two updates of one run per arm, to see that it works")
    if tell:
        parser.add_argument("--tell", action="store_true", help="tables and figures from the CSV files; nothing is run")
    given = parser.parse_args()
    results = given.out / "small" / Path(file).resolve().parent.name if given.small else given.results
    bench = Bench(results, given.out, given.jobs, given.small)
    tell(bench) if tell and given.tell else main(bench)
