"""What goes wrong quietly in rollouts: text that repeats itself, and the wording of the teacher's context."""

import re
from collections.abc import Sequence
from typing import Any

import lightning as L

NGRAM = 4
"""Tokens of a stretch that counts as repeated, and words of one that counts as leaked."""


def repetition(ids: Sequence[int]) -> float:
    """The share of stretches of four tokens that stood there before; 0 for completions too short to have two."""
    stretches = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0


def stretches(text: str) -> set[tuple[str, ...]]:
    """Every stretch of four words of a text, line by line, case and punctuation apart."""
    found = set()
    for line in text.splitlines():
        words = re.findall(r"\w+", line.lower())
        found |= {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}
    return found


class Diagnostics(L.Callback):
    """Logs `rollout/repetition`, and `rollout/leakage`: the share of completions that repeat the context's wording.

    Self-distilled students learn to write "based on the example above" although they are shown none (SDFT, arXiv 2601.19897);
    loss/weight=skip_first and another wording help. What the context quotes, a solution for example, is no leakage.

    Args:
        every: optimizer steps between measurements.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"callbacks.diagnostics.every={every} must be at least 1.")
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: object) -> None:
        """Look at this device's part of the rollout that was just learned from."""
        if trainer.global_step % self.every or module.latest is None:
            return
        rollout = module.latest
        rows = [ids[:n] for ids, n in zip(rollout.ids.tolist(), rollout.lengths.tolist(), strict=True)]
        numbers = {"rollout/repetition": sum(map(repetition, rows)) / len(rows)}
        teacher = module.scorers.get("teacher")
        wording = set() if teacher is None else stretches(teacher.context.wording())
        if wording:
            texts = rollout.texts(module.tokenizer)
            asked = [stretches("\n".join(m["content"] for m in e.messages)) for e in rollout.prompts.examples]
            leaked = [bool(stretches(text) & wording - known) for text, known in zip(texts, asked, strict=True)]
            numbers["rollout/leakage"] = sum(leaked) / len(leaked)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
