"""SmolLM2 after a fine-tune on facts: does OPD from the original, on other prompts, bring the rest back and keep the facts?

make smollm2; python -m experiments.smollm2_keep.run
"""

from itertools import combinations

from experiments.courses import along, courses
from experiments.figures import curves
from experiments.grid import Bench, Row, paired, picked, row, spread, start, table
from experiments.looks import ADDED, FIRST, SEEDS, difference, of
from experiments.smollm2_keep.mix import mixed
from opd_lightning.evaluation.estimate import Estimate

HERE, EARLIER = "third machine", {"second machine": "second_machine.csv", "first machine": "first_machine.csv"}
"""Kinds of processor; of the earlier ones only numbers are kept, of FIRST."""
LOOKS = 3  # at FIRST on either earlier machine, and at all seeds
RECOVERY = ["experiment=smollm2_keep", "start_from=null", "trainer.max_steps=20", "evaluation.every=20"]
ARMS = {"opd": [], "sft_on_its_samples": ["method=seqkd", "teacher=external"]}
COMPARED = (tuple(ARMS), *((arm, other) for other in ("narrow", "original") for arm in ARMS), ("mixed", "narrow"))
FIRST_RUN = {"smollm2_keep": "opd", "smollm2_keep_sft": "sft_on_its_samples"}  # what first_run.csv calls the arms
NUMBERS = {
    "new/accuracy": "facts known",
    "start/all/reverse_kl": "KL(model || original)",
    "start/all/forward_kl": "KL(original || model)",
    "heldout/log_likelihood": "log-likelihood of ordinary answers",
}
DAMAGE = dict(list(NUMBERS.items())[1:])
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
    bench.write(courses(first + second, NUMBERS), "courses.csv")
    tell(bench)


def tell(bench: Bench) -> None:
    rows, ends = bench.read("courses.csv"), bench.read()
    earlier = {machine: bench.earlier(file) for machine, file in EARLIER.items()}
    machines = {HERE: ends} | {machine: some for machine, some in earlier.items() if some}
    print("\nBefore and after, means and intervals over seeds\n")
    print(table(["", "update", *NUMBERS.values()], along(rows, NUMBERS)))
    original = [r | {"arm": "original"} for r in picked(rows, arm="narrow", update=0)]
    for machine, some in machines.items():
        print(f"\nDifferences at the end, paired by seed, {machine}\n")
        print(table(["", *NUMBERS.values()], differences(some + (original if machine == HERE else []))))
    print("\n`opd` - `sft_on_its_samples` by machine and by when the seeds were decided on\n")
    print(table(["", *DAMAGE.values()], looks(machines)))
    print("\nEach run on one machine less the same run on another, and the tokens that it wrote in training on each\n")
    print(table(["", *NUMBERS.values(), "tokens written"], moved(machines)))
    if first := first_run(bench):
        print("\nThe first run of seed 0, with 30 updates of recovery; facts known with Wilson's interval over 16 questions\n")
        print(table(["", "update", *NUMBERS.values()], first))
    print("\nWhat a recovery took, mean and interval over seeds\n")
    costs = {arm: [r["flops"] / 1e12 for r in picked(ends, arm=arm)] for arm in ARMS}
    print(table(["", "1e12 FLOPs"], ([f"`{arm}`", spread(cost, 1)] for arm, cost in costs.items())))
    updates = sorted({r["update"] for r in rows if r["arm"] in ARMS})
    panels = {
        title: {arm: {u: [r[n] for r in picked(rows, arm=arm, update=u)] for u in updates} for arm in ARMS}
        for n, title in NUMBERS.items()
    }
    axes = ("updates of recovery", "share, or nats per token")
    curves(bench.results / "keep.png", panels, *axes, columns=2, share=False)


def differences(ends: list[Row]) -> list[list[str]]:
    """Lines of a table: differences of the arms that are compared, where both are there."""
    lines = [[f"`{a}` - `{b}`", *(paired(ends, a, b, n) for n in NUMBERS)] for a, b in COMPARED]
    return [line for line in lines if any(line[1:])]


def looks(machines: dict[str, list[Row]]) -> list[list[str]]:
    """Lines of a table: the two recoveries by machine and seeds, for only ADDED is free of the looks at FIRST; each pair."""
    here, added = machines[HERE], of(machines[HERE], ADDED)
    some = {f"{HERE}, all five": here, f"{HERE}, 3 and 4, added": added}
    for machine, rows in machines.items():
        some[f"{machine}, 0 to 2"] = first = of(rows, FIRST)
        if machine != HERE:  # would the verdict of five have turned, too?
            some[f"{machine}, 0 to 2, and {HERE}, 3 and 4"] = first + added
    some |= {f"{machine}, seed {seed}": picked(rows, seed=seed) for machine, rows in machines.items() for seed in SEEDS}
    lines = [[told, *(paired(rows, *COMPARED[0], n) for n in DAMAGE)] for told, rows in some.items()]
    lines.append([f"p of {HERE}, all five, times {LOOKS}", *(adjusted(here, n) for n in DAMAGE)])
    return [line for line in lines if any(line[1:])]


def adjusted(ends: list[Row], number: str) -> str:
    """p of the two recoveries' difference times the looks (Bonferroni)."""
    told = difference(ends, *COMPARED[0], number)
    return f"{min(1.0, LOOKS * told.p):.3f}" if told else ""


def moved(machines: dict[str, list[Row]]) -> list[list[str]]:
    """Lines of a table: how far each run is from the same run on another kind of processor."""
    lines = []
    for (one, some), (another, others) in combinations(machines.items(), 2):
        for mine in some:
            for other in picked(others, arm=mine["arm"], seed=mine["seed"]):
                apart = (f"{mine[n] - other[n]:+.4f}" for n in NUMBERS)
                tokens = f"{mine['student_tokens']} and {other['student_tokens']}"
                lines.append([f"`{mine['arm']}`, seed {mine['seed']}, {one} - {another}", *apart, tokens])
    return lines


def first_run(bench: Bench) -> list[list]:
    """Lines of a table: the recoveries of the first run, from a file that no command makes any more; none without it."""
    lines = []
    for r in bench.earlier("first_run.csv"):
        if r["name"] in FIRST_RUN and r["update"]:
            numbers = (Estimate(r[n], low=r.get(f"{n}/low"), high=r.get(f"{n}/high")) for n in NUMBERS)
            lines.append([f"`{FIRST_RUN[r['name']]}`", r["update"], *numbers])
    return lines


if __name__ == "__main__":
    start(main, __file__, tell)
