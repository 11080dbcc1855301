"""SmolLM2 after a fine-tune on facts: does OPD from the original, on other prompts, bring the rest back and keep the facts?

make smollm2; python -m experiments.smollm2_keep.run
"""

from experiments.courses import along, courses, differences
from experiments.figures import curves
from experiments.grid import Bench, row, start, table
from experiments.smollm2_keep.mix import mixed

SEEDS = (0, 1, 2)
RECOVERY = ["experiment=smollm2_keep", "start_from=null", "trainer.max_steps=20", "evaluation.every=20"]
ARMS = {"opd": [], "sft_on_its_samples": ["method=seqkd", "teacher=external"]}
NUMBERS = {
    "new/accuracy": "facts known",
    "start/all/reverse_kl": "KL(model || original)",
    "start/all/forward_kl": "KL(original || model)",
    "heldout/log_likelihood": "log-likelihood of ordinary answers",
}
STAND_IN = "stand-in://llama"
SMALL = (
    f"model.teacher={STAND_IN}",
    "trainer.max_steps=1",
    "data.batch_size=2",
    "evaluation.every=1",
    "evaluation.suite.original.n=2",
)


def main(bench: Bench) -> None:
    rows_of_both = bench.out / "smollm2_keep-mixed.jsonl"
    mixed(rows_of_both, STAND_IN if bench.small else "models/smollm2-135m-instruct")
    taught = {"narrow": [], "mixed": [f"task.path={rows_of_both}"]}
    first = bench.run(
        "smollm2_keep-facts",
        [
            ({"arm": arm, "seed": seed}, ["experiment=smollm2_facts", f"name={arm}", f"seed={seed}", *given])
            for arm, given in taught.items()
            for seed in SEEDS
            if arm == "narrow" or seed == 0  # the control is made once
        ],
        (f"model.path={STAND_IN}", *SMALL),
    )
    narrow = {labels["seed"]: run.folder for labels, run in first if labels["arm"] == "narrow"}
    cells = [
        ({"arm": arm, "seed": seed}, [*RECOVERY, *given, f"name={arm}", f"seed={seed}", f"model.path={narrow[seed]}"])
        for arm, given in ARMS.items()
        for seed in narrow
    ]
    second = bench.run("smollm2_keep", cells, SMALL)
    bench.write([row(labels, run, NUMBERS) for labels, run in first + second])
    rows = courses(first + second, NUMBERS)
    bench.write(rows, "courses.csv")
    print(table(["", "update", *NUMBERS.values()], along(rows, NUMBERS)))
    print("\nDifference of `opd` to `sft_on_its_samples`, paired by seed\n")
    print(table(["update", *NUMBERS.values()], differences(rows, "opd", "sft_on_its_samples", NUMBERS)))
    panels = {
        title: {arm: {u: [c[n] for c in rows if (c["arm"], c["update"]) == (arm, u)] for u in (0, 20)} for arm in ARMS}
        for n, title in NUMBERS.items()
    }
    axes = ("updates of recovery", "share, or nats per token")
    curves(bench.results / "keep.png", panels, *axes, columns=2, share=False)


if __name__ == "__main__":
    start(main, __file__)
