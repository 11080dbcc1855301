"""SmolLM2 after a fine-tune that broke it: does OPD from the original, on other prompts, repair it?

make smollm2; python -m experiments.smollm2_recovery.run
"""

import json
from pathlib import Path

from experiments.courses import along, courses
from experiments.figures import curves
from experiments.grid import Bench, between, picked, row, start, table

SEEDS = (0, 1, 2)
BROKEN = ["experiment=smollm2_narrow", "name=narrow"]
RECOVERY = ["experiment=smollm2_opd", "start_from=null"]
NUMBERS = {
    "heldout/reverse_kl": "KL(student || original)",
    "heldout/forward_kl": "KL(original || student)",
    "heldout/log_likelihood": "log-likelihood of ordinary answers",
}
ANSWERS = (
    "evaluation.answers={_target_:opd_lightning.evaluation.GreedyAnswers,max_new_tokens:40,split:test,n:6,template_options:{}}"
)
STAND_IN = "stand-in://llama"
SMALL = (f"model.teacher={STAND_IN}/1", "trainer.max_steps=1", "data.batch_size=2", "evaluation.every=1")


def main(bench: Bench) -> None:
    cells = [({"arm": "narrow", "seed": seed}, [*BROKEN, f"seed={seed}", ANSWERS]) for seed in SEEDS]
    first = bench.run("smollm2_recovery-narrow", cells, (f"model.path={STAND_IN}", *SMALL))
    broken = {labels["seed"]: run.folder for labels, run in first}
    cells = [
        ({"arm": "opd", "seed": seed}, [*RECOVERY, "name=opd", f"seed={seed}", f"model.path={folder}", ANSWERS])
        for seed, folder in broken.items()
    ]
    second = bench.run("smollm2_recovery", cells, (*SMALL, "evaluation.suite.divergence.n=2"))
    bench.write([row(labels, run, NUMBERS) for labels, run in first + second])
    bench.write(courses(first + second, NUMBERS), "courses.csv")
    answers(bench.results / "answers.md", {labels["arm"]: run.folder for labels, run in first + second if labels["seed"] == 0})
    tell(bench)


def tell(bench: Bench) -> None:
    rows = bench.read("courses.csv")
    print("\nBefore and after, means and intervals over seeds\n")
    print(table(["", "update", *NUMBERS.values()], along(rows, NUMBERS)))
    course = picked(rows, arm="opd")
    updates = sorted({r["update"] for r in course})
    end, begin, original = ({"arm": "opd", "update": updates[-1]}, {"arm": "opd", "update": 0}, {"arm": "narrow", "update": 0})
    print("\nDifference of the end to the beginning and to the original, paired by seed\n")
    lines = (
        [f"to the {name}", *(between(rows, end, other, n) for n in NUMBERS)]
        for name, other in {"beginning": begin, "original": original}.items()
    )
    print(table(["", *NUMBERS.values()], lines))
    panels = {title: {"opd": {u: [r[n] for r in picked(course, update=u)] for u in updates}} for n, title in NUMBERS.items()}
    curves(bench.results / "recovery.png", panels, "updates of recovery", "nats per token", share=False)


def answers(path: Path, runs: dict[str, Path]) -> None:
    """The same held-out prompts answered by the original, the broken and the recovered model."""
    told = {arm: json.loads((folder / "answers.json").read_text()) for arm, folder in runs.items()}
    columns = {"prompt": told["narrow"]["prompts"], "original": told["narrow"]["start"]}
    columns |= {"after the narrow SFT" if arm == "narrow" else f"`{arm}`": said["end"] for arm, said in told.items()}
    cells = ([cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in zip(*columns.values(), strict=True))
    path.write_text("\n".join(["Greedy, at most 40 new tokens, seed 0.", "", table(list(columns), cells), ""]))


if __name__ == "__main__":
    start(main, __file__, tell)
