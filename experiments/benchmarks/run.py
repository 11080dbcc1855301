"""The tables and the figure of this folder: head.py for each divergence, and peak memory for more and more tokens.

python -m experiments.benchmarks.measure      # with TRL 1.16.0 installed, it takes part
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from experiments.grid import table
from opd_lightning.report.figures import COLOURS, MARKERS

HERE = Path(__file__).resolve().parent
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
TOKENS, WAYS = (512, 2048, 8192), ("ours", "ours_generic", "naive")


def head(*options: str) -> str:
    """What head.py prints."""
    line = [sys.executable, str(HERE / "head.py"), *options]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def main(results: Path = HERE, rounds: int = 11, shape: tuple[str, ...] = (), tokens: tuple[int, ...] = TOKENS) -> None:
    lines = {d: head("--divergence", d, "--rounds", str(rounds), *shape).splitlines() for d in DIVERGENCES}
    (results / "head.jsonl").write_text("".join(f"{line}\n" for some in lines.values() for line in some))
    rows = [{"divergence": d} | json.loads(line) for d, some in lines.items() for line in some[:-1]]
    header = ["divergence", "way", "time, as a ratio to the bare products", "least", "greatest", "peak MiB"]
    timed = [[r["divergence"], r["name"], r["ratio_to_matmul"], *r["spread"], r["peak_mib"]] for r in rows]
    print(table(header, timed))
    sizes = json.loads(lines[DIVERGENCES[0]][-1])["sizes"]
    with (results / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokens", *header])
        writer.writerows([sizes["tokens"], *line] for line in timed)
        file.flush()  # what follows may need more memory than there is
        memory = {way: [float(head("--only", way, *shape, "--tokens", str(n))) for n in tokens] for way in WAYS}
        writer.writerows(
            [n, "reverse_kl", way, "", "", "", v] for way in WAYS for n, v in zip(tokens, memory[way], strict=True)
        )
    print("\nPeak memory with reverse KL, MiB\n")
    print(table(["tokens", *map(str, tokens)], ([f"`{way}`", *map(round, values)] for way, values in memory.items())))
    draw(results / "cost.png", rows, memory, tokens)


def draw(path: Path, rows: list[dict], memory: dict[str, list[float]], tokens: tuple[int, ...]) -> None:
    """Time by way and divergence, with the least and the greatest round; memory by the number of tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    ways = list(dict.fromkeys(r["name"] for r in rows))
    for i, divergence in enumerate(DIVERGENCES):
        mine = [r for r in rows if r["divergence"] == divergence]
        middle = [r["ratio_to_matmul"] for r in mine]
        ends = [[m - r["spread"][0] for m, r in zip(middle, mine, strict=True)]]
        ends.append([r["spread"][1] - m for m, r in zip(middle, mine, strict=True)])
        at = [ways.index(r["name"]) + 0.2 * (i - 1) for r in mine]
        left.errorbar(at, middle, ends, fmt=MARKERS[i], color=COLOURS[i], markersize=5, capsize=2, label=divergence)
    left.set_xticks(range(len(ways)), ways)
    left.set_ylabel("time / bare products\n(median of rounds, least, greatest)")
    left.legend(frameon=False, fontsize=8)
    for i, (way, values) in enumerate(memory.items()):
        right.plot(tokens, values, marker=MARKERS[i], color=COLOURS[i], label=way)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory, MiB")
    right.set_xticks(tokens, [str(n) for n in tokens])
    right.xaxis.set_minor_formatter(NullFormatter())
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--results", type=Path, default=HERE, help="folder of results.csv, head.jsonl and the figure")
    given = parser.parse_args()
    main(given.results, given.rounds)
