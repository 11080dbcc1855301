"""SmolLM2, shown a rule, as the teacher of itself without the rule: context distillation against SFT on its answers, with LoRA.

make smollm2; python -m experiments.smollm2_rule.run
"""

from experiments.courses import along, courses
from experiments.figures import dots
from experiments.grid import Bench, Row, paired, picked, row, spread, start, table
from opd_lightning.evaluation.estimate import Estimate

SEEDS = (0, 1, 2)
LORA = ["experiment=smollm2_rule", "adapter=lora", "optim.lr=1e-3", "trainer.max_steps=20", "evaluation.every=20"]
ARMS = {
    "context_distillation": [],
    "sft_on_its_answers": ["method=seqkd", "loss/divergence=none", "teacher=frozen", "context=rule"],
}
COMPARED = (tuple(ARMS), *((arm, "start model") for arm in ARMS))
FIRST = {"smollm2_rule": "`context_distillation`", "smollm2_rule_sft": "`sft_on_its_answers`"}  # what first.csv calls them
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
    bench.write(courses(runs, NUMBERS), "courses.csv")
    tell(bench)


def tell(bench: Bench) -> None:
    rows, ends = bench.read("courses.csv"), bench.read()
    print("\nBefore and after, means and intervals over seeds\n")
    print(table(["", "update", *NUMBERS.values()], along(rows, NUMBERS)))
    ends += [r | {"arm": "start model"} for r in picked(rows, arm="context_distillation", update=0)]
    print("\nDifferences at the end, paired by seed\n")
    lines = [[f"`{a}` - `{b}`", *(paired(ends, a, b, n) for n in NUMBERS)] for a, b in COMPARED]
    lines += [[f"{lines[0][0]}, seed {s}", *(paired(picked(ends, seed=s), *COMPARED[0], n) for n in NUMBERS)] for s in SEEDS]
    print(table(["", *NUMBERS.values()], lines))
    print("\nWhat a run took, mean and interval over seeds\n")
    costs = {arm: [(r["student_tokens"], r["flops"] / 1e12) for r in picked(ends, arm=arm)] for arm in ARMS}
    lines = ([f"`{arm}`", *(spread(some, 1) for some in zip(*cost, strict=True))] for arm, cost in costs.items())
    print(table(["", "tokens by the student", "1e12 FLOPs"], lines))
    if first := first_runs(bench):
        print("\nThe first runs with all weights, seed 0; obedience with Wilson's interval over 120 prompts\n")
        print(table(["", "update", *NUMBERS.values()], first))
    panels = {
        title: {arm: [r[n] for r in picked(ends, arm=arm)] for arm in ("start model", *ARMS)}
        for n, title in list(NUMBERS.items())[1:3]
    }
    dots(bench.results / "rule.png", panels, "nats per token")


def first_runs(bench: Bench) -> list[list]:
    """Lines of a table: who taught the first runs, and they, from a file that no command makes any more; none without it."""
    rows = [r for r in bench.earlier("first.csv") if r["name"] in FIRST]
    shown = [["start model, shown the rule", "", estimate(r, "teacher/shown/accuracy"), "", "", ""] for r in rows[:1]]
    return shown + [[FIRST[r["name"]], r["update"], *(estimate(r, n) for n in NUMBERS)] for r in rows]


def estimate(r: Row, number: str) -> Estimate:
    """A number of one run, with its interval over prompts if that was written."""
    return Estimate(r[number], low=r.get(f"{number}/low"), high=r.get(f"{number}/high"))


if __name__ == "__main__":
    start(main, __file__, tell)
