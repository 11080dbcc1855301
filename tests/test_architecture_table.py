"""Architectures: what each can be used for, by the table in docs/architectures.md, and the faults that some had."""

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from opd_lightning.check import examine
from opd_lightning.generation.batches import batch_support
from opd_lightning.generation.transformers import decode
from opd_lightning.models import Pretrained, Student, adapters, backbone
from opd_lightning.models.flops import Sizes
from opd_lightning.teachers.weights import Average, FrozenStart, TrustRegion
from opd_lightning.types import SamplingParams
from tests import architectures

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
IDS = torch.tensor([[5, 9, 3, 7, 11, 2]])


def told() -> list[str]:
    """The lines of the page's table."""
    return PAGE.read_text().split("<!-- table -->\n")[1].split("<!-- end -->")[0].strip().splitlines()


def test_the_page_has_every_architecture_and_no_cell_without_a_word():
    lines = told()
    assert lines[0] == architectures.line(architectures.HEADER)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [cells[0] for cells in rows] == list(architectures.ARCHITECTURES)
    assert all(cell in ("works", "-") or cell.startswith("refused by `") for cells in rows for cell in cells[1:6])


def check_row(name, folder) -> None:
    assert architectures.line(architectures.row(name, folder)) in told()


FAST = ["gpt2", "qwen2_5_vl"]


@pytest.mark.parametrize("name", FAST)
def test_a_row_of_the_table(name, tmp_path):
    check_row(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in architectures.ARCHITECTURES if name not in FAST])
def test_the_other_rows_of_the_table(name, tmp_path):
    check_row(name, tmp_path)


# --- adapters


def model_of(name, **more):
    torch.manual_seed(0)
    config = architectures.config_of(name)
    for key, value in more.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config).eval()


def lora(**more) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more})


def adapted(name, **more) -> Student:
    """A student whose adapter has something to say."""
    student = Student(adapters.add(model_of(name), lora(**more))).eval()
    generator = torch.Generator().manual_seed(1)
    for p in student.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return student


def logits_of(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm(input_ids=IDS).logits


ADAPTED = ["gpt2", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "qwen3_next", "mamba", "llama4_text"]


@pytest.mark.parametrize("name", ADAPTED)
def test_the_average_and_the_merged_model_are_the_adapted_one(name):
    student = adapted(name)
    policy = Average(1.0)
    policy.setup(student)
    expected, plain = logits_of(student.lm), logits_of(model_of(name))
    with policy.language_model() as lm:
        torch.testing.assert_close(logits_of(lm), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(student.lm), expected, rtol=0, atol=0)  # the student has its own weights again
    merged = adapters.merged(student.lm)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert set(merged.state_dict()) == set(model_of(name).state_dict())
    assert (expected - plain).abs().max() > 0.1


def test_a_square_matrix_kept_as_in_by_out_is_not_averaged_transposed():
    """GPT-2's attention.c_proj has the same shape both ways, so nothing but the numbers could tell."""
    student = adapted("gpt2", target_modules=r".*attn\.c_proj")
    (name, layer), *_ = adapters.layers(student.lm).items()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(dict(adapters.dense(student.lm))[name], 2.0 * (b @ a).detach())
    policy = Average(1.0)
    policy.setup(student)
    with policy.language_model() as lm:
        found = logits_of(lm)
    torch.testing.assert_close(found, logits_of(adapters.merged(student.lm)), rtol=1e-4, atol=1e-4)


def test_a_convolution_of_groups_is_refused():
    with pytest.raises(ValueError, match=r"adapts model\.layers\.0\.temporal_block\.conv_1d, a convolution of groups"):
        adapters.add(model_of("recurrent_gemma"), lora(r=16, target_modules=["conv_1d", "linear_x"]))


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_a_frozen_start_and_a_trust_region_are_the_models_own(name):
    student = Student(adapters.add(model_of(name), lora())).eval()
    frozen, region = FrozenStart(), TrustRegion(0.5)
    frozen.setup(student)
    region.setup(student)
    for p in student.parameters():
        if p.requires_grad:
            p.data += 0.2
    with frozen.language_model() as lm:
        torch.testing.assert_close(logits_of(lm), logits_of(model_of(name)))


def test_a_router_is_left_out_and_refused_by_name():
    names = adapters.layers(adapters.add(model_of("llama4_text"), lora()))
    assert names and not any("router" in name for name in names)
    with pytest.raises(ValueError, match=r"adapter\.target_modules=.*router, a Llama4Router, whose output is no plain product"):
        adapters.add(model_of("llama4_text"), lora(target_modules=["router", "q_proj"]))
    user = adapters.exclude_unfit(model_of("llama4_text"), lora(exclude_modules=r".*q_proj"))
    assert not any("q_proj" in n or "router" in n for n in adapters.layers(adapters.add(model_of("llama4_text"), user)))


@pytest.mark.parametrize("more", [{"lora_bias": True}, {"use_dora": True}])
def test_a_variant_that_is_more_than_a_low_rank_change_is_refused(more):
    with pytest.raises(ValueError, match="adapter sets a variant of LoRA"):
        adapters.add(model_of("llama"), lora(**more))


def test_dropout_beside_experts_is_refused_before_training(tmp_path, small):
    path = architectures.save("qwen3_moe", tmp_path / "moe")
    found = examine(small("method=sdft", f"model.path={path}", "adapter=lora", "adapter.lora_dropout=0.1"))
    assert ("architecture", "fail") in [(f.name, f.state) for f in found]


# --- heads


@pytest.mark.parametrize("name", list(architectures.ARCHITECTURES)[:-2])
def test_heads_are_read_right(name):
    Student(model_of(name)).verify_head("model.path=x")


@pytest.mark.parametrize(("name", "key"), [("recurrent_gemma", "logits_soft_cap"), ("gemma2", "final_logit_softcapping")])
@pytest.mark.parametrize("cap", [15.0, 30.0])
def test_a_cap_is_read_and_one_that_is_not_is_refused(name, key, cap, monkeypatch):
    student = Student(model_of(name, **{key: cap}))
    assert student.head.softcap == cap
    student.verify_head("model.path=x")
    monkeypatch.setattr("opd_lightning.models.student.soft_cap", lambda config: None)
    with pytest.raises(ValueError, match=r"model\.path=x: .*ForCausalLM changes its hidden states or logits"):
        student.verify_head("model.path=x")


def test_a_scale_of_an_unknown_name_and_a_broken_forward_pass_are_refused(monkeypatch):
    student = Student(model_of("granite"))
    monkeypatch.setattr("opd_lightning.models.student.scale", lambda config: 1.0)
    with pytest.raises(ValueError, match="changes its hidden states or logits"):
        student.verify_head("teacher.path=x")
    monkeypatch.setattr(backbone, "backbone", lambda lm: lm)  # as where the class names its backbone wrongly
    with pytest.raises(ValueError, match=r"teacher\.path=x: Granite.* cannot be read as a causal language model"):
        student.verify_head("teacher.path=x")


# --- loading and writing


def test_eager_attention_is_chosen_with_one_line(tmp_path, caplog):
    path = architectures.save("gemma2", tmp_path / "gemma2")
    with caplog.at_level(logging.WARNING):
        lm = Pretrained(path).model()
    assert lm.config._attn_implementation == "eager"
    assert [m for m in caplog.messages if "attention" in m] == [
        f"warning: model.path={path}: Gemma2ForCausalLM has no sdpa attention; attention=eager is used instead."
    ]


@pytest.mark.parametrize("asked", ["flash_attention_2", "spda"])
def test_an_attention_that_cannot_be_had_is_named(tiny, asked):
    with pytest.raises(ValueError, match=rf"^teacher\.attention={asked} cannot be used \(.*\); choose sdpa or eager\."):
        Pretrained(tiny, attention=asked, field="teacher.path").model()


def test_a_model_of_images_is_refused_in_one_sentence(tmp_path, small):
    path = architectures.save("qwen2_5_vl", tmp_path / "vl")
    for told in (lambda: Pretrained(path).model(), lambda: Pretrained(path).vocab_size()):
        with pytest.raises(ValueError, match=r"model\.path=.* is of the architecture qwen2_5_vl, for which") as error:
            told()
        assert len(str(error.value)) < 400
    found = examine(small("method=opd", f"model.path={path}"), fast=True)
    assert any(f.state == "fail" and "qwen2_5_vl" in f.text for f in found)


@pytest.mark.parametrize(
    ("name", "batch"), [("rwkv", "single"), ("recurrent_gemma", "equal"), ("mamba2", "any"), ("gpt2", "any")]
)
def test_a_completion_does_not_depend_on_the_prompts_beside_it(name, batch):
    lm, greedy = model_of(name), SamplingParams(6, temperature=0.0)
    prompts = [[5, 9, 3, 7, 11, 2, 8, 4], [6, 3], [9, 9, 4, 7, 3], [7, 3]]
    together = [c.token_ids for c in decode(lm, prompts, greedy, [1], 4)]
    assert together == [decode(lm, [prompt], greedy, [1], 4)[0].token_ids for prompt in prompts]
    assert batch_support(lm, prompts[0]) == batch


def test_writing_does_not_change_the_weights_of_rwkv(tmp_path):
    """transformers divides them in place in eval mode, by `rescale_every`; checkpoint and average would have those."""
    path = architectures.save("rwkv", tmp_path / "rwkv", rescale_every=1)
    lm = Pretrained(path).model()
    before = {name: p.clone() for name, p in lm.named_parameters()}
    logits_of(lm)
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_check_loads_the_models_without_a_teacher_to_probe(tmp_path, small):
    path = architectures.save("rwkv", tmp_path / "rwkv")
    found = {f.text: (f.name, f.state) for f in examine(small("method=sft", f"model.path={path}"))}
    assert any("RwkvForCausalLM: backbone and output layer" in text and at[1] == "pass" for text, at in found.items())
    assert any("generated for one prompt at a time" in text and at == ("architecture", "warn") for text, at in found.items())
    assert "architecture" not in {f.name for f in examine(small("method=sft"), fast=True)}


# --- estimates and counts


@pytest.mark.parametrize("name", ["mamba", "gemma3n_text"])
def test_memory_is_estimated_without_heads_and_with_widths_by_layer(name, tmp_path, small):
    path = architectures.save(name, tmp_path / name)
    found = [f for f in examine(small("method=sft", f"model.path={path}"), fast=True) if f.name in ("memory", "disk")]
    assert len(found) == 2 and not any(f.state == "fail" or "not estimated" in f.text for f in found)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_an_estimate_that_cannot_be_made_stops_nothing(what, small, monkeypatch):
    def broken(*_):
        raise AttributeError("no such thing as layers")

    monkeypatch.setattr("opd_lightning.preflight.resources.shapes_of", broken)
    found = [f for f in examine(small("method=sft"), fast=True) if f.name == what]
    assert [f.state for f in found] == ["warn"] and "not estimated" in found[0].text


def test_flops_count_the_experts_that_work(caplog, monkeypatch):
    lm = model_of("qwen3_moe")
    experts = sum(p.numel() for name, p in lm.named_parameters() if ".experts." in name)
    matrices = sum(
        p.numel() for name, p in lm.named_parameters() if p.dim() >= 2 and "embed" not in name and "head" not in name
    )
    sizes = Sizes.of(lm)
    assert sizes.layers == sizes.trained == matrices - experts // 2  # two of four
    monkeypatch.setattr("opd_lightning.models.flops.first_of", lambda *_: 0)
    assert Sizes.of(lm).layers == matrices and "as if all did" in caplog.text
    assert Sizes.of(model_of("mamba")).attention == 0
    llama = model_of("llama4_text")
    assert Sizes.of(llama).layers < sum(p.numel() for p in llama.parameters()) - llama.lm_head.weight.numel()
