"""Shortcuts of decoding against the plain path: equal tokens under equal draws, and equal log-probabilities."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from opd_lightning.generation import TransformersGenerator
from opd_lightning.generation.batches import CACHES, DETECTED, batch_support, cache_support
from opd_lightning.generation.decoding import PLAIN, Reader, Shortcuts, padded
from opd_lightning.generation.draws import by_logarithm, drawn, exponentials
from opd_lightning.generation.probe import reading_gap
from opd_lightning.generation.transformers import decode, processors_of
from opd_lightning.models import Pretrained, Student, adapters, packed
from opd_lightning.runs.metrics_file import read_csv
from opd_lightning.toy.world import world_tokenizer
from opd_lightning.training.run import run
from opd_lightning.types import Rendered, SamplingParams
from opd_lightning.utils.products import onednn
from opd_lightning.utils.vocabulary import ValidIds
from tests.architectures import config_of

PROMPTS = [[5, 9, 3], [7, 4, 8, 11, 6, 12, 10], [5, 9, 3], [6]]
SAMPLING = SamplingParams(24)
EOS, PAD = [1, 13, 17, 21], 0
BOTH = Shortcuts(drop_finished=True, share_prefill=True)
WAYS = [BOTH, replace(BOTH, share_prefill=False), replace(BOTH, drop_finished=False)]
ROUNDING = 4e-6
"""Two units in the last place of these models' largest logits, which are about 16."""
MODELS = ("llama", "mistral", "qwen3", "gemma3_text", "gpt2")


def tiny_lm(name: str, **more):
    """A random model of an architecture, in eval mode."""
    config = config_of(name)
    for key, value in more.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def models() -> dict:
    """Gemma's and Mistral's windows are shorter than the completions."""
    windows = {"mistral": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8}}
    layers = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]}}
    return {name: tiny_lm(name, **windows.get(name, {}), **layers.get(name, {})) for name in MODELS}


def written(lm, sampling=SAMPLING, shortcuts=PLAIN, prompts=PROMPTS, valid_ids=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return decode(lm, prompts, sampling, EOS, PAD, valid_ids, shortcuts)


def assert_equal(found, expected, atol: float) -> None:
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
    for ours, plain in zip(found, expected, strict=True):
        assert (ours.logprobs is None) == (plain.logprobs is None)
        if plain.logprobs is not None:
            values = [torch.tensor(c.logprobs, dtype=torch.float32) for c in (ours, plain)]
            torch.testing.assert_close(*values, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_shortcuts_write_the_tokens_of_the_plain_path(models, name):
    lm = models[name]
    assert cache_support(lm, PROMPTS[0])
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    expected = written(lm, prompts=prompts)
    assert len({len(completion.token_ids) for completion in expected}) > 3  # rows do leave the batch
    for shortcuts in WAYS:
        assert_equal(written(lm, shortcuts=shortcuts, prompts=prompts), expected, ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_shortcuts_write_the_tokens_of_the_plain_path_in_bfloat16(models, name):
    lm = models[name].to(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does in a step with bf16-true
    by_logarithm.cache_clear()
    try:
        assert_equal(written(lm, shortcuts=BOTH), written(lm), 2e-2)
    finally:
        torch.set_default_dtype(torch.float32)
        lm.float()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}])
def test_shortcuts_keep_the_sampling_distribution(models, options):
    sampling, ids = SamplingParams(24, **options), ValidIds(30, (2, 19))
    expected = written(models["llama"], sampling, valid_ids=ids)
    assert_equal(written(models["llama"], sampling, BOTH, valid_ids=ids), expected, ROUNDING)
    assert not {2, 19, 30, 31} & {token for completion in expected for token in completion.token_ids}


def test_a_rows_tokens_do_not_depend_on_which_rows_are_left():
    probs = torch.randn(6, 40).softmax(-1)
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected, state = torch.multinomial(probs, 1).squeeze(1), torch.get_rng_state()
            for left in (torch.arange(6), torch.tensor([1, 4])):
                torch.manual_seed(seed)
                assert torch.equal(drawn(probs[left], 6, left), expected[left])
                assert torch.equal(torch.get_rng_state(), state)


def test_numbers_are_torchs_where_it_draws_them_in_another_way(monkeypatch):
    rows, found = torch.tensor([0, 2]), []
    for way in (by_logarithm, lambda: False):
        monkeypatch.setattr("opd_lightning.generation.draws.by_logarithm", way)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found.append(exponentials(3, 50, rows))
    assert torch.equal(*found)


def test_logits_that_nothing_can_be_drawn_from_are_refused(models):
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        written(lm, shortcuts=BOTH)


def test_models_with_another_cache_keep_the_plain_path():
    lm = tiny_lm("qwen3_next")
    assert not cache_support(lm, PROMPTS[0])
    assert_equal(written(lm, shortcuts=BOTH), written(lm), 0)


def test_finished_rows_are_not_read_and_prompts_are_read_once(models, monkeypatch):
    sizes, forward = [], Reader.forward
    monkeypatch.setattr(Reader, "forward", lambda self, ids, at: sizes.append(len(ids)) or forward(self, ids, at))
    cache_support(models["llama"], PROMPTS[0])
    sizes.clear()
    done = written(models["llama"], shortcuts=BOTH)
    lengths = [len(completion.token_ids) for completion in done]
    assert sizes == [3, *(sum(length > t for length in lengths) for t in range(1, max(lengths)))]


def test_a_cache_grows_over_its_first_buffer(models, monkeypatch):
    monkeypatch.setattr("opd_lightning.generation.key_values.ROOM", 1)
    assert_equal(written(models["llama"], shortcuts=BOTH), written(models["llama"]), ROUNDING)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_weights_give_the_logits_of_the_model(monkeypatch, name, adapted):
    monkeypatch.setattr(packed, "SMALLEST", 1)
    lm = tiny_lm(name)
    if adapted:
        adapters.add(lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    lm.eval()
    ids, mask = padded(PROMPTS, PAD, lm.device)
    with torch.no_grad():
        expected = lm(input_ids=ids, attention_mask=mask).logits
        with packed.packed(lm):
            changed = [module for module in lm.modules() if "forward" in vars(module)]
            found = lm(input_ids=ids, attention_mask=mask).logits
    assert bool(changed) == onednn(torch.float32)
    assert not [module for module in lm.modules() if "forward" in vars(module)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_weights_under_autocast_give_what_autocast_gives(monkeypatch, name):
    """The float32 masters are cast once in place of once per token."""
    monkeypatch.setattr(packed, "SMALLEST", 1)
    lm = tiny_lm(name)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = written(lm)
        with packed.packed(lm):
            assert_equal(written(lm, shortcuts=BOTH), expected, 2e-2)


def test_the_generator_reads_the_present_weights(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)
    student, tokenizer = Student(tiny_lm("llama")), world_tokenizer()
    fast, plain = TransformersGenerator(tokenizer), TransformersGenerator(tokenizer, None, False, False, False)
    prompts = [Rendered(prompt) for prompt in PROMPTS]
    for _ in range(2):
        with torch.no_grad():
            student.lm.get_output_embeddings().weight.add_(0.3 * torch.randn(student.head.weight.shape))
        for engine in (fast, plain):
            engine.update_weights(student, 1)
        done = [engine.generate(prompts, replace(SAMPLING, n=2), 5) for engine in (fast, plain)]
        assert_equal(done[0], done[1], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3_text"])
def test_a_stand_in_writes_the_same_tokens(name):
    lm = Pretrained(f"stand-in://{name.removesuffix('_text')}").model().eval()
    prompts = [[i + 5 for i in range(n)] for n in (3, 40, 17)] * 4
    expected = written(lm, SamplingParams(64), prompts=prompts)
    with packed.packed(lm):
        assert_equal(written(lm, SamplingParams(64), BOTH, prompts=prompts), expected, 1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_mixed_precision_has_a_bfloat16_teacher_and_logs_the_mismatch(small, precision):
    cfg = small("method=opd", f"trainer.precision={precision}", "evaluation=none", "trainer.max_steps=2")
    rows = read_csv(run(cfg) / "metrics.csv")
    mixed = precision == "bf16-mixed"
    assert cfg.teacher.dtype == ("bfloat16" if mixed else "float32") and cfg.model.dtype == "float32"
    gaps = [float(row["generator/mismatch"]) for row in rows if row.get("generator/mismatch")]
    assert bool(gaps) == mixed and all(0 <= gap < 0.1 for gap in gaps)


def test_the_gap_is_that_of_the_distribution_that_was_drawn_from(models):
    lm, sampling, ids = models["llama"], SamplingParams(12, temperature=0.6, top_k=8), ValidIds(30, (2,))
    (done,) = written(lm, sampling, prompts=PROMPTS[:1], valid_ids=ids)
    assert reading_gap(lm, PROMPTS[0], done, processors_of(sampling, ids)) < 1e-5
    assert reading_gap(lm, PROMPTS[0], done, processors_of(SAMPLING, ids)) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_rounding_in_bfloat16_is_not_taken_for_a_model_that_mixes_rows(models, name, monkeypatch):
    """Nor for one whose cache cannot be repeated; the tokens that are read do not hang on rounding."""
    lm = models[name].float()
    with torch.autocast("cpu", torch.bfloat16), packed.packed(lm):
        for seed in range(4):
            prompt = torch.randint(3, lm.config.vocab_size, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
            DETECTED.pop(lm, None), CACHES.pop(lm, None)
            assert (batch_support(lm, prompt), cache_support(lm, prompt)) == ("any", True)
        forward = type(lm).forward
        monkeypatch.setattr(type(lm), "forward", lambda self, *args, **given: forward(self, *args, **given | UNMASKED))
        DETECTED.pop(lm)
        assert batch_support(lm, prompt) == "equal"
        DETECTED.pop(lm)


UNMASKED = {"attention_mask": None, "position_ids": None}
