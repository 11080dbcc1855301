"""Collect the runs of this experiment into results.csv, courses.csv, recovery.png and answers.md beside this file.

python experiments/smollm2_recovery/collect.py outputs/smollm2_recovery
"""

import csv
import json
import shutil
import sys
from pathlib import Path

from opd_lightning.study import report

HERE = Path(__file__).resolve().parent


def main(study: Path) -> None:
    report(study)
    for name in ("results.csv", "recovery.png"):
        shutil.copy(study / name, HERE / name)
    run = sorted(study.glob("smollm2_opd-*/seed-*"))[0]
    stage = Path(json.loads((run / "status.json").read_text())["start_model"][0])
    narrow, recovered = (json.loads((folder / "answers.json").read_text()) for folder in (stage, run))
    assert narrow["prompts"] == recovered["prompts"] and narrow["end"] == recovered["start"]
    courses(HERE / "courses.csv", [stage, run])
    lines = ["| prompt | original | after the narrow SFT | after OPD from the original |", "|---|---|---|---|"]
    for row in zip(narrow["prompts"], narrow["start"], narrow["end"], recovered["end"], strict=True):
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in row) + " |")
    (HERE / "answers.md").write_text("\n".join(["Greedy, at most 40 new tokens, seed 0.", "", *lines, ""]))


def courses(path: Path, runs: list[Path]) -> None:
    """Every evaluation of both stages."""
    rows = []
    for run in runs:
        history = json.loads((run / "evaluation.json").read_text())["history"]
        rows += [{"stage": run.parent.name.rsplit("-", 1)[0], "update": h.pop("step"), **h} for h in history]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
