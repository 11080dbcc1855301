"""What users add from outside, in docs/examples: each runs through --config-dir."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
CASES = {
    "divergence": ["loss/divergence=hellinger"],
    "gate": ["loss/gate=unsure"],
    "gate_with_verdicts": ["method=grpo_opd", "loss/gate=unsure"],
    "teacher": ["teacher=unigram"],
    "generator": ["generator=logged"],
    "environment": ["method=grpo", "environment=ask_again", "rollout.sampling.max_new_tokens=12"],
    "task": ["method=sft", "task=last_digit", "evaluation=shortest"],
    "evaluation": ["evaluation=shortest"],
    "weight": ["loss/weight=later"],
    "rollout": ["rollout=warmer"],
    "context": ["method=sdft", "context=hint"],
    "callback": ["callbacks=longest"],
    "method": ["method=hinted"],
    "verifier": ["method=grpo", "task=table", "task.path=rows.jsonl", "task/verifier=same_digits", "task.max_new_tokens=8"],
}


SLOW = ("weight", "rollout", "context", "callback", "method", "verifier")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_an_example_runs(case, command, tmp_path, monkeypatch):
    """Two updates with the examples' folder as --config-dir, in an empty folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"rotate {' '.join(f'{i:05}')}", "answer": f"{i:05}"} for i in range(1000, 1100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = [] if case in ("task", "verifier") else ["task.n_eval=8", "task.n_train=16"]
    scheduled = ["evaluation.every=1"]
    code, output, files = command(f"--config-dir={EXAMPLES / 'conf'}", "trainer.max_steps=2", *scheduled, *small, *CASES[case])
    assert code == 0 and "evaluation.json" in files, output
    assert "shortest" in output if "evaluation=shortest" in CASES[case] else True
    if case == "generator":
        assert (tmp_path / "written.jsonl").read_text().count("\n") > 8


def test_every_option_of_the_examples_is_run():
    files = sorted(path.relative_to(EXAMPLES / "conf") for path in (EXAMPLES / "conf").glob("**/*.yaml"))
    used = {override for case in CASES.values() for override in case}
    assert files and {f"{path.parent}={path.stem}" for path in files} <= used
