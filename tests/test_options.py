"""Options are honoured or refused: odd text on the command line, Lightning's own arguments, precision, and long files."""

import inspect
import json
import re
import sys
import tracemalloc
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from opd_lightning import check, evaluate, export
from opd_lightning.config import compose
from opd_lightning.config.compatibility import check as compatible
from opd_lightning.config.compatibility import check_built
from opd_lightning.config.grammar import grammar_error, parse, quote_arguments, quote_override
from opd_lightning.config.overrides import configured, explain
from opd_lightning.config.trainer_arguments import REFUSED, check_trainer
from opd_lightning.models.optimizer import movable
from opd_lightning.preflight.checks import updates
from opd_lightning.preflight.components import assemble
from opd_lightning.preflight.precision import precision
from opd_lightning.runs.identity import run_hash
from opd_lightning.tasks import TableTask
from opd_lightning.tasks.rows import iter_rows, read_rows
from opd_lightning.tasks.splits import distinct, key_of
from opd_lightning.training.run import run
from opd_lightning.types import Example

TEXTS = [
    "data/größe/übung.jsonl",
    "lr=1e-4/rows.jsonl",
    "rows[1].jsonl",
    "run #3.jsonl",
    "it's mine.jsonl",
    "my file (1).jsonl",
    "~/rows.jsonl",
    'She said "now", twice. Ünd?',
    "Answer as {name}: {text}",
    "{question} ({hint})",
    "[INST] é",
    "two\nlines",
    "C:\\it's\\",
    "<|im_end|>",
    "https://host/a?b=c&d=e",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_written(text):
    assert parse(quote_override(f"task.system={text}")).value() == text
    assert quote_override(quote_override(f"task.system={text}")) == quote_override(
        f"task.system={text}"
    )  # what is quoted stays
    assert compose([f"model.path={text}"]).model.path == text


@given(st.text(alphabet="aé '\"\\=[]{}()#:$,~\n", max_size=12))
def test_text_comes_back_or_is_refused_in_a_sentence_whose_quoting_works(text):
    """Of any text, what Hydra reads is that text, stripped, or a sentence says how it is quoted; nothing in between."""
    word = quote_override(f"task.system=é{text}")
    if grammar_error([word], sweep=False):
        assert "${" in text
    else:
        assert parse(word).value() == f"é{text}".strip()


def test_what_has_a_meaning_keeps_it():
    """Lists, options by name, quotes, interpolations, calls and sweeps; odd text inside them is quoted."""
    values = {
        "[é,'b, c',it's]": ["é", "b, c", "it's"],
        "{k: é, l: [ü]}": {"k": "é", "l": ["ü"]},
        "'é b'": "é b",
        "${oc.env:HOME}/é": "${oc.env:HOME}/é",
        "[a,b]": ["a", "b"],
        "null": None,
        "1e-4": 1e-4,
    }
    assert {text: parse(quote_override(f"a.b={text}")).value() for text in values} == values
    assert [str(v) for v in parse(quote_override("seed=1,2", sweep=True)).sweep_iterator()] == ["1", "2"]
    sweep = parse(quote_override("task.path=é.jsonl,b.jsonl", sweep=True))
    assert [str(getattr(v, "text", v)) for v in sweep.sweep_iterator()] == ["é.jsonl", "b.jsonl"]
    assert quote_override("a=range(1,5)", sweep=True) == "a=range(1,5)" and parse(quote_override("~task")).is_delete()


def test_names_that_look_like_numbers_are_names():
    cfg = compose(["study.name=2024_01", "model.path=1e5", "seed=2_0"])
    assert (cfg.study.name, cfg.model.path, cfg.seed) == ("2024_01", "1e5", 20)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("task.system='Don't'", "as text it is written 'task.system=\"Don'\"'\"'t\"'"),
        ("evaluation.suite.x=[é", "is not in Hydra's grammar"),
        ("task.system=range(é)", "as text it is written 'task.system=\"range(é)\"'"),
        ("seed=0,1", "needs a sweep (python -m opd_lightning -m ...)"),
        ("task.system=be kind, be brief", "one text with a comma 'task.system=\"be kind, be brief\"'"),
        ("task.system=${x y}", r"a literal one is written \${"),
        ("task.system=${", r"a literal one is written \${"),
        ("method", "method is no override; write key=value"),
        ("context.template_options.enable_thinking=true", "'context.template_options={enable_thinking: ...}'"),
    ],
)
def test_what_is_not_taken_is_refused_with_the_quoting_that_works(word, sentence):
    told = explain([word])
    assert told is not None and sentence in told and "Lexer" not in told


def test_a_key_of_a_mapping_that_is_the_users_needs_no_plus():
    cfg = compose(["model.template_options.enable_thinking=false"])
    assert dict(cfg.model.template_options) == {"enable_thinking": False}
    assert explain(["model.template_options.enable_thinking=false"]) is None
    assert dict(compose(["task=reasoning_gym", "task.options.min_terms=2"]).task.options) == {"min_terms": 2}
    told = explain(["adapter=lora", "adapter.use_rslora=true"])
    assert told is not None and "+adapter.use_rslora=true" in told


def test_the_command_line_takes_odd_text(command, tmp_path):
    """From typing to the recorded configuration; a study's name that is no folder's name is refused in a sentence."""
    rows = tmp_path / "größe (1) = it's #1.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"red {i}", "completion": "red"}) + "\n" for i in range(8)))
    words = ["method=sft", "task=table", f"task.path={rows}", "task.columns.completion=completion", "trainer.max_steps=1"]
    words += [
        "evaluation=none",
        "task.max_new_tokens=8",
        "model.template_options.enable_thinking=false",
        f"output_dir={tmp_path / 'öut put'}",
    ]
    code, output, _ = command(*words)
    config = next((tmp_path / "öut put").rglob("config.yaml"))
    assert code == 0 and yaml.safe_load(config.read_text())["task"]["path"] == str(rows), output
    code, output, _ = command(*words, "study.name=my stüdy")
    assert code == 1 and "study.name='my stüdy' names a folder" in output and "Lexer" not in output
    run = config.parent
    assert evaluate.configuration([f"run={run}", "task.system=Be {kind}, é"]).task.system == "Be {kind}, é"


def test_check_and_evaluate_take_options_of_ones_own(command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    mine = tmp_path / "mine, é" / "experiment"
    mine.mkdir(parents=True)
    (mine / "own.yaml").write_text("# @package _global_\nname: own\ntask: {n_train: 16, n_eval: 4}\n")
    for flags in ([f"--config-dir={mine.parent}"], ["--config-dir", str(mine.parent)]):
        assert evaluate.configuration([*flags, "experiment=own"]).name == "own"
    code, output, _ = command(f"--config-dir={mine.parent}", "--fast", "experiment=own", main=check.main)
    assert code == 0 and "binds" in output and "own" in output
    code, output, _ = command("--config-dir=/nowhere", main=check.main)
    assert code == 1 and "--config-dir=/nowhere is no folder" in output
    code, output, _ = command("-m", main=check.main)
    assert code == 1 and "-m is no option of this command" in output
    with pytest.raises(ValueError, match="--config-dir has no folder behind it"):
        configured(["--config-dir"])


@pytest.mark.parametrize("module", [check, evaluate, export])
def test_help_is_printed(monkeypatch, capsys, module):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    module.main()
    told = capsys.readouterr()
    assert told.out.strip() == module.__doc__.strip() and not told.err


def test_export_takes_any_path(monkeypatch, capsys, tmp_path):
    for name in ("a: b", "[x]", "2024", "a=b"):
        monkeypatch.setattr(sys, "argv", ["x", f"run={tmp_path / name}" if name != "2024" else "run=2024"])
        with pytest.raises(SystemExit) as stop:
            export.main()
        assert "is no run folder" in str(stop.value) and name in str(stop.value)


def test_flags_and_their_values_are_left_alone():
    line = ["-m", "--config-dir", "/a=b", "task.path=é", "seed=0,1"]
    assert quote_arguments(line) == ["-m", "--config-dir", "/a=b", 'task.path="é"', "seed=0,1"]


LIGHTNING = {
    "accumulate_grad_batches": ("4", "data.batch_size"),
    "gradient_clip_val": ("0.5", "optim.clip_norm"),
    "gradient_clip_algorithm": ("value", "optim.clip_norm"),
    "fast_dev_run": ("true", "trainer.max_steps=1"),
    "min_steps": ("5", "trainer.max_steps"),
    "min_epochs": ("5", "trainer.max_epochs"),
    "max_time": ("00:01:00:00", "budget.seconds"),
    "limit_train_batches": ("1", "task.n_train"),
    "overfit_batches": ("1", "task.n_train"),
    "limit_val_batches": ("0.5", "task.n_eval"),
    "val_check_interval": ("10", "evaluation.every"),
    "check_val_every_n_epoch": ("2", "evaluation.every"),
    "num_sanity_val_steps": ("2", "evaluation"),
    "log_every_n_steps": ("10", "metrics.csv"),
    "enable_checkpointing": ("true", "callbacks.checkpoint"),
    "use_distributed_sampler": ("true", "share"),
    "reload_dataloaders_every_n_epochs": ("1", "shuffled"),
    "inference_mode": ("false", "evaluation"),
    "barebones": ("true", "callbacks"),
    "logger": ("false", "logger=wandb"),
    "callbacks": ("[]", "callbacks.<name>"),
    "default_root_dir": ("/x", "output_dir"),
}


@pytest.mark.parametrize("name", LIGHTNING)
def test_what_lightning_would_pass_over_is_refused_with_the_option_that_does_it_here(name):
    value, remedy = LIGHTNING[name]
    with pytest.raises(ValueError, match=rf"trainer\.{name}=.* is not how a run is set here: .*{re.escape(remedy)}"):
        check_trainer({name: parse(quote_override(f"a={value}")).value()})
    check_trainer(dict.fromkeys(LIGHTNING))


def test_lightnings_arguments_are_refused_as_they_are_typed():
    """With "+", as Hydra has it, and without."""
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=4 is not how .*data\.batch_size"):
        compatible(compose(["+trainer.accumulate_grad_batches=4"]))
    assert "optim.clip_norm" in (explain(["trainer.gradient_clip_val=0.5"]) or "")


def test_every_argument_of_lightnings_trainer_is_known():
    """A new version of Lightning that has another argument asks for a decision here."""
    honoured = {"accelerator", "strategy", "devices", "num_nodes", "precision", "max_epochs", "max_steps", "deterministic"}
    honoured |= {"benchmark", "profiler", "detect_anomaly", "plugins", "sync_batchnorm", "enable_progress_bar"}
    honoured |= {"enable_model_summary", "enable_autolog_hparams"}  # the last says what Lightning may add to a logger
    assert set(inspect.signature(L.Trainer.__init__).parameters) - {"self"} <= honoured | set(REFUSED)
    check_trainer({"profiler": "simple", "benchmark": True, "plugins": [{"_target_": "torch.nn.Linear"}]})
    with pytest.raises(ValueError, match=r"AsyncCheckpointIO would write nothing"):
        check_trainer({"plugins": {"_target_": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}})


NOT_NUMBERS = {
    "optim.lr=inf": "optim.lr=inf is no finite number",
    "optim.lr=nan": "optim.lr=nan is no finite number",
    "optim.lr=0": "optim.lr=0 must be positive",
    "optim.lr=-1e-4": "optim.lr=-0.0001 must be positive",
    "optim.clip_norm=inf": "optim.clip_norm=inf is no finite number",
    "optim.clip_norm=0": "optim.clip_norm=0 must be positive",
    "optim.optimizer.betas=[0.9,nan]": "optim.optimizer.betas.1=nan is no finite number",
    "optim.optimizer.betas=[0.9,2]": "Invalid beta parameter",
    "optim.optimizer.weight_decay=nan": "weight_decay=nan is no finite number",
    "optim.optimizer.weight_decay=-1": "Invalid weight_decay",
    "optim.schedule=cosine_with_min_lr": "optim.schedule=cosine_with_min_lr cannot be made",
    "loss.temperature=inf": "loss.temperature=inf is no finite number",
    "loss.coefficients.divergence=nan": "loss.coefficients.divergence=nan is no finite number",
    "rollout.sampling.temperature=nan": "rollout.sampling.temperature=nan is no finite number",
    "budget.seconds=inf": "budget.seconds=inf is no finite number",
    "budget.flops=-1": "budget.flops=-1 must be positive",
    "callbacks.checkpoint.every=0": "callbacks.checkpoint.every=0",
    "trainer.max_epochs=0": "trainer.max_epochs=0 should be a whole number",
    "trainer.max_epochs=0.5": "trainer.max_epochs=0.5 should be int",
}


@cache
def default() -> DictConfig:
    """The default configuration, composed once."""
    return compose([])


@pytest.mark.parametrize("word", NOT_NUMBERS)
def test_numbers_that_mean_nothing_are_found_before_training(word):
    cfg, override = default().copy(), parse(word)
    OmegaConf.update(cfg, override.key_or_group, override.value())
    with pytest.raises(ValueError, match=re.escape(NOT_NUMBERS[word])):
        compatible(cfg)
        check_built(cfg)


def test_passes_through_the_data_end_a_run(small, tmp_path):
    """Two passes through ten examples in batches of four are five rollouts; more of them go on with the same run."""

    def made(*words: str) -> dict:
        folder = run(small("task.n_train=10", "evaluation=none", "~trainer.max_steps", *words))
        return json.loads((folder / "status.json").read_text()) | yaml.safe_load((folder / "config.yaml").read_text())

    words = ["method=sft", "trainer.max_steps=-1"]
    assert made(*words, "trainer.max_epochs=2")["step"] == 5
    assert made(*words, "trainer.max_epochs=2")["trainer"]["max_steps"] == 5  # found again, and left alone
    assert made(*words, "trainer.max_epochs=3")["step"] == 8
    assert compose(["trainer.max_epochs=2"]).trainer.max_steps == -1 and compose([]).trainer.max_steps == 100


def test_the_earlier_of_two_horizons_ends_a_run_and_is_said(small):
    cfg = small("task.n_train=10", "evaluation=none", "trainer.max_steps=4", "trainer.max_epochs=2")
    parts = assemble(cfg, None)
    assert parts.bounded(cfg).trainer.max_steps == 4
    (found,) = updates(parts, cfg)
    assert found.state == "warn" and "ends the run before trainer.max_epochs=2, which is 5 updates" in found.text
    cfg = small("task.n_train=10", "evaluation=none", "trainer.max_steps=6", "trainer.max_epochs=1", "rollout.num_iterations=2")
    parts = assemble(cfg, None)
    assert parts.bounded(cfg).trainer.max_steps == 6 and next(updates(parts, cfg), None) is None


def test_passes_are_part_of_a_runs_identity_where_its_schedule_ends():
    one, two = ["optim.schedule=cosine", "trainer.max_epochs=1"], ["optim.schedule=cosine", "trainer.max_epochs=2"]
    assert run_hash(compose(one)) != run_hash(compose(two))
    assert run_hash(compose(one[1:])) == run_hash(compose(two[1:]))
    stages = [run_hash(compose([f"init_from_run=['trainer.max_epochs={n}']"])) for n in (1, 2)]
    assert stages[0] != stages[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "half"])
def test_weights_that_would_round_their_updates_away_are_refused(small, dtype):
    with pytest.raises(ValueError, match=rf"model\.dtype={dtype} with trainer\.precision=auto .*or choose adapter=lora"):
        compatible(small(f"model.dtype={dtype}"))
    with pytest.raises(ValueError, match=rf"model\.dtype={dtype} with trainer\.precision=bf16-mixed"):
        compatible(small(f"model.dtype={dtype}", "trainer.precision=bf16-mixed"))
    compatible(small(f"model.dtype={dtype}", "adapter=lora", "trainer.precision=bf16-mixed"))
    with pytest.raises(ValueError, match=r"model\.dtype='int8' is no torch dtype"):
        compatible(small("model.dtype=int8"))


def test_the_share_of_weights_that_an_update_moves_is_what_an_update_moves():
    torch.manual_seed(0)
    weights = torch.nn.Parameter((torch.randn(300, 100) * 0.05).bfloat16())
    for lr in (1e-6, 1e-5, 1e-4, 1e-2):
        told, before = movable([weights], lr), weights.detach().clone()
        optimizer = torch.optim.AdamW([weights], lr=lr, weight_decay=0.0)
        weights.grad = torch.randn_like(weights)
        optimizer.step()
        moved = (weights != before).float().mean().item()
        assert moved == pytest.approx(told, abs=0.03), lr
        weights.data = before
    assert movable([weights.float()], 1e-6) > 0.99


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_weights_in_bfloat16_are_said_with_the_share_that_moves(small, caplog, adapter):
    """bf16-true makes them so, factors of an adapter too; `check` and the run say the same before training."""
    words = ["method=sft", f"adapter={adapter}", "trainer.precision=bf16-true", "optim.lr=1e-6", "evaluation=none"]
    cfg = small(*words, "trainer.max_steps=1")
    (found,) = precision(assemble(cfg, None), cfg)
    assert found.state == "warn" and re.search(r"optim\.lr=1e-06 moves [\d.]+% of them", found.text)
    (found,) = precision(assemble(cfg, None), cfg, fast=True)
    assert found.state == "warn" and "bfloat16" in found.text
    caplog.set_level("WARNING", "opd_lightning")
    run(cfg)
    (told,) = [r.getMessage() for r in caplog.records if "weights are trained in bfloat16" in r.getMessage()]
    assert re.search(r"moves [\d.]+% of them", told)
    cfg = small("trainer.precision=bf16-mixed", f"adapter={adapter}")
    assert next(precision(assemble(cfg, None), cfg)).state == "pass"


def long_file(folder: Path, rows: int = 400) -> tuple[str, list[dict]]:
    """A file of rows, every seventh of which repeats an earlier prompt."""
    made = [{"prompt": f"Prompt {i if i % 7 else i // 2}", "completion": f"c{i}"} for i in range(rows)]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(folder / "long.jsonl"), made


def chosen(examples: list[Example], sizes: list[int | None]) -> list[list[str]]:
    """Splits as they are defined: of distinct prompts, the first in the order of their digests; each as it stood."""
    left = sorted(distinct(examples), key=lambda e: int(key_of(e)[:13], 16))
    found = []
    for size in sizes:
        part, left = left[: len(left) if size is None else size], [] if size is None else left[size:]
        found.append([e.id for e in sorted(part, key=examples.index)])
    return found


@pytest.mark.parametrize("n_train", [None, 1, 5, 1000])
@pytest.mark.parametrize("apart", [False, True])
def test_splits_of_rows_that_are_not_kept_are_those_of_all_rows(tmp_path, n_train, apart):
    path, rows = long_file(tmp_path)
    examples = [Example(f"long.jsonl:{i}", [{"role": "user", "content": r["prompt"]}]) for i, r in enumerate(rows, start=1)]
    heldout = None
    if apart:
        (tmp_path / "held").mkdir()
        heldout = {"path": long_file(tmp_path / "held", 30)[0]}
        out = {key_of(e) for e in examples[:30]}
        examples = [e for e in examples if key_of(e) not in out]
    task = TableTask(path, {"prompt": "prompt", "completion": "completion"}, n_train=n_train, n_eval=8, heldout=heldout)
    wanted = chosen(examples, [8, n_train] if apart else [8, 8, n_train])
    names = ["validation", "train"] if apart else ["test", "validation", "train"]
    assert [[e.id for e in task.examples(name)] for name in names] == wanted
    assert task.notes["repeated_prompts"] == 400 - len(distinct(examples))


def test_nothing_behind_max_rows_is_read(tmp_path):
    """The splits are those of a file that ends there; what stands behind may be no row at all."""
    path, rows = long_file(tmp_path)
    columns = {"prompt": "prompt", "completion": "completion"}
    whole = TableTask(path, columns, max_rows=100, n_train=20, n_eval=8).splits
    for suffix, write in (
        ("jsonl", lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows[:100]) + "no row\n")),
        ("csv", lambda p: p.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))),
    ):
        write(tmp_path / f"long.{suffix}")
        splits = TableTask(str(tmp_path / f"long.{suffix}"), columns, max_rows=100, n_train=20, n_eval=8).splits
        assert {k: [e.completion for e in v] for k, v in splits.items()} == {
            k: [e.completion for e in v] for k, v in whole.items()
        }
    with pytest.raises(ValueError, match=r"long\.jsonl:101: not JSON"):
        TableTask(path, columns)
    with pytest.raises(ValueError, match=r"task\.max_rows=0 must be at least 1"):
        TableTask(path, columns, max_rows=0)


def test_rows_of_parquet_and_any_line_end_are_read_one_after_the_other(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"prompt": f"p{i}"} for i in range(3000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row for _, row in read_rows(str(tmp_path / "rows.parquet"))] == rows
    assert [row for _, row in iter_rows(str(tmp_path / "rows.parquet"), max_rows=2)] == rows[:2]
    for end in ("\n", "\r\n", "\r", "\n\r\n"):
        (tmp_path / "rows.jsonl").write_bytes(end.join(json.dumps(row) for row in rows[:5]).encode())
        places, read_back = zip(*read_rows(str(tmp_path / "rows.jsonl")), strict=True)
        step = 2 if end == "\n\r\n" else 1
        assert list(read_back) == rows[:5] and places[-1] == f"rows.jsonl:{4 * step + 1}"


def test_few_examples_of_a_long_file_take_little_memory(tmp_path):
    """What is not chosen is not kept; runs from before max_rows are found again under their folder's name."""
    path, rows = long_file(tmp_path, 5_000)
    tracemalloc.start()
    TableTask(path, {"prompt": "prompt", "completion": "completion"}, n_train=50, n_eval=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * len(rows)  # a digest each; all of the examples take 1,500 bytes each
    plain = compose(["task=table", "task.path=x"])
    before, some = run_hash(plain), OmegaConf.merge(plain, {"task": {"max_rows": 9}})
    OmegaConf.set_struct(plain, False)
    del plain.task["max_rows"]
    assert run_hash(plain) == before != run_hash(some)
