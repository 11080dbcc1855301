"""Runs of one study, read from their folders; those that cannot be compared are left out with a reason."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: <study>/<name>-<hash>/seed-<seed>.
        config, status, evaluation, ledger: what the folder's files hold.
    """

    folder: Path
    config: dict[str, Any]
    status: dict[str, Any]
    evaluation: dict[str, Any]
    ledger: dict[str, Any]

    @property
    def cell(self) -> str:
        """Runs that differ in their seed only share a cell."""
        return self.folder.parent.name

    @property
    def name(self) -> str:
        """The name of the method or the experiment."""
        return str(self.config["name"])

    @property
    def seed(self) -> int:
        """The seed of prompts and sampling; runs of one seed are paired."""
        return int(self.config["seed"])

    @property
    def censored(self) -> bool:
        """Whether the run had a target accuracy and did not reach it."""
        return self.config["budget"]["accuracy"] is not None and self.status["ended_by"] != "budget.accuracy"

    @property
    def seconds(self) -> float:
        """Seconds of training; evaluation is not counted."""
        return sum(s for part, s in self.ledger["seconds"].items() if part != "evaluation")


def load_study(folder: Path) -> tuple[list[Run], list[str]]:
    """All comparable runs below a folder, and one sentence for each that was left out.

    Raises:
        ValueError: there is no finished run, or the runs belong to several studies.
    """
    runs, left_out = [], []
    for path in sorted(folder.glob("*/seed-*/status.json")):
        cell = path.parent.relative_to(folder)
        try:
            status = read_json(path)
            if status["state"] != "finished":
                reason = f" ({status['reason']})" if "reason" in status else ""
                left_out.append(f"{with_label(cell, status)} is {status['state']}{reason}")
                continue
            read = {name: read_json(path.parent / f"{name}.json") for name in ("evaluation", "ledger")}
            config = yaml.safe_load((path.parent / "config.yaml").read_text())
            assert isinstance(config, dict), "config.yaml holds no configuration"
        except (OSError, ValueError, KeyError, TypeError, AssertionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            left_out.append(f"{cell} cannot be read ({reason}); remove that folder, and make the run again")
            continue
        if "costs" not in read["evaluation"]:
            left_out.append(
                f"{path.parent.relative_to(folder)} was made by an earlier version, which kept no costs; make it again"
            )
            continue
        runs.append(Run(path.parent, config, status, **read))
    if not runs:
        raise ValueError(f"{folder} has no finished run; make some with: python -m opd_lightning -m study=demo")
    studies = {run.config["study"]["name"] for run in runs}
    if len(studies) > 1:
        raise ValueError(f"{folder} mixes the studies {', '.join(sorted(studies))}; give the folder of one of them.")
    return comparable(runs, left_out, folder)


def other_precisions(runs: list[Run], folder: Path) -> list[str]:
    """A sentence for each run that trainer.precision=auto gave another precision than most of its cell; it stays."""
    told = []
    for cell in sorted({r.cell for r in runs}):
        found = [(r.folder.relative_to(folder), r.config["trainer"].get("precision")) for r in runs if r.cell == cell]
        common = Counter(precision for _, precision in found).most_common(1)[0][0]
        told += [f"{place} was trained in {own}, most of its other seeds in {common}" for place, own in found if own != common]
    return told


def with_label(folder: Path | str, status: dict[str, Any]) -> str:
    """A run's folder, behind the label in its status.json if there is one."""
    return f"{status['label']} ({folder})" if status.get("label") else str(folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ValueError for anything else, NaN and infinity included."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path.name} holds {constant}")

    try:
        content = json.loads(path.read_text(), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content


def comparable(runs: list[Run], left_out: list[str], folder: Path) -> tuple[list[Run], list[str]]:
    """The runs with the most common evaluation examples and start model; the others join `left_out`."""
    for reason, key in (
        ("was evaluated otherwise", lambda r: json.dumps(r.config["evaluation"]["suite"], sort_keys=True)),
        ("was evaluated on other examples", lambda r: json.dumps(r.evaluation["examples"], sort_keys=True)),
        ("began from another start model", lambda r: re.sub(r"seed-\d+", "seed-*", json.dumps(r.status["start_model"]))),
    ):
        common = Counter(map(key, runs)).most_common(1)[0][0]
        left_out += [f"{r.folder.relative_to(folder)} {reason}" for r in runs if key(r) != common]
        runs = [r for r in runs if key(r) == common]
    for cell in {r.cell for r in runs}:
        full_length = [r for r in runs if r.cell == cell and r.status["ended_by"] == "trainer.max_steps" and not r.censored]
        if not full_length:  # a budget decided how many updates each run took
            continue
        common = Counter(r.ledger["steps"] for r in full_length).most_common(1)[0][0]
        odd = [r for r in full_length if r.ledger["steps"] != common]
        left_out += [f"{r.folder.relative_to(folder)} took {r.ledger['steps']} updates, its other seeds {common}" for r in odd]
        runs = [r for r in runs if r not in odd]
    left_out += other_precisions(runs, folder)
    seeds = {r.seed for r in runs}
    for cell in sorted({r.cell for r in runs}):
        missing = sorted(seeds - {r.seed for r in runs if r.cell == cell})
        absent = ", ".join(map(str, missing))
        status = next(r.status for r in runs if r.cell == cell)
        named = with_label(cell, {"label": str(status.get("label", "")).rpartition(", seed ")[0]})
        left_out += [f"{named} has no finished run of seed {absent}, so it is compared on the other seeds"] if missing else []
    return runs, left_out
