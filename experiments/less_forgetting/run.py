"""Does self-distillation forget less than SFT, and does distance from the start model tell how much is forgotten?

python -m experiments.less_forgetting.run      # tolerant.py and fragile.py make half of its runs each
"""

from collections.abc import Callable, Sequence
from itertools import product
from statistics import mean

from matplotlib.lines import Line2D

from experiments.figures import arranged
from experiments.grid import Bench, Row, between, paired, picked, row, spread, start, table
from experiments.less_forgetting.law import law
from opd_lightning.report.figures import COLOURS, MARKERS
from opd_lightning.report.runs import Run
from opd_lightning.report.statistics import holm, over_seeds

STARTS = {
    "tolerant-0": [],  # the shipped one; the others are kept, experiments/starts
    "tolerant-1k": ["--seed", "1"],
    "fragile-0k": ["--seed", "0", "--fragile"],
    "fragile-1k": ["--seed", "1", "--fragile"],
}
ARMS = {
    "sft": ["method=sft"],  # demonstrations in the foreign style
    "sft_native": ["method=sft", "task.style=native"],
    "sft_kl": ["method=sft_kl"],
    "sdft": ["method=sdft"],
    "sdft_reverse": ["method=sdft", "loss/divergence=reverse_kl"],
    "opd": ["method=opd"],
    "grpo": ["method=grpo"],
}
NATIVE = ("sft_native", "sdft", "sdft_reverse", "opd", "grpo")  # learn without writing another style
RATES, SEEDS = {"2e-4": "5", "5e-5": "10"}, (0, 1, 2)  # updates between evaluations: about a tenth of a training
PROTOCOL = ["evaluation=study", "~evaluation.suite.teacher", "task.n_eval=128"]
PROTOCOL += [f"evaluation.suite.{name}=32" for name in ("start_new.n", "start_prior.n")]
PROTOCOL += ["evaluation.suite.robustness.n=64", "budget.accuracy=0.95", "budget.in_a_row=1", "trainer.max_steps=150"]
TOLD = {
    "prior/accuracy": "Prior accuracy",
    "prior/format": "Native style on prior prompts",
    "start/new/forward_kl": "KL(start || model) on new prompts, nats per token,",
}
BASELINES = ("sft", "sft_native")
COMPARED = (*(("prior/accuracy", b) for b in BASELINES), ("new/accuracy", "sft"))
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format", "start/new/forward_kl", "start/new/reverse_kl")
NUMBERS += ("start/prior/forward_kl", "robust/mean", "robust/worst")


def grid(bench: Bench, names: Sequence[str] = tuple(STARTS)) -> list[tuple[Row, Run]]:
    """All runs, or those that begin with some of the start models; `robustness` looks at them too."""
    starts = bench.starts({name: STARTS[name] for name in names})
    cells = [
        (
            {"arm": arm, "start": name, "lr": rate, "seed": seed},
            [
                *ARMS[arm],
                f"name={arm}",
                *bench.begin(starts[name]),
                f"optim.lr={rate}",
                f"evaluation.every={RATES[rate]}",
                f"seed={seed}",
                *PROTOCOL,
            ],
        )
        for rate, name, arm, seed in product(RATES, names, ARMS, SEEDS)
        if (arm, rate) != ("grpo", "5e-5")  # eight times the completions, twice the updates: left out for its time
    ]
    return bench.run("less_forgetting", cells)


def main(bench: Bench) -> None:
    runs = grid(bench)
    names = [*NUMBERS, *sorted({k for _, run in runs for k in run.evaluation["end"] if k.startswith("robust/")} - set(NUMBERS))]
    rows = [row(labels, run, names) for labels, run in runs]
    bench.write(rows)
    checkpoints = [
        {**labels, "step": h["step"], **{n: h[n] for n in NUMBERS if n in h}}
        for labels, run in runs
        for h in run.evaluation["history"]
    ]
    bench.write(checkpoints, "checkpoints.csv")
    tell(bench)


def kin(name: str) -> str:
    """A start model's kind and seed; a letter behind them is of the machine that made it."""
    return name.rstrip("ek")


def tell(bench: Bench) -> None:
    rows = bench.read() + bench.earlier()
    checkpoints = bench.read("checkpoints.csv") + bench.earlier("earlier_checkpoints.csv")
    order = [kin(name) for name in STARTS]
    starts = sorted({r["start"] for r in rows}, key=lambda name: (order.index(kin(name)), name))
    for (number, title), rate in product(TOLD.items(), RATES):
        print(f"\n{title} where the new skill is at 0.95, learning rate {rate}; in brackets the runs that reached it\n")
        lines = ([f"`{name}`", *(told(rows, arm, name, rate, number) for arm in ARMS)] for name in starts)
        print(table(["", *ARMS], lines))
    for (number, baseline), rate in product(COMPARED, RATES):
        print(f"\nDifference to `{baseline}` in {number} at {rate}, paired by seed\n")
        mine = [r for r in rows if r["lr"] == rate and r["reached"]]
        arms = [arm for arm in ARMS if arm != baseline]
        lines = ([f"`{s}`", *(paired(picked(mine, start=s), arm, baseline, number) for arm in arms)] for s in starts)
        print(table(["", *arms], lines))
    print("\nOver start models, and over kinds and seeds (means of their start models): mean of the mean differences in")
    print("prior/accuracy at 2e-4, and how many are above 0\n")
    there = [r for r in picked(rows, lr="2e-4") if r["reached"]]
    ways = list(product((str, kin), BASELINES))
    lines = ([f"`{a}`", *(over_starts(there, a, b, of) for of, b in ways)] for a in ARMS if a not in BASELINES)
    print(table(["", *(f"- `{b}`" + ", kinds and seeds" * (of is kin) for of, b in ways)], lines))
    more(rows, starts)
    law(checkpoints, starts, {"between methods": ARMS, "between those that write natively": NATIVE}, next(iter(RATES)), kin)
    forgetting(bench, rows, starts)
    scatter(bench, checkpoints, starts)


def more(rows: list[Row], starts: Sequence[str]) -> None:
    """Differences of losses, of rates and of distances, and which differences to `sft` are left after Holm's adjustment."""
    kept, further = "prior/accuracy", "start/new/forward_kl"
    losses = {
        f"`sdft_reverse` - `sdft` at {rate}": ({"arm": "sdft_reverse", "lr": rate}, {"arm": "sdft", "lr": rate}, kept)
        for rate in RATES
    }
    rates = {f"`{a}`, 5e-5 - 2e-4": ({"arm": a, "lr": "5e-5"}, {"arm": a, "lr": "2e-4"}, kept) for a in ARMS if a != "grpo"}
    ends = {"arm": "sft", "lr": "2e-4"}, {"arm": "sdft", "lr": "2e-4"}
    far = {f"`sft` - `sdft` at 2e-4, {number}": (*ends, number) for number in (kept, further)}
    there = [r for r in rows if r["reached"]]
    for pairs in (losses | far, rates):
        print("\nMore differences where the new skill is at 0.95, paired by seed\n")
        lines = ([f"`{s}`", *(between(picked(there, start=s), *pair) for pair in pairs.values())] for s in starts)
        print(table(["", *pairs], lines))
    print("\np of the differences to `sft` in prior/accuracy at 2e-4, after Holm's adjustment among six\n")
    others = [arm for arm in ARMS if arm != "sft"]
    print(table(["", *others], ([f"`{s}`", *adjust(picked(there, start=s, lr="2e-4"), others)] for s in starts)))


def over_starts(rows: list[Row], arm: str, baseline: str, of: Callable[[str], str]) -> str:
    """Student's t over start models, which are the draws where methods are compared in general, or over groups `of` them."""
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(r["start"] for r in rows):
        kept = {a: [r["prior/accuracy"] for r in picked(rows, start=name, arm=a)] for a in (arm, baseline)}
        if all(kept.values()):
            found.setdefault(of(name), []).append(mean(kept[arm]) - mean(kept[baseline]))
    means = [mean(some) for some in found.values()]
    return f"{spread(means)} ({sum(m > 0 for m in means)} of {len(means)})" if means else ""


def adjust(rows: list[Row], arms: Sequence[str]) -> list[str]:
    """p-values of the arms' differences to `sft`, adjusted for being several; none where a run is missing."""
    kept = {arm: {r["seed"]: r["prior/accuracy"] for r in picked(rows, arm=arm)} for arm in ("sft", *arms)}
    if not all(kept.values()):
        return [""] * len(arms)
    return [f"{p:.3f}" for p in holm([over_seeds(kept[arm], kept["sft"]).p for arm in arms])]


def told(rows: list[Row], arm: str, name: str, rate: str, number: str) -> str:
    """Mean with interval over the seeds that reached the target."""
    mine = picked(rows, arm=arm, start=name, lr=rate)
    if not mine:
        return "not run"
    reached = [r[number] for r in mine if r["reached"]]
    return (f"{spread(reached)}" if reached else "never") + (f" ({len(reached)})" if len(reached) != len(mine) else "")


def forgetting(bench: Bench, rows: list[Row], starts: Sequence[str]) -> None:
    """Prior accuracy at the target by start model, arm and rate; a dot per run, a line at the mean, and how many got there."""
    figure, panels = arranged(starts, 4, (3.2, 3.6), 0.6)
    for axes, name in zip(panels, starts, strict=True):
        for i, (arm, (j, rate)) in enumerate(product(ARMS, enumerate(RATES))):
            mine = [r for r in rows if (r["arm"], r["start"], r["lr"]) == (arm, name, rate)]
            values = [r["prior/accuracy"] for r in mine if r["reached"]]
            colour = COLOURS[list(ARMS).index(arm)]
            if values:
                axes.plot([i] * len(values), values, "os"[j], color=colour, markersize=4, fillstyle="none" if j else "full")
                axes.plot([i - 0.4, i + 0.4], [mean(values)] * 2, color=colour)
            if len(values) < max(1, len(mine)):
                told = f"{len(values)} of {len(mine)}" if values else "never" if mine else "not run"
                axes.text(i, -0.02, told, rotation=90, fontsize=7, color=colour, ha="center", va="top")
        axes.set_xticks([2 * i + 0.5 for i in range(len(ARMS))], list(ARMS), rotation=60, ha="right")
        axes.set_xlim(-1, 2 * len(ARMS))
        axes.set_ylim(-0.25, 1.05)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", alpha=0.25)
    for axes in panels[::4]:
        axes.set_ylabel("accuracy on prior skills when\nthe new one reaches 0.95")
    marks = [Line2D([], [], marker="os"[j], linestyle="", color="black", fillstyle="none" if j else "full") for j in (0, 1)]
    figure.legend(marks, [f"a run at {rate}" for rate in RATES], loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    figure.savefig(bench.results / "forgetting.png", dpi=130)


def scatter(bench: Bench, checkpoints: list[Row], starts: Sequence[str]) -> None:
    """Prior accuracy against distance from the start model on new prompts, every checkpoint of every run."""
    figure, panels = arranged(starts, 4, (3.0, 3.2), 0.6)
    for axes, name in zip(panels, starts, strict=True):
        for i, arm in enumerate(ARMS):
            mine = [c for c in checkpoints if (c["start"], c["arm"]) == (name, arm) and c["step"] > 0]
            axes.plot(
                [c["start/new/forward_kl"] for c in mine],
                [c["prior/accuracy"] for c in mine],
                MARKERS[i],
                color=COLOURS[i],
                markersize=3,
                alpha=0.6,
                linestyle="none",
                label=arm,
            )
        axes.set(xscale="log", title=name, xlabel="KL(start || model), nats per token")
        axes.grid(alpha=0.25)
    for axes in panels[::4]:
        axes.set_ylabel("accuracy on prior skills")
    marks = panels[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside lower right", ncols=len(ARMS), markerscale=2, frameon=False, fontsize=8)
    figure.savefig(bench.results / "law.png", dpi=100)


if __name__ == "__main__":
    start(main, __file__, tell)
