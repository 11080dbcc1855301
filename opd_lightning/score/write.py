"""Writing of scored samples: the rollout of every training prompt, scored by the teacher, in shards."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from opd_lightning.contracts import RolloutPolicy
from opd_lightning.data.score_files import TABLE, Index, pack_samples, save_shard, shard_path
from opd_lightning.teachers.topk import TopKView
from opd_lightning.types import Example, Prompts, Sample
from opd_lightning.utils.seeds import derive_seed

log = logging.getLogger(__name__)

ROWS = 256
"""Tokens whose logits exist at a time."""


@dataclass
class ScoreWriter:
    """Rollouts and scores of examples, shard by shard; shards that are there are kept.

    Attributes:
        rollout, generator, teachers, teacher: who writes, and who scores; all set up.
        renderer: the student's.
        judge: adds verdicts to samples, for contexts that read them.
        index: what the folder will hold.
        seed: of the rollouts.
        batch_size: prompts per rollout.
        max_tokens: padded tokens that the teacher reads at a time; None reads all of a rollout at once.
    """

    rollout: RolloutPolicy
    generator: Any
    teachers: Mapping[str, Any]
    teacher: Any
    renderer: Any
    judge: Any
    index: Index
    seed: int
    batch_size: int
    max_tokens: int | None

    def write(self, folder: Path, examples: Sequence[Example], passes: int, shard_size: int) -> None:
        """Write the shards that are missing, and complete the index.

        Raises:
            ValueError: the folder has no room for them.
        """
        work = [
            (number, examples[first : first + shard_size])
            for number, (_, first) in enumerate((p, f) for p in range(passes) for f in range(0, len(examples), shard_size))
        ]
        done = len(self.index.shards)
        if done:
            log.info(f"{done} of {len(work)} shards are there")
        began, written = time.monotonic(), 0
        for number, part in work[done:]:
            samples, scores = self.score(number, part)
            tensors = pack_samples(samples) | scores
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            if number == done:
                share = self.tokens([part]) / self.tokens([p for _, p in work[done:]])
                expected, seconds = size / share, (time.monotonic() - began) / share
                log.info(
                    f"{sum(len(p) for _, p in work)} rollouts in {len(work)} shards; about {megabytes(expected)} to write and "
                    f"{seconds / 60:.1f} minutes"
                )
                check_room(folder, expected)
            self.index.shards.append({"samples": len(samples), "tokens": sum(sample.trainable for sample in samples)})
            try:
                save_shard(shard_path(folder, number), tensors, [sample.example.id for sample in samples])
                self.index.write(folder)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"out={folder} could not be written ({error}); make room, or look at its permissions. Then the same "
                    "command goes on."
                ) from error
            written += size
        self.index.complete = True
        self.index.write(folder)
        tokens = sum(shard["tokens"] for shard in self.index.shards)
        log.info(f"{tokens} tokens are scored in {folder}" + (f"; written: {megabytes(written)}" if written else ""))

    def tokens(self, parts: Sequence[Sequence[Example]]) -> int:
        """The tokens of the rollouts of examples; their number of prompts where these are not known before they are drawn."""
        if self.rollout.student_writes or self.rollout.teachers:
            return sum(map(len, parts))
        rendered = [(part, [self.renderer.render(example.messages, example.tools) for example in part]) for part in parts]
        samples = [s for pair in rendered for s in self.rollout(Prompts(*pair), 0, self.generator, self.teachers).samples]
        return sum(len(sample.token_ids) + sample.trainable for sample in samples)

    @torch.no_grad()
    def score(self, number: int, examples: Sequence[Example]) -> tuple[list[Sample], dict[str, Tensor]]:
        """The samples of a shard, and the tensors of their scores."""
        samples: list[Sample] = []
        parts: list[dict[str, Tensor]] = []
        for first in range(0, len(examples), self.batch_size):
            batch = examples[first : first + self.batch_size]
            prompts = Prompts(batch, [self.renderer.render(example.messages, example.tools) for example in batch])
            seed = derive_seed(self.seed, "score", number, first)
            drawn = self.judge(self.rollout(prompts, seed, self.generator, self.teachers).samples)
            samples += drawn
            parts.append(self.tensors(drawn))
        names = sorted(set.union(*(set(part) for part in parts)))
        default = {"valid": lambda n: torch.ones(n, dtype=torch.bool)}
        packed = {
            name: parts[0][name]
            if name.startswith(TABLE)
            else torch.cat([part[name] if name in part else default[name](len(next(iter(part.values())))) for part in parts])
            for name in names
        }
        return samples, packed

    def tensors(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """The scores of samples, as tensors [N, ...] on the CPU."""
        scores = self.teacher.score(samples, self.max_tokens)
        tensors = {} if scores.valid is None else {"valid": scores.valid.cpu()}
        if self.index.kind == "hidden":
            return tensors | {"hidden": scores.hidden.to(torch.bfloat16).cpu()}
        ids = torch.cat([sample.token_ids[sample.loss_mask] for sample in samples]).to(self.teacher.student.lm.device)
        view = TopKView(scores, ids, self.index.k) if "full" in self.teacher.provides else scores
        targets = [view.chunk(slice(start, start + ROWS)) for start in range(0, len(ids), ROWS)]
        top = [target.top(self.index.k) for target in targets]
        tensors["top_ids"] = torch.cat([i for i, _ in top]).to(torch.int32).cpu()
        tensors["top_logprobs"] = torch.cat([logprobs for _, logprobs in top]).float().cpu()
        if (outcomes := getattr(targets[0], "outcomes", None)) is None:
            return tensors | {"sampled": torch.cat([target.sampled for target in targets]).float().cpu()}
        return tensors | {f"{TABLE}{name}": column.to(torch.int32).cpu() for name, column in outcomes.of_student().items()}


def megabytes(size: float) -> str:
    """A number of bytes, as text."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def check_room(folder: Path, size: float) -> None:
    """Raises ValueError if so many bytes do not fit on the folder's disk."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"out={folder} has room for {megabytes(free)}, and the scores need about {megabytes(size)}; make room, lower k, or "
            "choose another folder."
        )
