"""SmolLM2, shown a rule, as the teacher of itself without the rule: context distillation against SFT on its answers, with LoRA.

make smollm2; python -m experiments.smollm2_rule.run
"""

from experiments.courses import along, courses, differences
from experiments.figures import dots
from experiments.grid import Bench, row, start, table

SEEDS = (0, 1, 2)
LORA = ["experiment=smollm2_rule", "adapter=lora", "optim.lr=1e-3", "trainer.max_steps=20", "evaluation.every=20"]
ARMS = {
    "context_distillation": [],
    "sft_on_its_answers": ["method=seqkd", "loss/divergence=none", "teacher=frozen", "context=rule"],
}
NUMBERS = {
    "general/accuracy": "obeys the rule",
    "heldout/reverse_kl": "KL(student || prompted teacher)",
    "heldout/forward_kl": "KL(prompted teacher || student)",
    "heldout/log_likelihood": "log-likelihood of ordinary answers",
}
STAND_IN = "stand-in://llama"
SMALL = (
    f"model.path={STAND_IN}",
    f"model.teacher={STAND_IN}",
    "trainer.max_steps=1",
    "data.batch_size=2",
    "evaluation.every=1",
    "evaluation.suite.divergence.n=2",
)


def main(bench: Bench) -> None:
    cells = [
        ({"arm": arm, "seed": seed}, [*LORA, *given, f"name={arm}", f"seed={seed}", "~evaluation.suite.teacher"])
        for seed in SEEDS
        for arm, given in ARMS.items()
    ]
    runs = bench.run("smollm2_rule", cells, SMALL)
    bench.write([row(labels, run, NUMBERS) for labels, run in runs])
    rows = courses(runs, NUMBERS)
    bench.write(rows, "courses.csv")
    print(table(["", "update", *NUMBERS.values()], along(rows, NUMBERS)))
    print("\nDifference of `context_distillation` to `sft_on_its_answers`, paired by seed\n")
    told = differences(rows, "context_distillation", "sft_on_its_answers", NUMBERS)
    print(table(["update", *NUMBERS.values()], told))
    last = max(r["update"] for r in rows)
    panels = {
        title: {arm: [r[n] for r in rows if (r["arm"], r["update"]) == (arm, last)] for arm in ARMS}
        for n, title in list(NUMBERS.items())[1:3]
    }
    dots(bench.results / "rule.png", panels, "nats per token, after 20 updates")


if __name__ == "__main__":
    start(main, __file__)
