"""The dial: how often must a model go by a demonstration before self-distillation is as good as SFT?

python -m experiments.in_context.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, Row, paired, row, spread, start, table
from experiments.less_forgetting.run import STARTS
from experiments.likely import right_answers
from opd_lightning.tasks.world import WorldTask

BASES = {name: STARTS[name] for name in ("tolerant-0", "fragile-0")}
MORE = ("--steps", "200", "--teacher-steps", "0")
OBEY = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
ARMS, RATES, SEEDS = ("sft", "sdft"), ("2e-4",), (0, 1, 2)
UPDATES = 60
PROTOCOL = ["evaluation.every=20", f"trainer.max_steps={UPDATES}", "task.n_eval=128"]
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format")


def main(bench: Bench) -> None:
    bases = bench.starts(BASES)
    options = {
        f"{base}-obey-{p}": [*BASES[base], "--base", f"{bases[base]}/start", "--obey", str(p), *MORE]
        for base, p in product(BASES, OBEY)
    }
    starts = bench.starts(options, last="start")
    shown = {name: right_answers(folder / "start", WorldTask(n_eval=128), shown=True) for name, folder in starts.items()}
    cells = [
        (
            {"arm": arm, "start": base, "obey": p, "lr": rate, "seed": seed},
            [
                f"method={arm}",
                f"name={arm}",
                f"model.path={starts[f'{base}-obey-{p}']}/start",
                f"optim.lr={rate}",
                f"seed={seed}",
                *PROTOCOL,
            ],
        )
        for rate, base, p, arm, seed in product(RATES, BASES, OBEY, ARMS, SEEDS)
    ]
    rows = []
    for labels, run in bench.run("in_context", cells):
        told = row(labels | {"shown": round(shown[f"{labels['start']}-obey-{labels['obey']}"], 4)}, run, NUMBERS)
        rows.append(told | {"both": (told["new/accuracy"] + told["prior/accuracy"]) / 2})
    bench.write(rows)
    for rate, base in product(RATES, BASES):
        print(f"\n{base} at {rate}: after {UPDATES} updates; differences `sdft` - `sft`\n")
        header = ["obeys", "right when shown", *(f"`{arm}` {n}" for arm in ARMS for n in ("new", "prior"))]
        lines = (line([r for r in rows if (r["lr"], r["start"], r["obey"]) == (rate, base, p)], p) for p in OBEY)
        print(table([*header, "new", "prior", "mean of both"], lines))
    panels = {f"{base}, {rate}": differences(rows, base, rate) for base, rate in product(BASES, RATES)}
    curves(bench.results / "in_context.png", panels, "P(right answer | demonstration)", f"sdft - sft, after {UPDATES} updates")


def line(mine: list[Row], p: float) -> list[str]:
    """A line of the table: what the runs of one start model and rate ended with."""
    if not mine:
        return [str(p)]
    arms = [
        spread([r[n] for r in mine if r["arm"] == arm]) if any(r["arm"] == arm for r in mine) else ""
        for arm in ARMS
        for n in ("new/accuracy", "prior/accuracy")
    ]
    return [str(p), f"{mine[0]['shown']:.3f}", *arms, *(paired(mine, "sdft", "sft", n) for n in (*NUMBERS[:2], "both"))]


def differences(rows: list[Row], base: str, rate: str) -> dict[str, dict[float, list[float]]]:
    """`sdft` - `sft` at each setting of the dial, a value per seed."""
    found: dict[str, dict[float, list[float]]] = {name: {} for name in ("new skill", "prior skills", "mean of both")}
    mine = [r for r in rows if (r["start"], r["lr"]) == (base, rate)]
    for name, number in zip(found, (*NUMBERS[:2], "both"), strict=True):
        value = {(r["arm"], r["obey"], r["seed"]): r[number] for r in mine}
        for r in (r for r in mine if r["arm"] == "sdft" and ("sft", r["obey"], r["seed"]) in value):
            at = found[name].setdefault(r["shown"], [])
            at.append(r[number] - value["sft", r["obey"], r["seed"]])
    return found


if __name__ == "__main__":
    start(main, __file__)
