"""Peak memory of an update by the length of its completion: memory.py for each part and length.

python -m experiments.scale.run
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("loss", "step", "checkpointed", "padded")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results.csv")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    given = parser.parse_args(arguments)
    with given.results.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("tokens", "part", "peak_mib"))
        for part in PARTS:
            for n in given.tokens:
                line = [sys.executable, "-m", "experiments.scale.memory", "--part", part, "--tokens", str(n)]
                done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1])
                writer.writerow((n, part, float(done.stdout.splitlines()[-1])))
                file.flush()


if __name__ == "__main__":
    main()
