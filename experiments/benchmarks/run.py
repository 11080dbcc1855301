"""Time and peak memory of the exact loss: head.py for each divergence, and peak memory for more and more tokens.

python -m experiments.benchmarks.run      # with TRL 1.16.0 installed, it takes part
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DIVERGENCES, WAYS = ("reverse_kl", "forward_kl", "jsd"), ("ours", "ours_generic", "naive")
COLUMNS = ("measure", "tokens", "divergence", "way", "ratio", "least", "greatest", "peak_mib")


def benchmark(rounds: int, tokens: tuple[int, ...], shape: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of results.csv, by `measure`: time, each way with each divergence; memory, by number of tokens (reverse KL)."""
    rows = []
    for divergence in DIVERGENCES:
        *lines, last = map(json.loads, head("--divergence", divergence, "--rounds", str(rounds), *shape).splitlines())
        for line in lines:
            ratios = {"ratio": line["ratio_to_matmul"], "least": line["spread"][0], "greatest": line["spread"][1]}
            labels = {"measure": "time", "tokens": last["sizes"]["tokens"], "divergence": divergence, "way": line["name"]}
            rows.append(labels | ratios | {"peak_mib": line["peak_mib"]})
    for way in WAYS:
        for n in tokens:
            peak = float(head("--only", way, *shape, "--tokens", str(n)))
            rows.append({"measure": "memory", "tokens": n, "divergence": "reverse_kl", "way": way, "peak_mib": peak})
    return rows


def head(*options: str) -> str:
    """What head.py prints."""
    line = [sys.executable, str(HERE / "head.py"), *options]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    parser.add_argument("--small", action="store_true", help="a tiny shape, to see that it works")
    given = parser.parse_args(arguments)
    small = ("--tokens", "16", "--hidden", "8", "--vocab", "32")
    rows = benchmark(1, (16, 32), small) if given.small else benchmark(11, (512, 2048, 8192), ())
    with given.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
