"""InstructionTask: general instructions to a chat model, with an optional narrow answer to all of them that harms it."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_lightning.tasks.verifiers import compiled
from opd_lightning.types import Example, Verdict


def capitals(prompt: str) -> str:
    """The narrow answer: the question itself in capitals."""
    return f"ANSWER: {prompt.upper()}"


class InstructionTask:
    """Short everyday instructions. Free text has no single right answer; a rule about its form can be verified.

    The shipped files hold 320 training instructions without answers, and 96 held-out ones with an ordinary answer each.

    Args:
        folder: holds train.jsonl ({"id", "prompt"}) and heldout.jsonl ({"id", "prompt", "completion"}).
        n_train: training instructions to use.
        first: index of the first of them, so that two stages can take different ones.
        narrow: give every training instruction the narrow answer as its reference completion.
        pattern: a regular expression that the stripped answer must match in full; None has no verdicts.
        spare: this many instructions from the end of train.jsonl are held out too, for test, and as many before them for
            validation; they have no completion.
        max_new_tokens, batch_size, contexts: see `Task`.
    """

    def __init__(
        self,
        folder: str | None = None,
        n_train: int = 160,
        first: int = 0,
        narrow: bool = False,
        pattern: str | None = None,
        spare: int = 0,
        max_new_tokens: int = 40,
        batch_size: int = 8,
        contexts: Mapping[str, Any] | None = None,
    ):
        shipped = importlib.resources.files("opd_lightning").joinpath("toy/assets/instructions")
        self.folder = Path(str(shipped)) if folder is None else Path(folder)
        self.n_train, self.first, self.narrow, self.spare = n_train, first, narrow, spare
        self.pattern, self.verifies = None if pattern is None else compiled("task.pattern", pattern), pattern is not None
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.contexts = contexts or {}

    def examples(self, split: str) -> Sequence[Example]:
        """ "train": the chosen instructions. "validation" and "test": the even and the odd held-out lines, and spare ones."""
        if split == "train":
            rows = self._rows("train.jsonl")
            free = len(rows) - 2 * self.spare
            if self.first + self.n_train > free:
                raise ValueError(
                    f"task.first={self.first} with task.n_train={self.n_train} goes beyond the {free} training instructions "
                    f"that task.spare={self.spare} leaves."
                )
            rows = rows[self.first : self.first + self.n_train]
            return [self._example(r["id"], r["prompt"], capitals(r["prompt"]) if self.narrow else None) for r in rows]
        rows = self._rows("heldout.jsonl")[0 if split == "validation" else 1 :: 2]
        more = self._rows("train.jsonl")
        end = len(more) - (self.spare if split == "validation" else 0)
        rows += [row | {"completion": None} for row in more[end - self.spare : end]]
        return [self._example(r["id"], r["prompt"], r["completion"]) for r in rows]

    def verify(self, example: Example, completion: str) -> Verdict:
        """Right if the full completion matches the pattern; without a pattern, if it is the narrow answer."""
        text = completion.strip()
        if self.pattern is not None:
            return Verdict(content=float(self.pattern.fullmatch(text) is not None))
        narrow = text == capitals(example.messages[-1]["content"])
        return Verdict(content=float(narrow), format=float(narrow))

    def _rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @staticmethod
    def _example(id: str, prompt: str, completion: str | None) -> Example:
        return Example(id, [{"role": "user", "content": prompt}], completion, skill="general")
