"""Configuration: every option composes and binds, choices that contradict each other are refused with a remedy."""

import re
from itertools import product
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from opd_lightning.config import CONF_DIR, compose, first_stage, plain
from opd_lightning.config.compatibility import check
from opd_lightning.data.score_files import Index
from opd_lightning.runs.identity import run_folder, run_hash
from opd_lightning.training.run import run

CONF = Path(CONF_DIR)
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
STUDIES = sorted(p.stem for p in (CONF / "study").glob("*.yaml"))
OPTIONS = sorted(
    f"{p.parent.relative_to(CONF)}={p.stem}"
    for p in CONF.glob("*/**/*.yaml")
    if p.parent.name not in ("method", "experiment", "study")
)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_and_binds(option, tmp_path):
    """Beside the default choices, or refused with a remedy."""
    Index("topk", 20, 32, [], "", None, {}, num_generations=1, source="", complete=True).write(tmp_path)
    mine = ["task=table", "task.path=mine.jsonl"]
    companions = {
        "task=table": mine,
        "task=articles": ["task.path=mine.jsonl"],
        "task=reasoning_gym": ["task.name=chain_sum"],
        "task=toolalpaca": ["task.path=train", "task.heldout.path=eval"],
        "task/verifier=function": [*mine, "task.verifier.path=operator.eq"],
        **{
            f"task/verifier={name}": mine
            for name in ("none", "exact", "contains", "numeric", "regex", "choice", "math", "code", "tool_calls")
        },
        **{f"model={name}": ["teacher.path=another"] for name in ("smollm2", "qwen3_8b", "qwen2.5_7b")},
        "environment=tool_use": ["environment.tools=operator.add"],
        "environment=openenv": ["environment.urls=http://127.0.0.1:8000"],
        "environment=user_model": ["environment.user.path=pkg://opd_lightning/toy/assets/world/start"],
        "rollout=dataset": ["method=sft"],
        "teacher=none": ["method=sft"],
        "teacher=frozen": ["context=demonstration"],
        "teacher=topk": ["method=opd_topk"],
        "teacher=cached": ["method=opd_topk", f"teacher.path={tmp_path}"],
        "rollout=recorded": [f"rollout.path={tmp_path}"],
        "teacher=remote": ["method=opd_topk"],
        "teacher=remote_hidden": ["teacher.path=another"],
        "teacher=remote_sglang": ["method=opd_topk"],
        **{
            f"teacher={name}": ["context=demonstration"]
            for name in ("live", "ema", "ema_fast", "sync", "trust_region", "start_model")
        },
        "loss/divergence=none": ["method=grpo"],
        "loss/policy_gradient=grpo": ["rollout=student_group"],
        "loss/policy_gradient=dr_grpo": ["rollout=student_group"],
        "loss/policy_gradient=clip_higher": ["rollout=student_group"],
        "loss/policy_gradient=rloo": ["rollout=student_group"],
    }
    check(compose([*companions.get(option, []), option]))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_binds(name):
    check(compose([f"experiment={name}"]))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_composes(name):
    cfg = compose([f"study={name}"])
    assert cfg.study.name == name and cfg.study.sweep


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_every_file_says_what_it_is_and_its_command(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ") and (path.name == "config.yaml" or "python -m opd_lightning" in lines[0])


FAST = ("sft", "opd", "sdft", "grpo", "gkd", "seqkd")


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in FAST else pytest.mark.slow) for m in METHODS])
def test_every_method_trains_two_steps(small, method):
    folder = run(small(f"method={method}"))
    assert {"config.yaml", "evaluation.json", "ledger.json", "metrics.csv", "status.json"} <= {p.name for p in folder.iterdir()}
    assert folder.parent.name.startswith(f"{method}-")


@pytest.mark.parametrize(
    ("method", "teacher", "context"),
    [
        pytest.param(*cell, marks=[] if cell[0] in FAST else pytest.mark.slow)
        for cell in product(METHODS, ["none", "external", "frozen", "live"], ["none", "demonstration"])
    ],
)
def test_each_cell_of_method_teacher_context_binds_or_is_refused_with_a_remedy(method, teacher, context):
    cfg = compose([f"method={method}", f"teacher={teacher}", f"context={context}"])
    reads_teacher = cfg.loss.divergence is not None
    writes = cfg.rollout._target_.endswith("TeacherRollout")
    if (reads_teacher or writes) and teacher == "none":
        with pytest.raises(ValueError, match=r"teacher=none, but .*; choose teacher="):
            check(cfg)
    elif reads_teacher and teacher in ("frozen", "live") and context == "none" and not cfg.loss.policy_gradient:
        with pytest.raises(ValueError, match=r"gradient is zero by construction; choose context="):
            check(cfg)
    else:
        warned = any("teacher is not loaded" in w for w in check(cfg))
        assert warned == (teacher != "none" and not reads_teacher and not writes)


def test_the_command_line_wins_over_the_method_and_leaves_the_rest_of_it():
    cfg = compose(["method=sdft", "teacher=live"])
    assert cfg.teacher._target_ == "opd_lightning.teachers.live" and cfg.context._target_.endswith("PrivilegedContext")
    assert cfg.loss.divergence._target_.endswith("forward_kl")
    assert compose(["teacher=live", "method=sdft"]) == cfg
    assert compose(["experiment=smollm2_opd", "optim.lr=1e-3"]).optim.lr == 1e-3


def test_the_first_stage_is_part_of_a_runs_identity():
    base = ["experiment=smollm2_opd"]
    changed = compose([*base, "init_from_run=['experiment=smollm2_narrow','optim.lr=1e-3']"])
    same = compose([*base, "init_from_run=['task=instructions_narrow','experiment=smollm2_narrow']"])
    assert run_hash(changed) != run_hash(compose(base)) == run_hash(same)
    longer = compose([*base, "init_from_run=['experiment=smollm2_narrow','trainer.max_steps=26']"])
    assert run_hash(longer) != run_hash(compose(base))
    stage = first_stage(compose([*base, "model.path=mine", "trainer.precision=bf16-mixed", "seed=5"]))
    assert (stage.model.path, stage.trainer.precision, stage.seed) == ("mine", "bf16-mixed", 5)


def test_sampling_away_from_the_losss_distribution_is_warned_of():
    assert any("biased" in w for w in check(compose(["method=grpo", "rollout.sampling.temperature=0.5"])))
    assert any("biased" in w for w in check(compose(["method=opd_sampled", "rollout.sampling.top_p=0.9"])))
    assert check(compose(["method=opd", "rollout.sampling.temperature=0.5"])) == []


def test_runs_land_where_they_can_be_found_again():
    folder = run_folder(compose(["method=sft", "seed=3", "study.name=mine"]))
    assert folder.parts[:2] == ("outputs", "mine") and folder.parts[3] == "seed-3"
    assert not any(c in str(folder) for c in "=, :")


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("optim.lr=1e-3", True),
        ("task.skill=swap", True),
        ("rollout.sampling.temperature=0.7", True),
        ("data.batch_size=32", True),
        ("trainer.precision=bf16-mixed", True),
        ("seed=7", False),
        ("output_dir=elsewhere", False),
        ("study.name=other", False),
        ("logger=none", False),
        ("max_tokens_per_microbatch=512", False),
        ("trainer.max_steps=500", False),
        ("trainer.devices=2", False),
    ],
)
def test_the_hash_covers_what_changes_the_result(override, changes):
    assert (run_hash(compose([override])) != run_hash(compose([]))) == changes


def test_the_horizon_belongs_to_a_run_whose_schedule_depends_on_it():
    cosine = ["optim.schedule=cosine"]
    assert run_hash(compose(cosine)) != run_hash(compose([*cosine, "trainer.max_steps=500"]))


BAD = {
    "no_such_option": (["+optim.learning_rate=1"], r"optim\.learning_rate=1 is no option of .*Optim"),
    "typo_with_a_neighbour": (["+rollout.temprature=1"], r"rollout\.temprature=1 .*did you mean sampling\.temperature\?"),
    "unknown_key": (["+sede=1"], r"sede=1 is no key of a run; did you mean seed\?"),
    "name_of_a_folder": (["name='a=b'"], r"name='a=b' names a folder"),
    "unimportable": (["task._target_=opd_lightning.tasks.Nope"], r"task\._target_=.* cannot be imported"),
    "empty_target": (
        ["evaluation.suite.teacher._target_=''"],
        r"teacher\._target_=.* cannot be imported .*no class or function",
    ),
    "a_module": (["task._target_=os"], r"task\._target_=os cannot be imported .*no class or function"),
    "missing": (["~task.skill", "~optim.lr"], r"optim\.lr is missing"),
    "group_of_one": (["method=grpo", "rollout.num_generations=1"], r"rollout\.num_generations=1 .*use 2 or more"),
    "rl_on_data": (
        ["method=grpo", "rollout=dataset"],
        r"rollout=DatasetRollout has no samples of the student's own to reward; choose",
    ),
    "sampled_from_data": (["method=opd_sampled", "rollout=dataset"], r"loss/vocab_support=sampled .*choose rollout=student"),
    "imitating_itself": (["method=sft", "rollout=student"], r"imitates the student's own samples; choose rollout=dataset"),
    "fp16": (["trainer.precision=16-mixed"], r"trainer\.precision=16-mixed .*use bf16-mixed"),
    "no_steps": (["trainer.max_steps=-1"], r"trainer\.max_steps=-1 must be at least 1"),
    "its_own_start": (
        ["model=smollm2", "task=instructions"],
        r"teacher\.path=.* is the student's own start model.*choose another",
    ),
    "odd_horizon": (
        ["rollout.num_iterations=3"],
        r"trainer\.max_steps=100 is no multiple of rollout\.num_iterations=3",
    ),
    "no_schedule": (["optim.schedule=cosin"], r"optim\.schedule=cosin .*did you mean cosine\?"),
    "no_tokens": (["rollout.sampling.max_new_tokens=0"], r"rollout\.sampling\.max_new_tokens=0 must be at least 1"),
    "no_prompts": (["data.batch_size=0"], r"data\.batch_size=0 must be at least 1"),
    "bad_dtype": (["model.dtype=float99"], r"model\.dtype='float99'"),
    "bad_template": (["method=sdft", "context.template='{prompt}'"], r"context\.template="),
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_before_anything_is_loaded(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(compose(overrides))


RUNTIME = {
    "no_model": (["model.path=no/such/folder"], r"model\.path=no/such/folder could not be loaded"),
    "bad_dtype": (["method=sft", "model.dtype=float99"], r"model\.dtype='float99'"),
    "no_verifier": (["method=grpo", "task=instructions", "~task.n_eval"], "has no verifier"),
    "diverged": (["optim.lr=1e38", "trainer.max_steps=4"], r"update \d: the (loss|gradient) .*not finite"),
    "broken_weights": (["optim.lr=1e38", "optim.warmup_steps=0", "trainer.max_steps=4"], "logits are NaN or infinite"),
    "bad_skill": (["task.skill=fly"], r"task\.skill='fly'"),
    "bad_rate": (["optim.lr=-1"], r"optim\.lr=-1"),
    "bad_temperature": (["loss.temperature=0"], r"loss\.temperature=0"),
    "bad_beta": (["loss/divergence=jsd", "loss.divergence.beta=2"], r"loss\.divergence\.beta=2"),
}


@pytest.mark.parametrize(("overrides", "sentence"), RUNTIME.values(), ids=RUNTIME.keys())
def test_bad_values_end_a_run_with_a_sentence_and_a_status(small, overrides, sentence):
    cfg = small(*overrides)
    with pytest.raises(ValueError, match=sentence):
        run(cfg)
    assert '"failed"' in (run_folder(cfg) / "status.json").read_text()


def places(node, place="") -> list[str]:
    """Every key of a configuration, nodes and leaves."""
    inside = [(f"{place}.{key}".lstrip("."), value) for key, value in node.items()]
    return [p for key, value in inside for p in [key, *(places(value, key) if isinstance(value, dict) else [])]]


@pytest.mark.slow
def test_null_or_a_list_at_any_key_is_taken_or_refused_with_a_sentence_that_names_it():
    """Never a traceback: neither a required node that is gone, nor one that is something else."""
    cfg = compose(["method=grpo_opd", "adapter=lora"])
    for place in places(plain(cfg)):
        *above, key = place.split(".")
        node, before = OmegaConf.select(cfg, ".".join(above)) if above else cfg, OmegaConf.to_container(cfg)
        for value in (None, [1]):
            node[key] = value
            try:
                check(cfg)
            except ValueError as error:
                assert key in str(error) and "resolving" not in str(error), f"{place}={value}: {error}"
        for name in above:
            before = before[name]
        node[key] = before[key]


@pytest.mark.parametrize("name", ["progress", "samples", "checkpoint", "diagnostics", "guards"])
def test_null_switches_a_callback_off(name):
    assert check(compose([f"callbacks.{name}=null"])) == []


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data=null", r"data=null is not what a run reads there"),
        ("evaluation.suite=null", r"evaluation\.suite=null is not"),
        ("loss.coefficients=null", r"loss\.coefficients=null is not"),
        ("loss.vocab_support=null", r"loss\.vocab_support=null is not"),
        ("loss.policy_gradient.advantage=null", r"loss\.policy_gradient\.advantage has no value .*; give it"),
        ("init_from_run=[1]", r"init_from_run=\[1\] is no list of overrides; give one"),
        ("task._target_=null", r"task\._target_=null is no name of a class; give"),
        ("~loss.weight", r"loss\.weight=null is not"),
        ("callbacks.diagnostics=-1", r"callbacks\.diagnostics is no callback"),
        ("evaluation.suite.accuracy=-1", r"evaluation\.suite\.accuracy has options and no evaluation"),
    ],
)
def test_a_node_that_a_run_needs_is_asked_for(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(compose(["method=grpo", override]))


def test_no_configuration_names_this_machine():
    text = "".join(p.read_text() for p in CONF.rglob("*.yaml"))
    assert "/home/" not in text and "/tmp/" not in text
    assert OmegaConf.is_config(compose([])) and plain(compose([]))["name"] == "opd"


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_has_its_paragraph_and_its_line_in_the_readme(method):
    """With an equation and a source; the line of the README says when to choose it."""
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (CONF / "method" / "README.md").read_text(), re.M | re.S))
    section = sections[method]
    assert "`" in section and re.search(r"arXiv \d{4}\.\d{5}|Williams 1992|Thinking Machines 2025|the baseline", section)
    assert f"\n| `{method}` |" in (CONF.parent / "README.md").read_text()
