"""After a narrow fine-tune that broke the prior skills: does OPD from the earlier self bring them back and keep the new skill?

python -m experiments.recovery.run
"""

from collections.abc import Sequence
from itertools import product
from statistics import mean

from experiments.figures import curves
from experiments.grid import Bench, Row, paired, picked, row, spread, start, table

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
PRIORS = ("copy", "reverse", "increment", "sort")
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
        if seed in broken  # `--small` breaks one model only
    ]
    runs = bench.run("recovery", cells)
    rows = [row(labels, run, NUMBERS) for labels, run in runs]
    bench.write(rows)
    bench.write([{**labels, **h} for labels, run in runs for h in run.evaluation["history"]], "history.csv")
    tell(bench)


def tell(bench: Bench) -> None:
    rows, history = bench.read(), bench.read("history.csv")
    every = [(arm, rate) for arm in ARMS for rate in RATES if picked(rows, arm=arm, lr=rate)]
    print("\nBefore and after 60 updates, mean and interval over seeds\n")
    lines = [["broken", "", *means(picked(history, arm="opd", lr=RATES[0], step=0), NUMBERS)]]
    lines += [[f"`{arm}`", rate, *means(picked(rows, arm=arm, lr=rate), NUMBERS)] for arm, rate in every]
    print(table(["", "rate", *NUMBERS], lines))
    print("\nDifference to `sft_on_its_samples`, paired by seed\n")
    others = [(arm, rate) for arm, rate in every if arm != "sft_on_its_samples"]
    told = (
        [f"`{arm}`", rate, *(paired(picked(rows, lr=rate), arm, "sft_on_its_samples", n) for n in NUMBERS)]
        for arm, rate in others
    )
    print(table(["", "rate", *NUMBERS], told))
    print("\nTokens that students wrote, mean over seeds\n")
    print(table(["", "rate", "tokens"], ([f"`{a}`", r, written(picked(rows, arm=a, lr=r))] for a, r in every)))
    along(history)
    by_skill(history)
    panels = {
        f"{name}, rate {rate}": {
            arm: {at: [h[number] for h in picked(history, arm=arm, lr=rate, step=at)] for at in AT} for arm in ARMS
        }
        for rate in RATES
        for name, number in (("prior skills", "prior/accuracy"), ("new skill", "new/accuracy"))
    }
    curves(bench.results / "recovery.png", panels, "updates of recovery", "accuracy (greedy, test prompts)", columns=2)


def along(history: list[Row]) -> None:
    """What the last evaluation does not show: how distillation and SFT get there."""
    shown = ("new/accuracy", "prior/accuracy")
    for rate in RATES:
        print(f"\nDifference to `sft_on_its_samples` along recovery at {rate}, paired by seed\n")
        told = (
            [f"`{a}`, {n}", *(paired(picked(history, lr=rate, step=at), a, "sft_on_its_samples", n) for at in AT[1:])]
            for a in ("opd", "opd_sampled")
            for n in shown
        )
        print(table(["update", *AT[1:]], told))
    print("\nUpdate 20 at 2e-4, mean and interval over seeds\n")
    print(table(["", *shown], ([f"`{a}`", *means(picked(history, arm=a, lr="2e-4", step=20), shown)] for a in ARMS)))
    print("\nAnswers to prompts of the new skill along recovery at 2e-4: tokens, and share in the native style\n")
    told = (
        [f"`{a}`, {n}", *(means(picked(history, arm=a, lr="2e-4", step=at), [n])[0] for at in AT[1:])]
        for a in ("opd", "opd_sampled", "sft_on_its_samples")
        for n in ("new/length", "new/format")
    )
    print(table(["update", *AT[1:]], told))


def by_skill(history: list[Row]) -> None:
    """Each prior skill after the last update, for those that have not all of them back in the native style."""
    for title, number in (("Right answers", "accuracy"), ("Share in the native style", "format"), ("Tokens", "length")):
        print(f"\n{title} by prior skill after 60 updates, mean and interval over seeds\n")
        told = (
            [f"`{a}`", r, *means(picked(history, arm=a, lr=r, step=AT[-1]), [f"prior/{s}/{number}" for s in PRIORS])]
            for a, r in (("opd", "5e-5"), ("opd_sampled", "5e-5"), *product(["grpo"], RATES))
        )
        print(table(["", "rate", *PRIORS], told))


def means(rows: list[Row], numbers: Sequence[str]) -> list[str]:
    """Mean and interval over these rows, number by number; nothing where there are none."""
    return [spread([r[n] for r in rows]) if rows else "" for n in numbers]


def written(rows: list[Row]) -> str:
    """Mean number of tokens that the student wrote in training."""
    return f"{mean(r['student_tokens'] for r in rows):,.0f}"


def original() -> list[str]:
    """Distances are to the model as it was before the narrow fine-tune."""
    model = f"{{_target_:opd_lightning.models.Pretrained,path:'{SHIPPED}'}}"
    return [f"+evaluation.suite.{name}.model={model}" for name in ("start_new", "start_prior")]


if __name__ == "__main__":
    start(main, __file__, tell)
