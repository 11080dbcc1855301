"""The teacher writes: sequence-level distillation, and what the teacher once wrote is not written twice."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from opd_lightning.generation.transformers import Sampling
from opd_lightning.models import Student
from opd_lightning.rollout.reuse import check_reuse, counted
from opd_lightning.teachers.local import Scorer
from opd_lightning.types import Prompts, Rollout
from opd_lightning.utils.atomic_files import read_lines, replace_text


class TeacherRollout:
    """The teacher answers each prompt as it reads it, with whatever context it is shown (SeqKD, arXiv 1606.07947).

    Args:
        tokenizer: the student's, which is the teacher's too.
        folder: what the teacher wrote is kept there, so that later epochs and a resumed run read it again; None keeps it
            in memory. A teacher that moves writes anew every time.
        max_new_tokens, temperature, top_p, top_k: see `Sampling`; temperature 0 takes the teacher's greedy answer.
        samples_per_prompt: completions per prompt.
        updates_per_rollout, truncated: as for the student's rollouts.
    """

    on_policy = False
    student_writes = False
    reads_references = False
    sources = frozenset({"teacher"})

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        folder: Path | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        samples_per_prompt: int = 1,
        updates_per_rollout: int = 1,
        truncated: str = "keep",
    ):
        if samples_per_prompt < 1:
            raise ValueError(f"rollout.samples_per_prompt={samples_per_prompt} must be at least 1.")
        check_reuse(updates_per_rollout, truncated)
        self.sampling = Sampling(max_new_tokens, temperature, top_p, top_k)
        self.tokenizer, self.folder, self.samples = tokenizer, folder, samples_per_prompt
        self.updates_per_rollout, self.truncated, self.max_new_tokens = updates_per_rollout, truncated, max_new_tokens
        self.written: dict[str, tuple[list[int], bool]] | None = None
        self.costs: dict[int, tuple[int, int]] = {}

    def __call__(self, student: Student, prompts: Prompts, seed: int, scorers: Mapping[str, Scorer]) -> Rollout:
        """One completion per prompt and sample; those that are not known yet are drawn from `seed`."""
        teacher, prompts = scorers["teacher"], prompts.repeat(self.samples)
        # By what the teacher reads, not by the example's id: data may change behind an id.
        read = [hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest() for ids in teacher.prompt_ids(prompts)]
        names = [f"{digest}#{b % self.samples}" for b, digest in enumerate(read)]
        known = self.remembered() if teacher.weights.fixed else {}
        # A prompt that stands twice in a batch is answered once.
        new = list({name: b for b, name in enumerate(names) if name not in known}.values())
        tokens, flops = self.costs.get(seed, (0, 0))  # of a step that is taken again after a crash: the ledger has forgotten it
        if new:
            asked = Prompts([prompts.examples[b] for b in new], [prompts.ids[b] for b in new])
            done, tokens, flops = teacher.write(student, asked, self.sampling, seed)
            answers = zip(done.rows(), done.truncated.tolist(), strict=True)
            fresh = {names[b]: answer for b, answer in zip(new, answers, strict=True)}
            known.update(fresh)
            if teacher.weights.fixed:
                self.keep({"seed": seed, "tokens": tokens, "flops": flops, "rows": fresh})
        rows = [torch.tensor(known[name][0]) for name in names]
        cut = torch.tensor([known[name][1] for name in names])
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        ids, lengths, cut = (x.to(student.lm.device) for x in (ids, lengths, cut))
        counts, writers = counted(cut, self.truncated), ["teacher"] * len(rows)
        return Rollout(prompts, ids, lengths, cut, counts, writers, self.samples, None, tokens, flops)

    @property
    def path(self) -> Path | None:
        """The file of this process: ranks meet different prompts, and must not depend on each other's pace."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        return None if self.folder is None else self.folder / "teacher" / f"rank-{rank}.jsonl"

    def remembered(self) -> dict[str, tuple[list[int], bool]]:
        """What the teacher wrote before, by prompt and sample."""
        if self.written is None:
            self.written = {}
            if self.path is not None and self.path.is_file():
                # A line is one batch. A process that was killed may have left half a line, whose batch is drawn again.
                batches = read_lines(self.path)
                replace_text(self.path, "".join(json.dumps(batch) + "\n" for batch in batches))
                for batch in batches:
                    self.costs[batch["seed"]] = batch["tokens"], batch["flops"]
                    self.written |= {name: (ids, cut) for name, (ids, cut) in batch["rows"].items()}
        return self.written

    def keep(self, batch: dict[str, Any]) -> None:
        """Append a batch, with its seed and what it cost, to the file."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(batch) + "\n")
