"""Weights in 4 bits under an adapter (adapter=qlora), and averages of the optimizer in 8 bits (optim=adamw_8bit)."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from opd_lightning.export import export
from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.models.flops import Sizes
from opd_lightning.models.optimizer import Optim, adamw_8bit
from opd_lightning.models.weights import full_weights, weight_shapes
from opd_lightning.teachers.weights import FrozenStart
from opd_lightning.training.run import run
from opd_lightning.types import Sequences

quantization = pytest.importorskip("opd_lightning.models.quantization")
needs_bitsandbytes = pytest.mark.skipif(
    quantization.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install opd-lightning[quantized]"
)
IDS = torch.arange(2, 14)[None]
SMOLLM2 = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"


def config(**options):
    return quantization.QLoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def qlora(folder: str, **options):
    """A model in 4 bits with an adapter that has an effect."""
    lm = adapters.add(Pretrained(folder).model(), config(**options))
    torch.manual_seed(0)
    for layer in adapters.layers(lm).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return lm


def lora_on_the_same_values(folder: str):
    """LoRA on ordinary layers that have the values of those in 4 bits."""
    base = quantization.dequantize(quantization.quantize(Pretrained(folder).model(), config()))
    adapters.add(base, config().plain())
    return base


def logits(lm):
    with torch.no_grad():
        return lm(IDS).logits


@needs_bitsandbytes
def test_logits_and_gradients_are_those_of_lora_on_the_values_in_4_bits(tiny):
    """Also behind a forward pass in eval mode, as rollouts are."""
    lm, base = qlora(tiny), lora_on_the_same_values(tiny)
    with adapters.disabled(lm):
        assert torch.allclose(logits(lm), logits(base), atol=1e-5)
    assert not torch.allclose(logits(base), logits(Pretrained(tiny).model()), atol=1e-2)
    own = dict(lm.named_parameters())
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(own[name])
    for model in (lm, base):
        model.train()(IDS).logits.logsumexp(-1).pow(2).mean().backward()
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            assert own[name].grad.norm() > 0 and torch.allclose(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-6), name


@needs_bitsandbytes
def test_the_frozen_teachers_scores_are_those_of_the_base_in_4_bits(tiny):
    student, teacher = Student(adapters.add(Pretrained(tiny).model(), config())), FrozenStart()
    teacher.setup(student)
    assert teacher.model is None  # no copy
    for layer in adapters.layers(student.lm).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    sequences = Sequences(IDS, torch.ones_like(IDS), torch.zeros(12, dtype=torch.long), torch.arange(12))
    base = quantization.quantize(Pretrained(tiny).model(), config())
    scores, expected = teacher.read([sequences]), Student(base).read([sequences])
    assert torch.equal(scores.hidden, expected.hidden)
    assert torch.equal(scores.chunk(slice(None)).logits, expected.chunk(slice(None)).logits)
    assert not torch.allclose(student.read([sequences]).hidden, expected.hidden, atol=1e-3)


@needs_bitsandbytes
def test_merged_weights_and_those_for_engines_give_the_models_logits(tiny):
    lm = qlora(tiny)
    expected, weights, shapes = logits(lm), dict(full_weights(lm)), list(weight_shapes(lm))
    assert [(key, value.dtype, tuple(value.shape)) for key, value in weights.items()] == shapes
    merged = adapters.merged(lm)
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    assert all(torch.equal(weights[key], value) for key, value in merged.state_dict().items())
    assert type(merged) is type(Pretrained(tiny).model()) and not adapters.layers(merged)


@needs_bitsandbytes
def test_sizes_count_weights_and_not_bytes(tiny):
    plain = adapters.add(Pretrained(tiny).model(), config().plain())
    assert Sizes.of(qlora(tiny)) == Sizes.of(plain)


@needs_bitsandbytes
def test_layers_that_keep_their_weights_transposed():
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=64, n_layer=1, n_head=2)).eval()
    plain = logits(lm)
    quantization.quantize(lm, config())
    assert 0 < (logits(lm) - plain).abs().max() < 0.1
    expected = logits(lm)
    assert torch.allclose(logits(quantization.dequantize(lm)), expected, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["frozen", "ema", "live"])
def test_a_run_goes_on_and_is_exported(small, tmp_path, teacher):
    """Stopped and resumed, it has the weights of an unbroken one; its exported model has the run's logits."""
    words = ["method=sdft", f"teacher={teacher}", "adapter=qlora", "adapter.r=2", "optim.lr=0.05", "optim.warmup_steps=0"]
    run(small(*words, "study.name=two"))
    folders = [run(small(*words, "trainer.max_steps=4", f"study.name={name}")) for name in ("two", "one")]
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in folders)
    assert all("lora_" in key for key in one["state_dict"])
    assert all(torch.equal(one["state_dict"][key], value) for key, value in two["state_dict"].items())
    source = Pretrained(str(folders[0]))
    expected = logits(source.adapted().eval())
    out = AutoModelForCausalLM.from_pretrained(export(folders[0], tmp_path / "model"))
    assert torch.allclose(logits(out), expected, atol=1e-4)
    peft_config = (export(folders[0], tmp_path / "adapter", adapter=True) / "adapter_config.json").read_text()
    assert "quantization" not in peft_config


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`make smollm2` puts the model there")
@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.35), ("bfloat16", 0.5)])
def test_a_base_of_135_million_weights_takes_half_the_memory_of_loras(dtype, share):
    """Embedding and output layer, a fifth of the weights, are counted as they are, in the dtype of LoRA's base."""
    lm = Pretrained(str(SMOLLM2), dtype).model()
    before = sum(p.nbytes for p in lm.parameters())
    quantization.quantize(lm, config())
    scales = [p.quant_state for p in lm.parameters() if getattr(p, "quant_state", None) is not None]
    after = sum(p.nbytes for p in lm.parameters()) + sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in scales)
    assert len(scales) == 210 and after <= share * before


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="`make smollm2` puts the model there")
def test_a_student_of_135_million_weights_trains(small):
    words = ["model=smollm2", f"model.path={SMOLLM2}", "method=sdft", "teacher=frozen", "adapter=qlora", "evaluation=none"]
    words += ["task.n_train=4", "data.batch_size=1", "rollout.sampling.max_new_tokens=4", "optim.warmup_steps=0"]
    folder = run(small(*words))
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.abs().max() > 0 for key, value in state.items() if "lora_B" in key)


@needs_bitsandbytes
def test_averages_in_8_bits_take_a_quarter_of_the_memory():
    sizes = []
    for kind in (adamw_8bit, torch.optim.AdamW):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 256))
        optimizer, _ = Optim(kind, lr=1e-2).build([weight], 1)
        before, weight.grad = weight.detach().clone(), torch.randn(64, 256)
        optimizer.step()
        sizes.append(
            sum(v.nbytes for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor) and v.numel() > 9999)
        )
        assert torch.allclose(weight - before, -1e-2 * weight.grad.sign(), atol=2e-3)
    assert sizes[0] * 4 == sizes[1]


@needs_bitsandbytes
@pytest.mark.slow
def test_averages_in_8_bits_are_resumed(small):
    words = ["method=sft", "optim=adamw_8bit", "optim.optimizer.min_8bit_size=16", "optim.lr=0.01"]
    run(small(*words, "study.name=two"))
    folders = [run(small(*words, "trainer.max_steps=4", f"study.name={name}")) for name in ("two", "one")]
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in folders)
    assert all(torch.equal(one[key], value) for key, value in two.items())


def test_refusals(small, monkeypatch):
    from opd_lightning.preflight.components import assemble

    with pytest.raises(ValueError, match=r"adapter\.quantization=int4 is unknown; choose nf4 or fp4"):
        config(quantization="int4")
    with pytest.raises(ValueError, match=r"adapter\.compute_dtype='half_float' is no torch dtype"):
        config(compute_dtype="half_float")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="adapter=qlora needs a package: pip install bitsandbytes"):
        assemble(small("method=sdft", "adapter=qlora"), None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="optim=adamw_8bit needs a package: pip install bitsandbytes"):
        assemble(small("method=sft", "optim=adamw_8bit"), None)


@needs_bitsandbytes
def test_weights_in_4_bits_and_averages_in_8_are_refused_where_they_are_sharded(small):
    from opd_lightning.preflight.components import assemble

    for words, message in ((["adapter=qlora"], "adapter=qlora stores weights in 4 bits"), (["optim=adamw_8bit"], "AdamW8bit")):
        with pytest.raises(ValueError, match=message):
            assemble(small("method=sft", "trainer=fsdp2", *words), None)
