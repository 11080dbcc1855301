"""results.csv and the README's table from the runs of this experiment.

python experiments/smollm2_rule/collect.py outputs/smollm2_rule
"""

import csv
import json
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
NUMBERS = {
    "general/accuracy": "obeys the rule",
    "teacher/shown/accuracy": "teacher obeys",
    "heldout/reverse_kl": "KL(student || prompted teacher)",
    "heldout/forward_kl": "KL(prompted teacher || student)",
    "heldout/log_likelihood": "log-likelihood of ordinary answers",
    "general/length": "length",
}


def main() -> None:
    rows = []
    for path in sorted(Path(sys.argv[1]).glob("*/seed-*/evaluation.json")):
        run = path.parent
        config, record = yaml.safe_load((run / "config.yaml").read_text()), json.loads(path.read_text())
        ledger = (
            json.loads((run / "ledger.json").read_text()) if (run / "ledger.json").is_file() else {"tokens": {}, "seconds": {}}
        )
        for at, measured in enumerate(record["history"]):
            # Intervals are kept of the first and the last evaluation.
            ends = {0: "start", len(record["history"]) - 1: "end"}
            row = {"name": config["name"], "seed": config["seed"], "update": measured["step"]}
            for name in NUMBERS:
                interval = record["intervals"].get(ends.get(at), {}).get(name, {})
                row |= {name: measured.get(name), f"{name}/low": interval.get("low"), f"{name}/high": interval.get("high")}
            seconds = ledger["seconds"]
            row |= {name: ledger["tokens"].get(name, 0) for name in ("student_tokens", "teacher_tokens")}
            row |= {"seconds_training": round(sum(v for k, v in seconds.items() if k != "evaluation"))}
            row |= {"seconds_all": round(sum(seconds.values()))}
            rows.append(row)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    names = list(NUMBERS)
    print("| run | " + " | ".join(NUMBERS.values()) + " | student tokens | seconds |")
    print("|" + "---|" * (len(names) + 3))
    for row in rows:
        cells = [f"{row['name']}, update {row['update']}", *(shown(row, name) for name in names)]
        print(f"| {' | '.join(cells)} | {row['student_tokens']} | {row['seconds_training']} |")


def shown(row: dict, name: str) -> str:
    """A number with its interval over prompts, where it has one."""
    if row[name] is None:
        return "-"
    if row[f"{name}/low"] is None:
        return f"{row[name]:.3f}"
    return f"{row[name]:.3f} [{row[f'{name}/low']:.3f}, {row[f'{name}/high']:.3f}]"


if __name__ == "__main__":
    main()
