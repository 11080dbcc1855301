"""Everything a user can get wrong: a sentence with field, value and remedy, an exit code, and no file but a status."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from opd_lightning.toy.world import VOCABULARY


def rows(path: Path, *lines: object) -> str:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


QUESTIONS = [{"prompt": f"sort {i} {i} 2 1 {i}", "completion": "answer 1 2", "answer": "1 2"} for i in range(9)]


def table(tmp_path: Path, *lines: object, columns: str = "prompt: prompt") -> list[str]:
    return ["task=table", f"task.path={rows(tmp_path / 'rows.jsonl', *lines)}", f"task.columns={{{columns}}}"]


def experiment(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "typo.yaml").write_text(f"# @package _global_\n{text}\n")
    return [f"--config-dir={tmp_path / 'mine'}", "experiment=typo"]


def stranger(tmp_path: Path) -> str:
    """A model whose tokenizer has another vocabulary."""
    from transformers import AutoTokenizer

    from tests.conftest import save_tiny

    folder = save_tiny(tmp_path / "stranger", seed=2)
    path = Path(folder) / "tokenizer.json"
    path.write_text(path.read_text().replace('"red"', '"scarlet"'))
    assert "scarlet" in AutoTokenizer.from_pretrained(folder).get_vocab()
    return folder


def a_file(tmp_path: Path) -> str:
    (tmp_path / "a_file").write_text("")
    return str(tmp_path / "a_file")


NAMES = {
    "method": (["method=sfdt"], "method=sfdt is no option of method; did you mean sft?"),
    "option": (
        ["loss/divergence=revers_kl"],
        "loss/divergence=revers_kl is no option of loss/divergence; did you mean reverse_kl?",
    ),
    "key": (["optim.lrr=1"], "optim.lrr=1 is no key; did you mean optim.lr?"),
    "group": (["metod=sft"], "metod=sft is no key; did you mean method?"),
    "key_of_nothing": (
        ["method=sft", "teacher.path=x"],
        "teacher is null; the key belongs to teacher=cached or",
    ),
    "key_in_a_sweep": (["-m", "method=sft,gkd", "rollout.share=0.25"], "rollout.share=0.25 is no key under method=sft"),
    "grammar": (["optim.lr=[1"], "no viable alternative at input '[1'"),
}


@pytest.mark.parametrize(("arguments", "sentence"), NAMES.values(), ids=NAMES.keys())
def test_unknown_names_are_told_before_anything_is_composed(command, arguments, sentence):
    code, output, files = command(*arguments)
    assert code == 1 and sentence in output and "Traceback" not in output and files == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method=sfdt"], "method=sfdt is no option of method; did you mean sft?"),
        (["optim.lrr=1"], "optim.lrr=1 is no key; did you mean optim.lr?"),
        (["experiment=typp"], "experiment=typp is no option of experiment; did you mean typo?"),
        (["experiment=bad"], "override method: sfdt is no option of method; did you mean sft?"),
        (["experiment=broken"], "a configuration file is no YAML"),
    ],
)
def test_unknown_names_beside_a_folder_of_ones_own(command, tmp_path, words, sentence):
    arguments = experiment(tmp_path, "name: typo")
    (tmp_path / "mine" / "experiment" / "bad.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /method: sfdt\nname: bad\n"
    )
    (tmp_path / "mine" / "experiment" / "broken.yaml").write_text("name: [\n")
    chosen = [a for a in arguments if not (a.startswith("experiment=") and words[0].startswith("experiment="))]
    code, output, files = command(*chosen, *words)
    assert code == 1 and sentence in output and "Traceback" not in output and files == []


def test_a_sweep_over_a_pattern_is_hydras_to_fill_in(command):
    code, output, _ = command("-m", "method=glob(sf*)", "trainer.max_steps=1", "task.n_train=16", "task.n_eval=8")
    assert code == 0 and "sft_kl, seed 0" in output and "Traceback" not in output


def test_a_sweep_with_an_unknown_option_is_refused_as_a_whole(command):
    """Before its first cell: nothing that was begun is ended."""
    code, output, files = command("-m", "method=sft,opdd", "trainer.max_steps=1")
    assert code == 1 and "method=opdd is no option of method; did you mean opd?" in output and files == []


INPUTS = {
    "typo_in_an_experiment": (
        lambda t: experiment(t, "name: typo\noptim: {lrr: 1}"),
        r"optim.lrr=1 is no option of .*did you mean lr\?",
        0,
    ),
    "key_typo_in_an_experiment": (
        lambda t: experiment(t, "name: typo\nmicro_token: 1"),
        r"micro_token=1 is no key of a run; did you mean max_tokens_per_microbatch\?",
        0,
    ),
    "keys_of_plain_nodes": (
        lambda t: experiment(t, "name: typo\ndata: {batchsize: 4}"),
        r"data.batchsize=4 is no key; did you mean batch_size",
        0,
    ),
    "key_of_the_evaluation": (
        lambda t: experiment(t, "name: typo\nevaluation: {evry: 4}"),
        r"evaluation.evry=4 is no key; did you mean every",
        0,
    ),
    "callback_typo": (
        lambda t: experiment(t, "name: typo\ncallbacks: {sampels: {every: 4}}"),
        r"callbacks.sampels is no callback; did you mean samples",
        0,
    ),
    "text_for_a_number": (lambda t: ["data.batch_size=abc"], r"data.batch_size='abc' should be int", 0),
    "fraction_for_a_number": (lambda t: ["rollout.num_generations=2.5"], r"rollout.num_generations=2.5 should be int", 0),
    "text_for_a_rate": (lambda t: ["optim.lr=abc"], r"optim.lr='abc' should be float", 0),
    "text_for_a_coefficient": (
        lambda t: ["loss.coefficients.divergence=abc"],
        r"loss.coefficients.divergence='abc' must be a number",
        1,
    ),
    "reinforce_with_one": (
        lambda t: ["method=reinforce", "data.batch_size=1"],
        r"data.batch_size=1 leaves REINFORCE without a baseline",
        0,
    ),
    "beta": (lambda t: ["loss/divergence=jsd", "loss.divergence.beta=2"], r"loss.divergence.beta=2 must lie in \[0, 1\]", 1),
    "support": (
        lambda t: ["method=opd_topk", "loss.vocab_support.k=33"],
        r"loss.vocab_support.k=33 exceeds the 32 tokens that are compared",
        1,
    ),
    "nothing_to_minimise": (lambda t: ["loss.coefficients.divergence=0"], r"the loss has no term", 1),
    "pattern": (
        lambda t: [
            "task/verifier=regex",
            "task.verifier.pattern='('",
            *table(t, *QUESTIONS, columns="prompt: prompt, answer: answer"),
        ],
        r"task.verifier.pattern='\(' is no regular expression",
        1,
    ),
    "mixture_without_a_student": (
        lambda t: ["method=gkd", "rollout.share=0", "budget.student_tokens=50"],
        r"budget.student_tokens=50 never ends method=gkd",
        0,
    ),
    "tokenizers_differ": (
        lambda t: ["teacher=topk", "method=opd_topk", f"teacher.teacher.path={stranger(t)}", "teacher.teacher.alignment=uld"],
        r"compares sorted probabilities, which are of no tokens to take the top k of; choose teacher.alignment=shared",
        0,
    ),
    "empty_data": (lambda t: table(t, ""), r"task.path=.*rows.jsonl has no rows", 1),
    "malformed_line": (
        lambda t: table(t, QUESTIONS[0], "{oops\n"),
        r"rows.jsonl:2: not JSON in UTF-8 .*each line must be one object",
        1,
    ),
    "no_such_file": (
        lambda t: ["task=table", "task.path=nowhere.jsonl"],
        r"task.path=nowhere.jsonl does not exist; give a file",
        1,
    ),
    "no_such_column": (
        lambda t: table(t, *QUESTIONS, columns="prompt: promt"),
        r"rows.jsonl:1: task.columns.prompt=promt is no column; did you mean prompt\?",
        1,
    ),
    "long_prompt": (
        lambda t: ["task.max_new_tokens=8", *table(t, *QUESTIONS, *[{"prompt": f"{i} " * 200} for i in range(3)])],
        r"example rows.jsonl:1\d has a prompt of 201 tokens; with .*max_new_tokens=8 it exceeds the 128 tokens that model.path",
        1,
    ),
    "sft_without_references": (
        lambda t: ["method=sft", "task.max_new_tokens=8", *table(t, *QUESTIONS)],
        r"rollout imitates reference completions, and 7 of 7 training examples have none.*task.columns.completion=",
        1,
    ),
    "sdft_without_demonstrations": (
        lambda t: ["method=sdft", "task.max_new_tokens=8", *table(t, *QUESTIONS)],
        r"example rows.jsonl:\d has no demonstration; context=demonstration needs one",
        1,
    ),
    "rl_without_a_verifier": (
        lambda t: ["method=grpo", "task.max_new_tokens=8", *table(t, *QUESTIONS)],
        r"has no verifier, and loss.policy_gradient learns from verdicts alone; give it one",
        1,
    ),
    "verifier_without_answers": (
        lambda t: ["method=grpo", "task/verifier=exact", *table(t, *QUESTIONS)],
        r"rows.jsonl:1: has no answer for task.verifier to compare with; map it",
        1,
    ),
    "group_of_one": (
        lambda t: ["method=grpo", "rollout.num_generations=1"],
        r"rollout.num_generations=1 leaves a group advantage without a baseline; use 2 or more",
        0,
    ),
    "budget_that_never_ends": (
        lambda t: ["method=sft", "budget.student_tokens=500"],
        r"budget.student_tokens=500 never ends method=sft, whose student writes nothing; set trainer.max_steps",
        0,
    ),
    "budget_of_nothing": (
        lambda t: ["method=opd", "budget.student_tokens=0"],
        r"budget.student_tokens=0 must be positive",
        1,
    ),
    "budget_with_a_schedule": (
        lambda t: ["budget.student_tokens=500", "optim.schedule=cosine"],
        r"optim.schedule=cosine needs an end.*set trainer.max_steps too",
        0,
    ),
    "no_package_for_tasks": (
        lambda t: ["task=reasoning_gym", "task.name=chain_sum"],
        r"task=reasoning_gym needs a package: pip install 'opd-lightning\[reasoning\]'",
        1,
    ),
    "no_package_for_data": (
        lambda t: ["task=table", "task.path=some/hub-id"],
        r"task.path=some/hub-id needs a package: pip install 'opd-lightning\[datasets\]'",
        1,
    ),
    "no_package_for_verdicts": (
        lambda t: ["task/verifier=math", *table(t, *QUESTIONS, columns="prompt: prompt, answer: answer")],
        r"task/verifier=math needs a package: pip install 'opd-lightning\[math\]'",
        1,
    ),
    "verifier_of_ones_own": (
        lambda t: [
            "task/verifier=function",
            "task.verifier.path=nobody.knows",
            *table(t, *QUESTIONS, columns="prompt: prompt, answer: answer"),
        ],
        r"task.verifier.path=nobody.knows cannot be imported .*give package.module.function",
        1,
    ),
    "no_name": (lambda t: ["task=reasoning_gym"], r"task.name has no default; give it", 0),
    "no_chat_template_file": (
        lambda t: [f"model.chat_template={t}/none.jinja"],
        r"model.chat_template=.*none.jinja does not exist",
        1,
    ),
}


@pytest.fixture(autouse=True)
def without_packages(request, monkeypatch):
    """As if the optional packages were not installed."""
    if "no_package" in request.node.name:
        for package in ("reasoning_gym", "datasets", "pyarrow", "math_verify"):
            monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(("make", "sentence", "begins"), INPUTS.values(), ids=INPUTS.keys())
def test_bad_input_stops_a_run_before_training(command, tmp_path, make, sentence, begins):
    """`begins`: does the run's folder exist by then? Then there is a status in it, and nothing else."""
    code, output, files = command(*make(tmp_path))
    assert code == 1 and re.search(sentence, output) and "Traceback" not in output, output
    assert files == ["status.json"] * begins
    for status in (tmp_path / "out").rglob("status.json") if begins else []:
        told = json.loads(status.read_text())
        assert told["state"] == "failed" and re.search(sentence, told["reason"])


@pytest.mark.parametrize("name", ["typo_in_an_experiment", "tokenizers_differ", "malformed_line", "no_package_for_tasks"])
def test_bad_input_never_ends_the_other_cells_of_a_sweep(command, tmp_path, name):
    """Two cells, both bad: the second is reached, each is named, and each has a status."""
    make, sentence, _ = INPUTS[name]
    code, output, files = command("-m", *make(tmp_path), "seed=0,1")
    assert code != 0 and "Traceback" not in output, output
    assert len(list(re.finditer(rf"error: .*?{sentence}", output))) == 2, output
    assert files.count("status.json") == 2 and set(files) <= {"status.json", "multirun.yaml"}


def test_a_good_cell_runs_behind_a_bad_one(command, tmp_path):
    """No verifier: RL cannot, SFT can."""
    data = table(tmp_path, *QUESTIONS, columns="prompt: prompt, completion: completion")
    code, output, _ = command("-m", *data, "task.max_new_tokens=8", "method=grpo,sft", "trainer.max_steps=1")
    states = {p.parent.parent.name[:3]: json.loads(p.read_text())["state"] for p in (tmp_path / "out").rglob("status.json")}
    assert code != 0 and "has no verifier" in output and states == {"grp": "failed", "sft": "finished"}


def test_other_data_behind_the_same_name_is_refused(command, tmp_path):
    """A run is not taken up again with examples that it did not begin with."""
    columns = "prompt: prompt, completion: completion"
    run = ["method=sft", "task.max_new_tokens=8", *table(tmp_path, *QUESTIONS, columns=columns)]
    assert command(*run, "trainer.max_steps=1")[0] == 0
    table(tmp_path, *[{**q, "completion": "answer 9"} for q in QUESTIONS], columns=columns)
    code, output, _ = command(*run, "trainer.max_steps=2")
    assert code == 1 and "has other training examples than those" in output and "choose another study.name" in output


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_folder_that_cannot_be_written_is_refused(command, tmp_path, sweep):
    code, output, _ = command(*sweep, f"output_dir={a_file(tmp_path)}")
    assert code == 1 and "a_file cannot be written" in output and "is a file); choose another folder" in output
    assert "Traceback" not in output and not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(command, tmp_path):
    code, output, _ = command("method=opd", "optim.lr=1e38", "trainer.max_steps=8", "task.n_train=16")
    assert code == 1 and "is not finite" in output and "Traceback" not in output
    saved = next((tmp_path / "out").glob("*/opd-*/seed-0/nonfinite-step-*-rank-0.pt"))
    assert str(saved) in output
    batch = torch.load(saved, weights_only=True)
    assert len(batch["examples"]) == len(batch["prompt_ids"]) == len(batch["texts"]) == 4
    assert batch["token_ids"].shape == batch["loss"].shape == batch["weight"].shape
    status = json.loads((saved.parent / "status.json").read_text())
    assert status["state"] == "failed" and f"update {batch['step']}" in status["reason"]
    assert batch["token_ids"].max() < len(VOCABULARY)


def test_a_full_traceback_is_there_for_the_asking(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match=r"rollout\.num_generations=1"):
        command("method=grpo", "rollout.num_generations=1")


def test_held_out_prompts_in_training_are_refused(small, monkeypatch):
    from opd_lightning.toy.world import WorldTask
    from opd_lightning.training.run import run

    monkeypatch.setattr(WorldTask, "examples", lambda self, split: [self._example("sort", i, "new") for i in range(8)])
    with pytest.raises(ValueError, match=r"8 held-out prompts are training prompts too"):
        run(small("method=sft"))
