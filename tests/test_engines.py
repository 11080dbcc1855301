"""One contract for every engine: ids, ends, log-probabilities, seeds, new weights. vLLM's cases run in its own environment."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from peft import LoraConfig

from opd_lightning.data.renderer import ChatRenderer
from opd_lightning.generation import TransformersGenerator, VLLMGenerator, VLLMServerGenerator
from opd_lightning.models import Pretrained, Student, adapters
from opd_lightning.models.weights import full_weights
from opd_lightning.types import Rendered, SamplingParams

PATH = "stand-in://qwen3"
WITH_VLLM = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm")]
VLLM, SERVER = pytest.param("vllm", marks=WITH_VLLM), pytest.param("vllm_server", marks=WITH_VLLM)
OPTIONS = {"enforce_eager": True, "max_model_len": 128}


class Ends(ChatRenderer):
    """A renderer for which many tokens end a reply, so that random models end some of theirs."""

    @property
    def end_ids(self) -> list[int]:  # type: ignore[override]
        return [self.end_id, *range(20, 60)]


@pytest.fixture(scope="module")
def start() -> Pretrained:
    return Pretrained(PATH)


@pytest.fixture(scope="module")
def renderer(start) -> ChatRenderer:
    return Ends(start.tokenizer())


@pytest.fixture(scope="module", params=["transformers", VLLM, SERVER])
def engine(request, renderer):
    if request.param == "transformers":
        made = TransformersGenerator(renderer.tokenizer, renderer)
    elif request.param == "vllm":
        made = VLLMGenerator(renderer.tokenizer, renderer, OPTIONS)
    else:
        made = VLLMServerGenerator(renderer.tokenizer, renderer, start=True, options=OPTIONS)
    yield made
    made.close()


def new_student(start, renderer, noise: float = 0.0) -> Student:
    """Weights that are spread, so that log-probabilities differ between tokens."""
    student = Student(start.model(), valid_ids=renderer.valid_ids)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(3.0) if p.dim() > 1 else None
            p.add_(noise * torch.randn_like(p))
    return student


@pytest.fixture(scope="module")
def student(start, renderer, engine) -> Student:
    student = new_student(start, renderer)
    engine.update_weights(student, 3)
    return student


def prompts(renderer, n: int = 4) -> list[Rendered]:
    texts = ["a b", "c", "a longer prompt than the others", "d e f"]
    return [renderer.render([{"role": "user", "content": texts[i % 4] + " x" * (i // 4)}]) for i in range(n)]


def expected(student, prompt: Rendered, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a completion by one forward pass without a cache."""
    row = torch.tensor([[*prompt.token_ids, *ids]])
    with student.eval_mode() as lm:
        logits = lm(input_ids=row).logits[0, len(prompt.token_ids) - 1 : -1].float()
    logits[:, student.valid_ids.size :] = -torch.inf
    return (logits / temperature).log_softmax(-1).gather(-1, row[0, len(prompt.token_ids) :, None]).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_weights(engine, student, renderer, temperature):
    given = prompts(renderer)
    done = engine.generate(given, SamplingParams(16, temperature=temperature, n=3), 5)
    assert len(done) == 12
    for i, completion in enumerate(done):
        known = expected(student, given[i // 3], completion.token_ids, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), known, rtol=0, atol=1e-4)
        assert completion.policy_version == 3
    assert len({tuple(completion.token_ids) for completion in done[:3]}) == 3  # one prompt's samples are drawn apart


def test_top_p_and_top_k_are_part_of_the_distribution(engine, student, renderer):
    given = prompts(renderer, 1)
    (one,) = engine.generate(given, SamplingParams(8, top_k=1), 0)
    assert all(abs(x) < 1e-5 for x in one.logprobs)  # one token is left, with all the probability
    (few,) = engine.generate(given, SamplingParams(8, top_p=0.3), 0)
    assert all(x > y - 1e-4 for x, y in zip(few.logprobs, expected(student, given[0], few.token_ids).tolist(), strict=True))


def test_completions_end_at_the_first_end_token_or_at_the_limit(engine, student, renderer):
    done = engine.generate(prompts(renderer), SamplingParams(16, n=8), 1)
    ends, reasons = set(renderer.end_ids), {completion.finish_reason for completion in done}
    assert reasons == {"stop", "length"}
    for completion in done:
        inside, last = completion.token_ids[:-1], completion.token_ids[-1]
        assert not ends & set(inside)
        assert (last in ends) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 16
    assert len({c.token_ids[-1] for c in done if c.finish_reason == "stop"}) > 1  # several end tokens


def test_only_words_are_written(engine, student, renderer):
    """The stand-in's output layer has rows behind the last token, as Qwen's has."""
    assert student.head.weight.shape[0] > renderer.valid_ids.size
    done = engine.generate(prompts(renderer), SamplingParams(16, temperature=2.0, n=16), 2)
    assert max(token for completion in done for token in completion.token_ids) < renderer.valid_ids.size


def test_greedy_is_the_reference_engines(engine, student, renderer):
    reference = TransformersGenerator(renderer.tokenizer, renderer)
    reference.update_weights(student, 3)
    sampling = SamplingParams(12, temperature=0.0)
    assert engine.generate(prompts(renderer), sampling, 0) == reference.generate(prompts(renderer), sampling, 0)


def test_a_seed_draws_the_same_and_another_draws_others(engine, student, renderer):
    sampling = SamplingParams(12)
    first = engine.generate(prompts(renderer), sampling, 7)
    assert engine.generate(prompts(renderer), sampling, 7) == first
    assert engine.generate(prompts(renderer), sampling, 8) != first


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_new_weights_write_after_an_update(engine, student, start, renderer, adapted):
    moved = new_student(start, renderer, 0.05)
    if adapted:
        adapters.add(moved.lm, LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            for layer in adapters.layers(moved.lm).values():
                layer.lora_B["default"].weight.normal_(std=0.5)
    try:
        engine.update_weights(moved, 4)
        (one,) = engine.generate(prompts(renderer, 1), SamplingParams(12), 7)
        known = expected(moved, prompts(renderer, 1)[0], one.token_ids)
        torch.testing.assert_close(torch.tensor(one.logprobs), known, rtol=0, atol=1e-4)
        assert one.policy_version == 4
    finally:
        engine.update_weights(student, 3)


def test_another_model_can_write_and_the_student_again_afterwards(engine, student, start, renderer):
    other = new_student(start, renderer, 0.05)
    before = engine.generate(prompts(renderer), SamplingParams(8), 7)
    theirs = engine.generate(prompts(renderer), SamplingParams(8), 7, other.eval_mode)
    assert theirs != before and all(completion.policy_version is None for completion in theirs)
    known = expected(other, prompts(renderer)[0], theirs[0].token_ids)
    torch.testing.assert_close(torch.tensor(theirs[0].logprobs), known, rtol=0, atol=1e-4)
    assert engine.generate(prompts(renderer), SamplingParams(8), 7) == before


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="make test-vllm")
@pytest.mark.parametrize("engine", [VLLM, SERVER], indirect=True)
def test_a_push_that_did_not_happen_is_noticed(engine, student, start, renderer, monkeypatch):
    assert engine.metrics["generator/mismatch"] < 1e-4
    monkeypatch.setattr(engine, "push", lambda lm: None)
    moved = new_student(start, renderer, 0.01)
    with pytest.raises(ValueError, match=r"differ by .*generator\.max_mismatch"):
        engine.update_weights(moved, 4)
    monkeypatch.undo()
    engine.update_weights(student, 3)


def test_full_weights_are_those_of_the_merged_model(start, renderer):
    """By the names of the checkpoint, tied ones twice."""
    lm = start.model()
    adapters.add(lm, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for layer in adapters.layers(lm).values():
            layer.lora_B["default"].weight.normal_()
    found = {name: value.clone() for name, value in full_weights(lm)}
    merged = adapters.merged(lm).state_dict()
    assert set(found) == set(merged) and "lm_head.weight" in found
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_vllm_is_asked_for_where_it_is_missing(renderer, monkeypatch):
    monkeypatch.setattr("opd_lightning.generation.vllm.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install vllm"):
        VLLMGenerator(renderer.tokenizer)


def test_rows_of_a_batch_do_not_depend_on_each_other(engine, student, renderer):
    given = prompts(renderer)
    together = engine.generate(given, SamplingParams(8, temperature=0.0), 0)
    alone = [engine.generate([prompt], SamplingParams(8, temperature=0.0), 0)[0] for prompt in given]
    assert [replace(c, logprobs=None) for c in together] == [replace(c, logprobs=None) for c in alone]
