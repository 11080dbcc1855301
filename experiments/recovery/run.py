"""After a narrow fine-tune that broke the prior skills: does OPD from the earlier self bring them back and keep the new skill?

python -m experiments.recovery.run
"""

from itertools import product

from experiments.figures import curves
from experiments.grid import Bench, paired, row, spread, start, table

SHIPPED = "pkg://opd_lightning/assets/world/start"
PRIOR = ["task.train_on=prior", "task.style=native"]
EARLIER = ["teacher=external", f"teacher.path={SHIPPED}", *PRIOR]
ARMS = {
    "opd": ["method=opd", *EARLIER],
    "opd_sampled": ["method=opd_sampled", *EARLIER],
    "sft_on_its_samples": ["method=seqkd", *EARLIER],
    "sft_on_references": ["method=sft", *PRIOR],
    "grpo": ["method=grpo", *PRIOR],
}
RATES, SEEDS = ("5e-5", "2e-4"), (0, 1, 2, 3, 4)
NUMBERS = ("new/accuracy", "prior/accuracy", "prior/format", "start/new/forward_kl", "start/prior/forward_kl")
AT = (0, 10, 20, 30, 40, 50, 60)


def main(bench: Bench) -> None:
    narrow = [
        (
            {"arm": "narrow", "seed": seed},
            ["method=sft", "name=narrow", "optim.lr=4e-4", "trainer.max_steps=60", f"seed={seed}", "evaluation.every=60"],
        )
        for seed in SEEDS
    ]
    broken = {labels["seed"]: run.folder for labels, run in bench.run("recovery-narrow", narrow)}
    cells = [
        (
            {"arm": arm, "lr": rate, "seed": seed},
            [
                *ARMS[arm],
                f"name={arm}",
                f"model.path={broken[seed]}",
                f"optim.lr={rate}",
                f"seed={seed}",
                "trainer.max_steps=60",
                "evaluation=forgetting",
                "~evaluation.suite.teacher",
                "evaluation.every=10",
                *original(),
            ],
        )
        for arm, rate, seed in product(ARMS, RATES, SEEDS)
        if seed in broken
    ]
    runs = bench.run("recovery", cells)
    rows = [row(labels, run, NUMBERS) for labels, run in runs]
    bench.write(rows)
    bench.write([{**labels, **h} for labels, run in runs for h in run.evaluation["history"]], "history.csv")
    print("before and after, mean and interval over seeds\n")
    begins = [run.evaluation["start"] for labels, run in runs if labels["arm"] == "opd" and labels["lr"] == RATES[0]]
    lines = [["broken", "", *(spread([b[n] for b in begins]) for n in NUMBERS)]]
    keys = dict.fromkeys((r["arm"], r["lr"]) for r in rows)
    for arm, rate in keys:
        mine = [r for r in rows if (r["arm"], r["lr"]) == (arm, rate)]
        lines.append([f"`{arm}`", rate, *(spread([r[n] for r in mine]) for n in NUMBERS)])
    print(table(["", "rate", *NUMBERS], lines))
    print("\nDifference to `sft_on_its_samples`, paired by seed\n")
    told = (
        [f"`{a}`", rate, *(paired([r for r in rows if r["lr"] == rate], a, "sft_on_its_samples", n) for n in NUMBERS)]
        for a, rate in keys
        if a != "sft_on_its_samples"
    )
    print(table(["", "rate", *NUMBERS], told))
    panels = {
        f"{name}, rate {rate}": {
            arm: {
                at: [h[number] for c, run in runs for h in run.evaluation["history"] if at_(c, h) == (arm, rate, at)]
                for at in AT
            }
            for arm in ARMS
        }
        for rate in RATES
        for name, number in (("prior skills", "prior/accuracy"), ("new skill", "new/accuracy"))
    }
    curves(bench.results / "recovery.png", panels, "updates of recovery", "accuracy (greedy, test prompts)")


def original() -> list[str]:
    """Distances are to the model as it was before the narrow fine-tune."""
    model = f"{{_target_:opd_lightning.models.Pretrained,path:'{SHIPPED}'}}"
    return [f"+evaluation.suite.{name}.model={model}" for name in ("start_new", "start_prior")]


def at_(labels, measured) -> tuple:
    return labels["arm"], labels["lr"], measured["step"]


if __name__ == "__main__":
    start(main, __file__)
