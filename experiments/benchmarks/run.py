"""Time and peak memory of the exact loss: head.py for each divergence, and peak memory for more and more tokens.

python -m experiments.benchmarks.run      # with TRL 1.16.0 installed, it takes part
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from experiments.grid import Bench, Row, picked, start, table
from opd_lightning.report.figures import COLOURS, MARKERS

DIVERGENCES = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "JSD"}
ROUNDS, TOKENS, WAYS = 11, (512, 2048, 8192), ("ours", "ours_generic", "naive")
SMALL = ("--tokens", "16", "--hidden", "8", "--vocab", "32")
TIME, MEMORY = "time, as a ratio to the bare products", "peak MiB"


def main(bench: Bench) -> None:
    rounds, tokens, shape = (1, (16, 32), SMALL) if bench.small else (ROUNDS, TOKENS, ())
    lines = {d: head("--divergence", d, "--rounds", str(rounds), *shape).splitlines() for d in DIVERGENCES}
    rows = [row(json.loads(some[-1])["sizes"], json.loads(line)) for some in lines.values() for line in some[:-1]]
    bench.write(rows)  # what follows may need more memory than there is
    (bench.results / "head.jsonl").write_text("".join(f"{line}\n" for some in lines.values() for line in some))
    for way in WAYS:
        for n in tokens:
            labels = {"tokens": n, "divergence": "reverse_kl", "way": way}
            rows.append(labels | {MEMORY: float(head("--only", way, *shape, "--tokens", str(n)))})
    bench.write(rows)
    tell(bench)


def head(*options: str) -> str:
    """What head.py prints."""
    line = [sys.executable, str(Path(__file__).with_name("head.py")), *options]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def row(sizes: Row, told: Row) -> Row:
    """A line of results.csv: one way with one divergence, as head.py tells it."""
    labels = {"tokens": sizes["tokens"], "divergence": sizes["divergence"], "way": told["name"]}
    least, greatest = told["spread"]
    return labels | {TIME: told["ratio_to_matmul"], "least": least, "greatest": greatest, MEMORY: told["peak_mib"]}


def tell(bench: Bench) -> None:
    rows = bench.read()
    ways = {r["way"]: {r["divergence"]: r for r in picked(rows, way=r["way"]) if TIME in r} for r in rows}
    memory = {way: {r["tokens"]: r[MEMORY] for r in picked(rows, way=way) if TIME not in r} for way in WAYS}
    for line in map(json.loads, (bench.results / "head.jsonl").read_text().splitlines()):
        if "sizes" in line:
            print(", ".join(f"{name} {value}" for part in line.values() for name, value in part.items()))
    print("\nTime as a ratio to the bare products, median [least, greatest] of the rounds, and peak memory\n")
    cells = {
        way: [f"{r[TIME]:.3f} [{r['least']:.3f}, {r['greatest']:.3f}]" for r in told.values()] for way, told in ways.items()
    }
    lines = ([f"`{way}`", *cells[way], *(f"{r[MEMORY]:.0f} MiB" for r in told.values())] for way, told in ways.items())
    print(table(["way", *DIVERGENCES.values(), *(f"peak, {told}" for told in DIVERGENCES.values())], lines))
    swing = max(r["greatest"] / r["least"] for told in ways.values() for r in told.values())
    print(f"\nGreatest over least round of one way, at most: {swing:.2f}")
    shares(ways)
    print("\nPeak memory by tokens, reverse KL\n")
    grown = ([f"`{way}`", *(f"{v:.0f} MiB" for v in by_tokens.values())] for way, by_tokens in memory.items())
    share = ["`ours` / `naive`", *(ratio(v, memory["naive"][n]) for n, v in memory["ours"].items())]
    print(table(["tokens", *memory["ours"]], [*grown, share]))
    draw(bench.results / "cost.png", ways, memory)


def shares(ways: Mapping[str, Mapping[str, Row]]) -> None:
    """What the closed form needs of the time and memory of the others, and where even its slowest round is faster."""
    print(
        "\nThe closed form's share of the time and peak memory of others; *: its slowest round is faster than their fastest\n"
    )
    lines = []
    for way in [way for way in ways if way != "ours"]:
        pairs = [(ways["ours"][d], ways[way][d]) for d in DIVERGENCES]
        time = [f"{a[TIME] / b[TIME]:.3f}{' *' * (a['greatest'] < b['least'])}" for a, b in pairs]
        lines.append([f"`ours` / `{way}`", *time, *(ratio(a[MEMORY], b[MEMORY]) for a, b in pairs)])
    print(table(["", *DIVERGENCES.values(), *(f"memory, {told}" for told in DIVERGENCES.values())], lines))


def ratio(some: float, other: float) -> str:
    """A share; a shrunken loss may need no memory that can be seen."""
    return f"{some / other:.3f}" if other > 0 else ""


def draw(path: Path, ways: Mapping[str, Mapping[str, Row]], memory: Mapping[str, Mapping[int, float]]) -> None:
    """Time by way and divergence, with the least and the greatest round; memory by the number of tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, (divergence, told) in enumerate(DIVERGENCES.items()):
        mine = [found[divergence] for found in ways.values()]
        ends = [[r[TIME] - r["least"] for r in mine], [r["greatest"] - r[TIME] for r in mine]]
        at = [k + 0.2 * (i - 1) for k in range(len(mine))]
        look = {"fmt": MARKERS[i], "color": COLOURS[i], "markersize": 5, "capsize": 2}
        left.errorbar(at, [r[TIME] for r in mine], ends, label=told, **look)
    left.set_xticks(range(len(ways)), list(ways))
    left.set_ylabel("time / bare products\n(median of rounds, least, greatest)")
    for i, (way, by_tokens) in enumerate(memory.items()):
        right.plot(list(by_tokens), list(by_tokens.values()), marker=MARKERS[i], color=COLOURS[i], label=way)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak memory with reverse KL, MiB")
    right.set_xticks(list(memory["ours"]), list(map(str, memory["ours"])))
    right.xaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    start(main, __file__, tell)
