"""A routed teacher: each sample is scored by one teacher, chosen by the example's skill or a column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.contracts import Provides
from opd_lightning.data.batching import packed_index
from opd_lightning.losses.head import fitted
from opd_lightning.losses.joined_targets import JoinedTargets
from opd_lightning.losses.targets import FullLogits
from opd_lightning.teachers.base import CombinedScores, Composite, check_same_ids
from opd_lightning.teachers.reduced import joined, reduced, richest, written_ids
from opd_lightning.types import Cost, Example, Sample
from opd_lightning.utils.vocabulary import ValidIds, valid_ids_of


@dataclass(frozen=True)
class RoutedScores(CombinedScores):
    """Scores of several teachers, each on some of N tokens.

    Attributes:
        parts: each teacher's scores.
        part [N], row [N]: the index of each token's part, and its row in that part.
        ids [N]: the written tokens.
        kind, k: of the targets; k is the number of most probable tokens.
        names: of the parts' teachers.
        apart: the student's ids where a part has another tokenizer, so that each is compared on outcomes of its own; else None.
    """

    parts: Sequence[Any]
    part: Tensor
    row: Tensor
    ids: Tensor
    kind: Provides = "full"
    k: int | None = None
    cost: Cost = field(default_factory=Cost)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    names: Sequence[str] = ()
    apart: ValidIds | None = None

    @property
    def valid_ids(self) -> ValidIds:
        """The ids that all parts have, or the student's where they have tokenizers of their own."""
        return super().valid_ids if self.apart is None else self.apart

    @property
    def by_teacher(self) -> dict[str, Tensor]:
        """Whether each token [N] is a teacher's, by name."""
        return {name: self.part == i for i, name in enumerate(self.names)}

    @property
    def valid(self) -> Tensor | None:
        """Whether each token has a target in its part."""
        if all(part.valid is None for part in self.parts):
            return None
        valid = torch.ones_like(self.part, dtype=torch.bool)
        for i, part in enumerate(self.parts):
            if part.valid is not None:
                valid[self.part == i] = part.valid[self.row[self.part == i]]
        return valid

    def take(self, index: Tensor | slice) -> "RoutedScores":
        """The rows at an index of the packed axis."""
        return replace(self, part=self.part[index], row=self.row[index], ids=self.ids[index])

    def chunk(self, rows: slice, out: Tensor | None = None) -> Any:
        """The targets of the rows, each from its teacher."""
        part, row, ids, valid, valid_ids = self.part[rows], self.row[rows], self.ids[rows], self.valid, self.valid_ids
        kept = None if valid is None else valid[rows]
        ids = torch.where(valid_ids.contains(ids), ids, 0)  # tokens that a teacher lacks are not valid
        targets = []
        for i, scores in enumerate(self.parts):
            selected = part == i
            if bool(selected.any()):
                target = scores.take(row[selected]).chunk(slice(None))
                if self.apart is None:
                    target = reduced(target, self.kind, ids[selected], self.k)
                if self.kind == "full" and isinstance(target, FullLogits):
                    target = (
                        replace(target, logits=valid_ids.cut(target.logits))
                        if self.apart is None
                        else (fitted(target, valid_ids_of(scores), self.apart, target.logits.dtype))
                    )
                targets.append((selected, target))
        if self.apart is not None:
            return JoinedTargets.of(targets, self.apart, kept)
        return joined(targets, self.kind, len(part), kept)


class RoutedTeacher(Composite):
    """A teacher for each sample, chosen by a value of its example.

    Args:
        teachers: the teachers by that value. It provides what all of them do: of teachers with different k the smallest.
        by: "skill", or a column of the example's `extra`.
        default: name of the teacher for all other values; None refuses them.

    Raises:
        ValueError: the default is no teacher, or the teachers provide nothing in common.
    """

    def __init__(self, teachers: dict[str, Any], by: str = "skill", default: str | None = None):
        super().__init__(teachers)
        if default is not None and default not in teachers:
            raise ValueError(f"teacher.default={default} is none of teacher.teachers ({', '.join(teachers)}).")
        if (kind := richest(self.provides)) is None:
            raise ValueError("teacher=routed: its teachers provide no kind of target in common; choose others.")
        unsaid = [name for name, t in self.teachers.items() if "full" not in t.provides and t.top_k is None]
        if kind == "topk" and unsaid:
            raise ValueError(f"teacher.teachers.{unsaid[0]} does not say how many tokens it gives; set top_k in its class.")
        if kind != "sampled":  # ranks and tokens are no outcomes of one target
            check_alike([part for part in self.parts if part.aligned], self.parts)
        self.by, self.default, self.kind = by, default, kind

    def remade(self, teachers: dict[str, Any]) -> "RoutedTeacher":
        """The same of other teachers."""
        return RoutedTeacher(teachers, self.by, self.default)

    def route(self, example: Example) -> str:
        """The name of an example's teacher.

        Raises:
            ValueError: there is none.
        """
        value = example.skill if self.by == "skill" else example.extra.get(self.by)
        names = (value, str(value).split("/", maxsplit=1)[0], self.default)
        match = next((name for name in names if name in self.teachers), None)
        if match is None:
            raise ValueError(
                f"example {example.id} has {self.by}={value!r}, which has no teacher; teacher.teachers has "
                f"{', '.join(self.teachers)}. Add one, or set teacher.default."
            )
        return match

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check each teacher's examples; raises ValueError if one has no teacher."""
        for name, teacher in self.teachers.items():
            teacher.check_examples([example for example in examples if self.route(example) == name])

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> RoutedScores:
        """The scores of each teacher on its samples; one without any scores the first, for devices may wait for its shard."""
        names = [self.route(sample.example) for sample in samples]
        counts, device = [sample.trainable for sample in samples], self.student.lm.device
        part = torch.zeros(sum(counts), dtype=torch.long, device=device)
        row = torch.zeros_like(part)
        parts, cost = [], Cost()
        metrics: dict[str, Tensor] = {}
        for i, (name, teacher) in enumerate(self.teachers.items()):
            indices = [b for b, route_name in enumerate(names) if route_name == name]
            metrics[f"share/{name}"] = torch.tensor([float(route_name == name) for route_name in names], device=device)
            scores = teacher.score([samples[b] for b in indices or [0]], max_tokens)
            parts.append(scores)
            for key, values in scores.metrics.items():
                column = metrics.setdefault(key, torch.full((len(samples),), torch.nan, device=device))
                column[indices] = values.to(column.dtype)[: len(indices)]
            if indices:
                index = packed_index(indices, counts).to(device)
                part[index], row[index] = i, torch.arange(len(index), device=device)
                cost += scores.cost
        known = self.student.head.known
        apart = known if self.apart and self.kind != "sampled" else None
        if self.kind != "full" and apart is None:
            check_same_ids([known.intersection([valid_ids_of(scores)]) for scores in parts])
        ids, names = written_ids(samples, device), list(self.teachers)
        return RoutedScores(parts, part, row, ids, self.kind, self.top_k, cost, metrics, names, apart)

    def logit_flops(self, positions: int) -> int:
        """FLOPs of one teacher's logits on each position, estimated as the teachers' mean."""
        return super().logit_flops(positions) // len(self.teachers)


def check_alike(aligned: Sequence[Any], parts: Sequence[Any]) -> None:
    """Raises ValueError if some parts are compared by rank, and others by token."""
    ranked = [part for part in aligned if not getattr(part.alignment, "names_tokens", True)]
    if ranked and len(ranked) < len(parts):
        raise ValueError(
            f"teacher=routed: {type(ranked[0].alignment).__name__} compares probabilities by rank and other teachers in it by "
            "token, which is no one loss; choose the same teacher.alignment for all, or shared."
        )
