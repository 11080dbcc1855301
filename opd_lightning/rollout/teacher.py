"""TeacherRollout: completions of the teacher (sequence-level distillation), stored for later epochs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opd_lightning.contracts import Generator
from opd_lightning.rollout.base import check_options, single_turn
from opd_lightning.types import Completion, Cost, Prompts, Rollout, SamplingParams
from opd_lightning.utils.atomic_files import read_lines, replace_text


class TeacherRollout:
    """The teacher completes each prompt, with its context (SeqKD, arXiv 1606.07947).

    Args:
        sampling: of a completion; temperature 0 takes the teacher's greedy answer.
        folder: where completions are stored for later epochs and a resumed run; None keeps them in memory. Completions of a
            teacher whose weights change are not reused.
        num_generations: completions per prompt.
        num_iterations, mask_truncated_completions: as for the student's rollouts.
    """

    on_policy = False
    student_writes = False
    reads_references = False
    teachers = frozenset({"teacher"})

    def __init__(
        self,
        sampling: SamplingParams,
        folder: Path | None = None,
        num_generations: int = 1,
        num_iterations: int = 1,
        mask_truncated_completions: bool = False,
    ):
        check_options(num_generations, num_iterations)
        self.sampling = replace(sampling, n=num_generations)
        self.folder, self.num_iterations, self.mask_truncated = folder, num_iterations, mask_truncated_completions
        self.written: dict[str, tuple[list[int], bool]] | None = None
        self.costs: dict[int, tuple[int, int]] = {}

    def __call__(self, prompts: Prompts, seed: int, generator: Generator, teachers: Mapping[str, Any]) -> Rollout:
        """One sample per prompt and completion; new ones are drawn from `seed`."""
        teacher, n = teachers["teacher"], self.sampling.n
        read = teacher.prompts(prompts.examples)
        assert all(prompt is not None for prompt in read), (
            "a context that waits for attempts cannot word a prompt to write behind"
        )
        # Keyed by what the teacher reads, not by the example's id: an example may change under the same id.
        digests = [hashlib.blake2b(json.dumps(p.token_ids).encode(), digest_size=16).hexdigest() for p in read]
        names = [f"{digests[b // n]}#{b % n}" for b in range(n * len(read))]
        completed = self.stored() if teacher.frozen else {}
        # A prompt that is twice in a batch is completed once.
        new = list({name: b for b, name in enumerate(names) if name not in completed}.values())
        cost = Cost(*self.costs.get(seed, (0, 0)))  # of a step that is repeated after a crash; the restored ledger lacks it
        if new:
            done, cost = teacher.write([read[b // n] for b in new], replace(self.sampling, n=1), seed, generator)
            fresh = {names[b]: (c.token_ids, c.finish_reason == "length") for b, c in zip(new, done, strict=True)}
            completed.update(fresh)
            if teacher.frozen:
                self.keep({"seed": seed, "tokens": cost.tokens, "flops": cost.flops, "rows": fresh})
        completions = [Completion(completed[name][0], "length" if completed[name][1] else "stop") for name in names]
        samples = [
            single_turn(prompts.examples[b // n], b // n, prompts.rendered[b // n], completion, "teacher", self.mask_truncated)
            for b, completion in enumerate(completions)
        ]
        return Rollout(samples, cost)

    @property
    def path(self) -> Path | None:
        """The file of this process; each rank has its own, since ranks have different prompts."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        return None if self.folder is None else self.folder / "teacher" / f"rank-{rank}.jsonl"

    def stored(self) -> dict[str, tuple[list[int], bool]]:
        """Stored completions by prompt and sample: token ids, and whether truncated."""
        if self.written is None:
            self.written = {}
            if self.path is not None and self.path.is_file():
                # A line is one batch. A killed process may have left an incomplete line, whose batch is drawn again.
                batches = read_lines(self.path)
                replace_text(self.path, "".join(json.dumps(batch) + "\n" for batch in batches))
                for batch in batches:
                    self.costs[batch["seed"]] = batch["tokens"], batch["flops"]
                    self.written |= {name: (ids, truncated) for name, (ids, truncated) in batch["rows"].items()}
        return self.written

    def keep(self, batch: dict[str, Any]) -> None:
        """Append a batch, with its seed and what it cost, to the file."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(batch) + "\n")
