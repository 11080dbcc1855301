"""results.csv and the README's table from the runs of this experiment.

python experiments/smollm2_keep/collect.py outputs/smollm2_keep
"""

import csv
import json
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
NUMBERS = {
    "new/accuracy": "facts known",
    "start/all/reverse_kl": "KL(model || original)",
    "start/all/forward_kl": "KL(original || model)",
    "heldout/log_likelihood": "log-likelihood of ordinary answers",
}


def main(study: Path) -> None:
    rows = []
    for path in sorted([*study.parent.glob(f"{study.name}.stages/*/seed-*"), *study.glob("*/seed-*")]):
        config = yaml.safe_load((path / "config.yaml").read_text())
        record, ledger = (json.loads((path / f"{name}.json").read_text()) for name in ("evaluation", "ledger"))
        for measured in record["history"]:
            row = {"name": config["name"], "seed": config["seed"], "update": measured["step"]}
            row |= {name: measured[name] for name in NUMBERS}
            interval = record["intervals"]["end"]["new/accuracy"] if measured is record["history"][-1] else {}
            row |= {f"new/accuracy/{side}": interval.get(side) for side in ("low", "high")}
            rows.append(row | {name: ledger["tokens"].get(name, 0) for name in ("student_tokens", "teacher_tokens")})
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print("| run | update | " + " | ".join(NUMBERS.values()) + " |")
    for row in rows:
        print(f"| {row['name']} | {row['update']} | " + " | ".join(f"{row[name]:.3f}" for name in NUMBERS) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
