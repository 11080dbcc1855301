"""Tasks of reasoning-gym (arXiv 2505.24760) by name: generated problems with their own scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.config.names import nearest
from opd_lightning.tasks.splits import key_of
from opd_lightning.types import Example, Verdict
from opd_lightning.utils.seeds import derive_seed

MAX_TRIES = 20
"""Problems generated for each one needed, before an error."""


class ReasoningGymTask:
    """Problems of one reasoning-gym data set.

    The answer is the text between <answer> and </answer>, as in the system prompt; without the tags the full completion is
    scored and its format is wrong. Scores are reasoning-gym's own, which for many data sets are partial: 1 is right.

    Args:
        name: the data set's name, such as chain_sum.
        n_train, n_eval: distinct problems to train on, and in each of validation and test; no problem is in two of them.
        seed: seed of the problems, separate from the run's, so that runs with different seeds have the same problems.
        options: the data set's own options, such as {"min_terms": 2}.
        system: the system prompt.
        max_new_tokens, batch_size, contexts: see `Task`.

    Raises:
        ValueError: reasoning-gym is not installed, has no such data set, or the data set has too few distinct problems.
    """

    verifies = True
    partial_scores = True

    def __init__(
        self,
        name: str,
        n_train: int = 512,
        n_eval: int = 64,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        system: str | None = "Give the final answer between <answer> and </answer>.",
        max_new_tokens: int = 64,
        batch_size: int = 8,
        contexts: Mapping[str, Any] | None = None,
    ):
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
            from reasoning_gym.utils import extract_answer
        except ImportError as error:
            raise ValueError("task=reasoning_gym needs a package: pip install 'opd-lightning[reasoning]'.") from error
        if name not in DATASETS:
            raise ValueError(f"task.name={name} is no data set of reasoning-gym{nearest(name, DATASETS)}")
        for key, value in (("n_train", n_train), ("n_eval", n_eval)):
            if value < 1:
                raise ValueError(f"task.{key}={value} must be at least 1.")
        self.name, self.system, self.extract = name, system, extract_answer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.contexts = contexts or {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.splits: dict[str, list[Example]] = {}
        needed = {"test": n_eval, "validation": n_eval, "train": n_train}
        for split, n in needed.items():
            size = MAX_TRIES * n
            try:
                # Problem i of a data set follows from its seed and i alone.
                dataset = reasoning_gym.create_dataset(
                    name, seed=derive_seed(seed, split) % 2**31, size=size, **dict(options or {})
                )
            except (TypeError, AssertionError) as error:
                raise ValueError(f"task.options={dict(options or {})} does not suit task.name={name} ({error}).") from error
            self.scores = dataset.score_answer
            self.splits[split] = self._distinct(dataset, split, n)

    def _distinct(self, dataset: Any, split: str, n: int) -> list[Example]:
        keys = {key_of(e) for examples in self.splits.values() for e in examples}
        chosen: list[Example] = []
        for i in range(len(dataset)):
            entry = dataset[i]
            example = self._example(entry, f"{self.name}-{split}-{i}")
            if key_of(example) not in keys:
                keys.add(key_of(example))
                self.entries[example.id] = entry
                chosen.append(example)
            if len(chosen) == n:
                return chosen
        raise ValueError(
            f"task.name={self.name} made only {len(chosen)} distinct problems for the {split} split in {len(dataset)} tries, "
            f"and {n} are needed; lower task.{'n_train' if split == 'train' else 'n_eval'}, or widen task.options."
        )

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of "train", "validation" or "test"."""
        return self.splits[split]

    def verify(self, example: Example, completion: str) -> Verdict:
        """reasoning-gym's score of the tagged answer, or of the full completion without tags."""
        tagged = self.extract(completion, tag_name="answer")
        try:
            score = float(self.scores(answer=completion.strip() if tagged is None else tagged, entry=self.entries[example.id]))
        except Exception:  # some data sets evaluate the answer as code or a puzzle, and raise on other text
            score = 0.0
        return Verdict(min(1.0, max(0.0, score)), float(tagged is not None))

    def _example(self, entry: dict[str, Any], id: str) -> Example:
        system = [{"role": "system", "content": self.system}] if self.system else []
        # Some data sets have no single answer, only a way to score one.
        answer = None if entry["answer"] is None else f"<answer>{entry['answer']}</answer>"
        return Example(id, [*system, {"role": "user", "content": entry["question"]}], completion=answer, demonstration=answer)
