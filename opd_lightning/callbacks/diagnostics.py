"""Diagnostics: repetition in rollouts, and wording that leaks from the teacher's context."""

import re
from collections.abc import Sequence
from typing import Any

import lightning as L

NGRAM = 4
"""Length of the n-grams: of tokens that count as repeated, and of words that count as leaked."""


def repetition(ids: Sequence[int]) -> float:
    """The share of repeated 4-grams of tokens; 0 for completions shorter than two of them."""
    grams = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngrams(text: str) -> set[tuple[str, ...]]:
    """Every 4-gram of words of a text, line by line, case and punctuation apart."""
    grams = set()
    for line in text.splitlines():
        words = re.findall(r"\w+", line.lower())
        grams |= {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}
    return grams


class Diagnostics(L.Callback):
    """Logs `rollout/repetition`, and `rollout/leakage`: the share of completions that repeat the context's wording.

    Self-distilled students learn to write "based on the example above" although they are shown none (SDFT, arXiv 2601.19897);
    loss/weight=skip_first and another wording help. What the context quotes, such as a solution, does not count as leakage.

    Args:
        every: optimizer steps between measurements.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"callbacks.diagnostics.every={every} must be at least 1.")
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: object) -> None:
        """Measure this device's part of the step's rollout."""
        if trainer.global_step % self.every:
            return
        samples = outputs["samples"]
        written = [sample.token_ids[sample.loss_mask].tolist() for sample in samples]
        numbers = {"rollout/repetition": sum(map(repetition, written)) / len(samples)}
        parts = [part for teacher in module.teachers.values() for part in teacher.parts]
        wording = {words for part in parts for words in ngrams(part.context.template_text())}
        if wording:
            texts = module.renderer.decode_all([sample.completion_ids for sample in samples])
            prompts = [ngrams("\n".join(text_of(m) for m in sample.example.messages)) for sample in samples]
            leaked = [bool(ngrams(text) & wording - prompt) for text, prompt in zip(texts, prompts, strict=True)]
            numbers["rollout/leakage"] = sum(leaked) / len(leaked)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)


def text_of(message: dict[str, Any]) -> str:
    """A message's text; content parts other than text count as empty."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(str(part.get("text", "")) for part in content)
