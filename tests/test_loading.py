"""What is loaded is what the folder holds: planted faults of model folders, and adapters of PEFT as models."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opd_lightning.check import examine
from opd_lightning.evaluate import evaluate
from opd_lightning.export import export
from opd_lightning.models import Pretrained
from opd_lightning.models.stand_in import model_folder
from opd_lightning.training.run import run

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
FILE = "model.safetensors"


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A copy of the student, to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def store(folder: Path, tensors: dict) -> None:
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def renamed(change):
    return lambda folder: store(folder, {change(key): value for key, value in load_file(folder / FILE).items()})


def without(*names: str):
    return lambda folder: store(
        folder, {key: value for key, value in load_file(folder / FILE).items() if not any(name in key for name in names)}
    )


def changed(name: str, change):
    def plant(folder: Path) -> None:
        tensors = load_file(folder / FILE)
        store(folder, {**tensors, name: change(tensors.get(name)).contiguous()})

    return plant


def configured(**options):
    def plant(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **options}))

    return plant


def written(file: str, text: str):
    return lambda folder: (folder / file).write_text(text)


def cut(file: str, share: float = 0.5):
    def plant(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return plant


def sharded(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    (folder / FILE).unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def pickled(folder: Path, wrap=lambda state: state) -> None:
    torch.save(wrap(load_file(folder / FILE)), folder / "pytorch_model.bin")
    (folder / FILE).unlink()


def both(*steps):
    def plant(folder: Path) -> None:
        for step in steps:
            step(folder)

    return plant


def first_shard_gone(folder: Path) -> None:
    min(folder.glob("model-*.safetensors")).unlink()


NORM = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = {
    "matrix missing": (without(NORM), rf"missing and to be drawn at random: {NORM}"),
    "embedding missing": (without("embed_tokens"), "missing .* lm_head.weight, model.embed_tokens.weight"),
    "no output layer": (configured(tie_word_embeddings=False), "missing .*: lm_head.weight; save the model with its output"),
    "more layers than weights": (configured(num_hidden_layers=4), r"missing .*model.layers.2\S+ and 15 more"),
    "fewer layers than weights": (configured(num_hidden_layers=1), r"without a place in the model: model.layers.1\S+"),
    "another width": (configured(hidden_size=24), r"of another shape: .* and \d+ more"),
    "another vocabulary": (configured(vocab_size=40), r"model.embed_tokens.weight is \[32, 16\] where \[40, 16\] is meant"),
    "one of another shape": (changed(NORM, lambda w: w.T), rf"of another shape: {NORM} is \[16, 32\] where \[32, 16\]"),
    "one too much": (changed("model.extra.weight", lambda _: torch.ones(2)), "without a place .*: model.extra.weight"),
    "unknown prefix": (renamed(lambda key: f"policy.{key}"), r"missing .* without a place .*policy\.model"),
    "adapter not merged": (
        changed("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight", lambda _: torch.ones(2, 16)),
        "merge the adapter",
    ),
    "pointer": (written(FILE, POINTER), r"model.safetensors is a pointer of Git LFS .*git lfs pull"),
    "empty": (written(FILE, ""), "model.safetensors is empty"),
    "cut": (cut(FILE, 0.9), r"model.safetensors is cut off, [\d,]+ bytes of [\d,]+"),
    "cut in its header": (cut(FILE, 0.05), r"model.safetensors is cut off inside its header"),
    "zeros": (lambda folder: (folder / FILE).write_bytes(bytes(4096)), "is no safetensors file"),
    "a page of HTML": (written(FILE, "<!DOCTYPE html><html>Not found</html>"), "is no safetensors file"),
    "gone": (lambda folder: (folder / FILE).unlink(), "has no weights .*; download the rest"),
    "in a checkpoint": (
        lambda folder: (folder / "checkpoint-20").mkdir() or (folder / FILE).rename(folder / "checkpoint-20" / FILE),
        "give the folder inside it .* model/checkpoint-20",
    ),
    "shard missing": (
        both(sharded, first_shard_gone),
        r"1 of the \d+ files that model.safetensors.index.json lists are missing",
    ),
    "index cut": (both(sharded, cut("model.safetensors.index.json")), "index.json is cut off or no JSON"),
    "index without files": (both(sharded, written("model.safetensors.index.json", "{}")), "lists no files"),
    "pickle cut": (both(pickled, cut("pytorch_model.bin")), "pytorch_model.bin is damaged"),
    "pickle pointer": (both(pickled, written("pytorch_model.bin", POINTER)), "pytorch_model.bin is a pointer"),
    "pickle of a checkpoint": (
        lambda folder: pickled(folder, lambda state: {"model": state, "step": 3}),
        r"no state dict of tensors \(it holds model, step\)",
    ),
    "pickle with a matrix missing": (both(without(NORM), pickled), rf"missing .*: {NORM}"),
    "config empty": (written("config.json", ""), "config.json is empty"),
    "config cut": (cut("config.json"), "config.json is cut off or no JSON"),
    "config of no model": (written("config.json", "{}"), "could not be loaded"),
    "generation config cut": (cut("generation_config.json"), "generation_config.json is cut off"),
}


@pytest.mark.parametrize("fault", WEIGHTS)
@pytest.mark.parametrize("field", ["model.path", "teacher.path"])
def test_weights_that_are_not_the_models_are_refused(folder, fault, field):
    """In one sentence that names the field, both where they are loaded and where only headers are read."""
    plant, sentence = WEIGHTS[fault]
    plant(folder)
    source = Pretrained(str(folder), field=field)
    ways = [source.preview, source.model] if field == "model.path" else [source.preview]
    for way in ways:
        with pytest.raises(ValueError, match=rf"(?s)^{field}=\S+model\b.*{sentence}") as error:
            way()
        assert "\n" not in str(error.value)


PREFIXES = {
    "compiled": ("_orig_mod.", lambda key: f"_orig_mod.{key}"),
    "DDP": ("module.", lambda key: f"module.{key}"),
    "DDP, compiled": ("_orig_mod., module.", lambda key: f"module._orig_mod.{key}"),
    "PEFT": ("base_model.model.", lambda key: f"base_model.model.{key}"),
    "PEFT in DDP": ("base_model.model., module.", lambda key: f"module.base_model.model.{key}"),
    "a vision model's": ("language_model.", lambda key: f"language_model.{key}"),
    "a vision model's, inside": (
        "model.language_model.",
        lambda key: key.replace("model.", "model.language_model.", 1),
    ),
    "compiled layers": ("_orig_mod.", lambda key: key.replace(".mlp.", "._orig_mod.mlp.")),
    "FSDP": (
        "_fsdp_wrapped_module.",
        lambda key: "_fsdp_wrapped_module." + key.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    ),
    "a checkpoint of ours": ("student., lm.", lambda key: f"student.lm.{key}"),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_known_prefixes_are_stripped_and_said(folder, tiny, tmp_path, kind, caplog):
    shown, change = PREFIXES[kind]
    renamed(change)(folder)
    with caplog.at_level(logging.WARNING):
        lm = Pretrained(str(folder)).model()
    for name, value in Pretrained(tiny).model().state_dict().items():
        assert torch.equal(value, lm.state_dict()[name])
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and all(word in said[0] for word in shown.split(", ")), said
    assert [*Pretrained(str(folder)).preview()] == [said[0].removeprefix("warning: ")]
    lm.save_pretrained(tmp_path / "saved")  # under its own names
    assert set(load_file(tmp_path / "saved" / FILE)) == set(load_file(Path(tiny) / FILE))


def test_a_run_says_it_once_and_goes_on_under_the_models_own_names(folder, small, caplog):
    renamed(PREFIXES["compiled"][1])(folder)
    cfg = small("method=sft", f"model.path={folder}", "trainer.max_steps=1", "evaluation=none")
    assert [f.text for f in examine(cfg, fast=True) if f.name == "student's weights" and f.state == "warn"]
    with caplog.at_level(logging.WARNING):
        state = torch.load(run(cfg) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert caplog.text.count("_orig_mod.") == 1 and not [key for key in state if "_orig_mod" in key]


HARMLESS = {
    "old buffers": changed("model.layers.0.self_attn.rotary_emb.inv_freq", lambda _: torch.ones(4)),
    "tied twice": lambda folder: store(
        folder, (w := load_file(folder / FILE)) | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}
    ),
    "without the backbone's prefix": renamed(lambda key: key.removeprefix("model.")),
    "shards": sharded,
    "pickle": pickled,
    "legacy pickle": lambda folder: (
        torch.save(load_file(folder / FILE), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        (folder / FILE).unlink(),
    ),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_transformers_takes_is_taken_without_a_word(folder, tiny, kind, caplog):
    HARMLESS[kind](folder)
    with caplog.at_level(logging.WARNING):
        lm = Pretrained(str(folder)).model()
    assert Pretrained(str(folder)).preview() == [] and not caplog.records
    for name, value in Pretrained(tiny).model().state_dict().items():
        assert torch.equal(value, lm.state_dict()[name])


def test_values_are_looked_at_and_parts_beside_the_language_model_are_said(folder, caplog):
    changed(NORM, torch.zeros_like)(folder)
    with caplog.at_level(logging.WARNING):
        Pretrained(str(folder)).model()
    assert f"{NORM}: all zeros" in caplog.text
    changed("v_head.summary.weight", lambda _: torch.ones(1, 16))(folder)
    assert "v_head.summary.weight: no part of LlamaForCausalLM" in Pretrained(str(folder)).preview()[0]
    changed(NORM, lambda w: w / 0)(folder)
    with pytest.raises(ValueError, match=rf"model.path=.*: {NORM} has values that are not finite"):
        Pretrained(str(folder)).model()


def test_half_tokenizers_are_refused(folder):
    kept = (folder / "tokenizer.json").read_text() if (folder / "tokenizer.json").is_file() else None
    files = ["tokenizer_config.json", "chat_template.jinja"] + (["tokenizer.json"] if kept else [])
    for file in files:
        whole = (folder / file).read_text()
        for text, sentence in ((POINTER, "is a pointer of Git LFS"), ("", "is empty")):
            (folder / file).write_text(text)
            with pytest.raises(ValueError, match=rf"^teacher.path=\S+model: {file} {sentence}"):
                Pretrained(str(folder), field="teacher.path").vocabulary()
        (folder / file).write_text(whole)
    assert Pretrained(str(folder)).tokenizer()


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        file.unlink()
    with pytest.raises(ValueError, match=r"^model.path=\S+model has no tokenizer"):
        Pretrained(str(folder)).tokenizer()


def test_json_of_another_kind_is_refused(folder):
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json holds no JSON object"):
        Pretrained(str(folder)).model()


def test_tokenizers_that_their_library_cannot_read_are_one_sentence(tmp_path):
    """The library raises a bare Exception where its file is another's."""
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    for text, sentence in (("{}", "could not be loaded"), ('{"version": "1.0", "model"', "is cut off"), ("", "is empty")):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=rf"^model.path=\S+model\b.*{sentence}") as error:
            Pretrained(str(folder)).tokenizer()
        assert "\n" not in str(error.value)


def test_a_tokenizer_with_more_words_than_rows_is_refused_by_evaluate_too(folder, small):
    lm = AutoModelForCausalLM.from_pretrained(folder)
    lm.resize_token_embeddings(24)
    lm.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"^model.path=\S+: its tokenizer has 32 tokens and the model has 24"):
        evaluate(small(f"model.path={folder}", "method=sft"))


@pytest.mark.parametrize("role", ["model.path", "model.teacher"])
def test_check_finds_them_fast_and_a_run_refuses_them(folder, small, role):
    configured(num_hidden_layers=3)(folder)
    cfg = small("method=opd", f"{role}={folder}")
    field, who = ("model.path", "student") if role == "model.path" else ("teacher.path", "teacher")
    found = [f for f in examine(cfg, fast=True) if f.state == "fail"]
    assert [f.name for f in found] == [f"{who}'s weights"] and f"{field}={folder} does not hold" in found[0].text
    with pytest.raises(ValueError, match=rf"{field}=\S+model does not hold the LlamaForCausalLM"):
        run(cfg)
    (folder / FILE).write_text(POINTER)
    assert "pointer of Git LFS" in next(f.text for f in examine(cfg, fast=True) if f.name == f"{who}'s weights")


def test_experts_that_are_not_all_there_are_refused(tmp_path):
    folder = Path(shutil.copytree(model_folder("mixtral"), tmp_path / "model"))
    tensors = load_file(folder / FILE)
    assert Pretrained(str(folder)).preview() == []
    expert = next(key for key in sorted(tensors) if ".experts." in key)
    (folder / FILE).unlink()
    store(folder, {key: value for key, value in tensors.items() if key != expert})
    for way in (Pretrained(str(folder)).preview, Pretrained(str(folder)).model):
        with pytest.raises(ValueError, match=r"^model.path=\S+model") as error:
            way()
        assert "\n" not in str(error.value) and "experts" in str(error.value)


def adapted(base: str, to: Path, train: bool = True, **options) -> Path:
    """A folder with an adapter as PEFT saves it, with factors that are not zero."""
    torch.manual_seed(3)
    given = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**given))
    if train:
        for value in wrapped.parameters():
            if value.requires_grad:
                value.data += 0.1 * torch.randn_like(value)
    wrapped.save_pretrained(to)
    return to


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(input_ids=torch.arange(12)[None]).logits


def applied(base: str, adapter: Path) -> torch.Tensor:
    """What the base computes with the adapter beside it, as PEFT runs it."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a few words": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_its_base_with_the_adapter_merged(tiny, tmp_path, kind):
    folder = adapted(tiny, tmp_path / "adapter", **KINDS[kind])
    source = Pretrained(str(folder), field="teacher.path")
    lm, expected = source.model(), applied(tiny, folder)
    assert set(lm.state_dict()) == set(Pretrained(tiny).model().state_dict()) and not hasattr(lm, "peft_config")
    assert torch.allclose(logits(lm), expected, atol=1e-4)
    assert not torch.allclose(logits(Pretrained(tiny).model()), expected, atol=1e-2)
    assert all(p.requires_grad for p in lm.parameters())
    assert source.vocabulary() == Pretrained(tiny).vocabulary() and source.window() == 128 and source.vocab_size() == 32
    assert source.lineage() == [str(folder), tiny] and source.start() is source and source.preview() == []
    lm.save_pretrained(tmp_path / "saved")  # whole, tied or not
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, lm.state_dict()[name]) for name, value in again.items())


def test_the_tokenizer_is_the_adapters_own_where_it_has_one(tiny, tmp_path):
    folder = adapted(tiny, tmp_path / "adapter")
    words = AutoTokenizer.from_pretrained(tiny)
    words.chat_template = "{{ messages[0]['content'] }}"
    words.save_pretrained(folder)
    assert Pretrained(str(folder)).tokenizer().chat_template == words.chat_template
    AutoConfig.from_pretrained(tiny).save_pretrained(folder)  # axolotl leaves one too
    assert Pretrained(str(folder)).tokenizer().chat_template == words.chat_template and Pretrained(str(folder)).model()


@pytest.mark.slow
def test_adapters_train_in_full_with_a_fresh_adapter_and_as_teachers(tiny, tmp_path, small):
    folder = adapted(tiny, tmp_path / "adapter")
    teacher = adapted(tiny, tmp_path / "teacher", r=3)
    first = run(small("method=opd", f"model.path={folder}", f"model.teacher={teacher}", "study.name=full"))
    second = run(small("method=sft", f"model.path={folder}", "adapter=lora", "adapter.r=2", "study.name=lora"))
    for made in (first, second):
        lm = Pretrained(str(made)).model()
        to = export(made, tmp_path / f"{made.parent.name}-export")
        state = AutoModelForCausalLM.from_pretrained(to).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in lm.state_dict().items())
        assert Pretrained(str(made)).lineage() == [str(made), str(folder), tiny]


def repeated(change):
    """Rewrites the adapter's own weights."""

    def plant(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return plant


def adapter_config(**options):
    def plant(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **options}))

    return plant


ADAPTERS = {
    "base is gone": (adapter_config(base_model_name_or_path="./models/gone"), "an adapter: model.base=./models/gone could not"),
    "no base": (adapter_config(base_model_name_or_path=None), "names no base_model_name_or_path; give it"),
    "its own base": (lambda f: adapter_config(base_model_name_or_path=str(f))(f), "base is its own folder"),
    "weights gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "and no adapter_model.safetensors"),
    "pointer": (written("adapter_model.safetensors", POINTER), "adapter_model.safetensors is a pointer"),
    "cut": (cut("adapter_model.safetensors"), "adapter_model.safetensors is cut off"),
    "config cut": (cut("adapter_config.json"), "adapter_config.json is cut off"),
    "unknown kind": (adapter_config(peft_type="NEW_LORA"), "PEFT cannot merge this adapter"),
    "prompts": (adapter_config(peft_type="PROMPT_TUNING", num_virtual_tokens=2), "of the kind PROMPT_TUNING, .*not supported"),
    "another name": (
        repeated(lambda w: {k.replace("q_proj", "query"): v for k, v in w.items()}),
        r"does not fit its base, .* \(missing: .*q_proj.*; without a place in it: .*query",
    ),
    "a factor missing": (repeated(lambda w: dict(list(w.items())[1:])), "does not fit its base, .*missing"),
    "empty factors": (
        repeated(lambda w: {k: v[:0] for k, v in w.items()}),
        "PEFT cannot merge this adapter into .*size mismatch",
    ),
    "both": (
        lambda f: shutil.copy(Pretrained("stand-in://llama")._place() + f"/{FILE}", f),
        "holds both a model .* remove one",
    ),
}


@pytest.mark.parametrize("fault", ADAPTERS)
def test_adapters_that_do_not_fit_are_one_sentence(tiny, tmp_path, fault):
    folder = adapted(tiny, tmp_path / "adapter")
    plant, sentence = ADAPTERS[fault]
    plant(folder)
    with pytest.raises(ValueError, match=rf"(?s)^model.path=\S+adapter\b.*{sentence}") as error:
        Pretrained(str(folder)).model()
    assert "\n" not in str(error.value)


def test_the_base_may_be_given_and_must_be_the_adapters(tiny, other, folder, tmp_path, caplog):
    adapter = adapted(tiny, tmp_path / "adapter")
    adapter_config(base_model_name_or_path="gone")(adapter)
    assert torch.allclose(logits(Pretrained(str(adapter), base=other).model()), applied(other, adapter), atol=1e-4)
    with pytest.raises(ValueError, match=r"^teacher.base=x, but teacher.path=\S+ is no adapter .*; set teacher.base=null"):
        Pretrained(tiny, base="x", field="teacher.path").model()
    wide = model_folder("llama")
    with pytest.raises(ValueError, match=r"^model.path=\S+: PEFT cannot merge this adapter into .*size mismatch"):
        Pretrained(str(adapter), base=wide).model()
    (folder / FILE).write_text(POINTER)
    with pytest.raises(ValueError, match=r"^model.path=\S+, an adapter: model.base=\S+: model.safetensors is a pointer"):
        Pretrained(str(adapter), base=str(folder)).preview()
    with caplog.at_level(logging.WARNING):
        Pretrained(str(adapted(tiny, tmp_path / "fresh", train=False))).model()
    assert "the adapter changes nothing" in caplog.text


def test_names_of_a_compiled_adapter_find_their_places(tiny, tmp_path):
    folder = adapted(tiny, tmp_path / "adapter")
    expected = applied(tiny, folder)
    repeated(lambda w: {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in w.items()})(folder)
    assert torch.allclose(logits(Pretrained(str(folder)).model()), expected, atol=1e-4)


def test_check_takes_a_base_from_the_command_line_and_finds_a_damaged_adapter(tiny, tmp_path, small):
    folders = [adapted(tiny, tmp_path / name) for name in ("adapter", "teacher")]
    for folder in folders:
        adapter_config(base_model_name_or_path="gone")(folder)
    models = (f"model.path={folders[0]}", f"model.base={tiny}", f"teacher.path={folders[1]}", f"teacher.base={tiny}")
    cfg = small("method=opd", *models)
    assert not [f for f in examine(cfg, fast=True) if f.state == "fail"]
    for folder in folders:
        cut("adapter_model.safetensors")(folder)
    assert [f.name for f in examine(cfg, fast=True) if f.state == "fail"] == ["student's weights", "teacher's weights"]
