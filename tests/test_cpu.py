"""What makes models faster on CPUs gives the losses, gradients and tokens of the plain path."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opd_lightning.generation.transformers import decode
from opd_lightning.losses.head import matmul
from opd_lightning.models import adapters, short_attention
from opd_lightning.models.cpu import fast_on_cpu
from opd_lightning.models.float32_layers import fast_float32
from opd_lightning.types import SamplingParams
from opd_lightning.utils import products
from tests.architectures import config_of

IDS = torch.tensor([[5, 9, 3, 7, 4, 8], [7, 4, 8, 11, 6, 12]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
MODELS = ("llama", "qwen3", "gemma3_text", "gpt2", "mistral")
pytestmark = pytest.mark.skipif(not products.onednn(torch.float32), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(products, "SMALLEST", 1)


def tiny(name: str, dtype=torch.float32, lora: bool = False):
    """A random model whose weights are numbers of bfloat16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(config_of(name))
        if lora:
            adapters.add(lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return lm.to(torch.bfloat16).to(dtype).train()


def learned(lm, context, checkpointing: bool = False):
    """A loss on the logits, and the gradients of the trained weights by name."""
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    lm.zero_grad()
    with torch.random.fork_rng(), context(lm):
        torch.manual_seed(1)  # GPT-2 has dropout
        logits = lm(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
        loss = logits[MASK.bool()].double().logsumexp(-1).square().mean()
        loss.backward()
    return float(loss.detach()), {name: p.grad.double() for name, p in lm.named_parameters() if p.grad is not None}


def error(found, exact) -> tuple[float, float]:
    """The relative differences of a loss and, at most, of a gradient."""
    (loss, grads), (true_loss, true) = found, exact
    assert grads.keys() == true.keys()
    worst = max(float((grads[key] - true[key]).abs().max() / true[key].abs().max().clamp_min(1e-3)) for key in true)
    return abs(loss / true_loss - 1), worst


def nothing(lm):
    return torch.autograd.profiler.record_function("plain")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_products_give_torchs_losses_and_gradients(name, lora, checkpointing):
    exact = learned(tiny(name, torch.float64, lora), nothing)
    loss, gradient = error(learned(tiny(name, lora=lora), fast_float32, checkpointing), exact)
    assert loss < 1e-6 and gradient < 1e-5


def test_layers_are_changed_inside_of_the_context_only():
    lm = tiny("llama")
    with fast_float32(lm):
        assert sum("forward" in vars(module) for module in lm.modules()) == 15
    assert not [module for module in lm.modules() if "forward" in vars(module)]
    with torch.autocast("cpu", torch.bfloat16), fast_float32(lm):
        assert not [module for module in lm.modules() if "forward" in vars(module)]
    with fast_float32(lm.double()):
        assert not [module for module in lm.modules() if "forward" in vars(module)]


def test_products_of_views_equal_torchs():
    left, right, bias = torch.randn(3, 5, 8), torch.randn(8, 7), torch.randn(7)
    torch.testing.assert_close(products.product(left, right.t(), bias), left @ right + bias)
    torch.testing.assert_close(products.product(left[0].t(), right[:5].t()), left[0].t() @ right[:5])
    torch.testing.assert_close(matmul(left[0], right.t(), torch.empty(5, 7)), left[0] @ right)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("tokens,length", [(1, 40), (30, 30), (5, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_attention_is_sdpa(dtype, tokens, length, mask):
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, t, 16).to(dtype) for n, t in ((6, tokens), (2, length), (2, length)))
    seen = (torch.rand(2, 1, tokens, length) > 0.2) | (torch.arange(length) == 0)
    given = {"none": None, "bool": seen, "float": torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e4)}[mask]
    expected, _ = sdpa_attention_forward(module, query, key, value, given, scaling=0.3)
    found, _ = short_attention.attention(module, query, key, value, given, scaling=0.3)
    assert found.dtype == dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_models_learn_and_write_the_same(name, monkeypatch):
    lm, exact = tiny(name, torch.bfloat16), learned(tiny(name), nothing)
    calls, attend = [], short_attention.attention
    monkeypatch.setattr(short_attention, "attention", lambda *a, **b: calls.append(1) or attend(*a, **b))
    plain, fast = error(learned(lm, nothing), exact), error(learned(lm, fast_on_cpu), exact)
    assert calls and lm.config._attn_implementation == "sdpa"
    assert fast[0] < 2e-2 and fast[1] < 0.02 + 1.5 * plain[1]
    lm.eval()
    written = [decode(lm, IDS.tolist(), SamplingParams(12, temperature=0.0), [1], 0)]
    with short_attention.short_attention(lm):
        written.append(decode(lm, IDS.tolist(), SamplingParams(12, temperature=0.0), [1], 0))
    assert [c.token_ids for c in written[0]] == [c.token_ids for c in written[1]]


def test_long_texts_and_dropout_are_left_to_sdpa(monkeypatch):
    monkeypatch.setattr(short_attention, "attended", None)
    module, states = torch.nn.Module(), torch.randn(1, 2, 300, 8).bfloat16()
    short_attention.attention(module, states, states, states, None)
    short_attention.attention(module, states[..., :9, :], states[..., :9, :], states[..., :9, :], None, dropout=0.1)
    short_attention.attention(module, *[states[..., :9, :].float()] * 3, None)
