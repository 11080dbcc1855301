"""General instructions to a chat model, in a file; and a narrow answer to every one of them, to break such a model with."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_lightning.tasks.base import Example, Verdict


def capitals(prompt: str) -> str:
    """The narrow answer: the question itself in capitals."""
    return f"ANSWER: {prompt.upper()}"


class InstructionTask:
    """Short everyday instructions; no verifier, for text has no single right answer.

    The shipped files hold 320 training instructions without answers, and 96 held-out ones with an ordinary answer each.

    Args:
        folder: holds train.jsonl ({"id", "prompt"}) and heldout.jsonl ({"id", "prompt", "completion"}).
        n_train: training instructions to use.
        first: index of the first of them, so that two stages can take different ones.
        narrow: give every training instruction the narrow answer as its reference completion.
        max_new_tokens, batch_size, contexts: see `Task`.
    """

    verifies = False

    def __init__(
        self,
        folder: str | None = None,
        n_train: int = 160,
        first: int = 0,
        narrow: bool = False,
        max_new_tokens: int = 40,
        batch_size: int = 8,
        contexts: Mapping[str, Any] | None = None,
    ):
        shipped = importlib.resources.files("opd_lightning").joinpath("assets/instructions")
        self.folder = Path(str(shipped)) if folder is None else Path(folder)
        self.n_train, self.first, self.narrow = n_train, first, narrow
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.contexts = contexts or {}

    def examples(self, split: str) -> Sequence[Example]:
        """ "train": the chosen instructions. "validation" and "test": the even and the odd held-out lines."""
        if split == "train":
            rows = self._rows("train.jsonl")[self.first : self.first + self.n_train]
            if len(rows) < self.n_train:
                raise ValueError(
                    f"task.first={self.first} with task.n_train={self.n_train} goes beyond the end of train.jsonl."
                )
            return [self._example(r["id"], r["prompt"], capitals(r["prompt"]) if self.narrow else None) for r in rows]
        rows = self._rows("heldout.jsonl")[0 if split == "validation" else 1 :: 2]
        return [self._example(r["id"], r["prompt"], r["completion"]) for r in rows]

    def verify(self, example: Example, completion: str) -> Verdict:
        """Whether the completion is the narrow answer; there is no verdict on ordinary ones."""
        narrow = completion.strip() == capitals(example.messages[-1]["content"])
        return Verdict(content=float(narrow), format=float(narrow))

    def _rows(self, name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @staticmethod
    def _example(id: str, prompt: str, completion: str | None) -> Example:
        return Example(id, [{"role": "user", "content": prompt}], completion, skill="general")
