"""SmolLM2 after a fine-tune that broke it: does OPD from the original, on other prompts, repair it?

make smollm2; python -m experiments.smollm2_recovery.run
"""

import json
from pathlib import Path

from experiments.courses import along, courses, differences
from experiments.figures import curves
from experiments.grid import Bench, row, start, table

SEEDS = (0, 1, 2)
BROKEN = ["experiment=smollm2_narrow", "name=narrow"]
RECOVERY = ["experiment=smollm2_opd", "start_from=null"]
ARMS = {"opd": [], "sft_on_its_samples": ["method=seqkd", "teacher=external"]}
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
        (
            {"arm": arm, "seed": seed},
            [*RECOVERY, *given, f"name={arm}", f"seed={seed}", f"model.path={broken[seed]}", ANSWERS],
        )
        for arm, given in ARMS.items()
        for seed in broken
    ]
    second = bench.run("smollm2_recovery", cells, (*SMALL, "evaluation.suite.divergence.n=2"))
    bench.write([row(labels, run, NUMBERS) for labels, run in first + second])
    rows = courses(first + second, NUMBERS)
    bench.write(rows, "courses.csv")
    print(table(["", "update", *NUMBERS.values()], along(rows, NUMBERS)))
    print("\nDifference of `opd` to `sft_on_its_samples`, paired by seed\n")
    print(table(["update", *NUMBERS.values()], differences(rows, "opd", "sft_on_its_samples", NUMBERS)))
    answers(bench.results / "answers.md", {labels["arm"]: run.folder for labels, run in first + second if labels["seed"] == 0})
    panels = {
        title: {arm: {u: [c[n] for c in rows if (c["arm"], c["update"]) == (arm, u)] for u in (0, 10, 20)} for arm in ARMS}
        for n, title in list(NUMBERS.items())[:2]
    }
    curves(bench.results / "recovery.png", panels, "updates of recovery", "nats per token")


def answers(path: Path, runs: dict[str, Path]) -> None:
    """The same held-out prompts answered by the original, the broken and the recovered models."""
    told = {arm: json.loads((folder / "answers.json").read_text()) for arm, folder in runs.items()}
    columns = {"prompt": told["narrow"]["prompts"], "original": told["narrow"]["start"]}
    columns |= {"after the narrow SFT" if arm == "narrow" else f"`{arm}`": said["end"] for arm, said in told.items()}
    cells = ([cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in zip(*columns.values(), strict=True))
    path.write_text("\n".join(["Greedy, at most 40 new tokens, seed 0.", "", table(list(columns), cells), ""]))


if __name__ == "__main__":
    start(main, __file__)
