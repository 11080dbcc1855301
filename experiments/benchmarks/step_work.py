"""The work of step.py, which both sides read: prompts, lengths and measuring. It imports torch and nothing of this package."""

import json
import math
import sys
from typing import Any

import torch

TOPICS = (
    "cats and dogs",
    "gravity",
    "a city",
    "boiling eggs",
    "the moon",
    "old maps",
    "prime numbers",
    "music",
    "rivers",
    "bread",
)


def prompts(count: int) -> list[str]:
    """Questions of about the same length."""
    return [f"Question {i}: what should one know about {TOPICS[i % len(TOPICS)]}?" for i in range(count)]


def reference(question: str, words: int) -> str:
    """An answer of about this many tokens, for SFT."""
    return " ".join((question.split() * words)[:words])


def reward(text: str) -> float:
    """A reward that differs between completions."""
    return sum(map(ord, text)) % 2 / 1.0


def end_at(lm: Any, ids: list[int], rate: float) -> None:
    """Let a model end a completion at each token with a fixed probability, or never; its other logits stay as they are."""

    def hook(module: Any, inputs: Any, out: Any) -> Any:
        if not hasattr(out, "logits"):  # TRL computes its loss inside of a forward call
            return out
        out.logits[..., ids] = -torch.inf
        if rate:
            rest = out.logits.float().logsumexp(-1)
            out.logits[..., ids[0]] = (rest + math.log(rate / (1 - rate))).to(out.logits.dtype)
        return out

    lm.register_forward_hook(hook)


def end_ids(lm: Any, tokenizer: Any) -> list[int]:
    """The ids that end a completion, the tokenizer's own first."""
    more = lm.generation_config.eos_token_id
    return list(dict.fromkeys([tokenizer.eos_token_id, *([more] if isinstance(more, int) else more or [])]))


def wait() -> None:
    """Wait until a step is asked for."""
    if not sys.stdin.readline():
        sys.exit(0)


def tell(seconds: float, cpu: float, parts: dict[str, float], tokens: int, padded: int, device: str) -> None:
    """Print what a step cost; `cpu` are the seconds that processors worked for it, which other programs hardly change."""
    row: dict[str, Any] = {
        "seconds": seconds,
        "cpu": cpu,
        **parts,
        "tokens": tokens,
        "padded": padded,
        "torch": torch.__version__,
    }
    print(json.dumps(row | {"peak_mib": peak_mib(device)}), flush=True)


def peak_mib(device: str) -> float:
    """The peak of allocated memory on a GPU, or of resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as file:
        return int(dict(line.split(":", 1) for line in file)["VmHWM"].split()[0]) / 1024
