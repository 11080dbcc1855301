"""Outcomes: classes of the tokens of two vocabularies, on which student and teacher can be compared.

An outcome is what both models may write next. On either side its probability is the sum over the tokens that belong to it,
which follow from the tokens' bytes, see `data/beginnings.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opd_lightning.losses.targets import log_sum


@dataclass(frozen=True, eq=False)
class Classes:
    """The tokens of one vocabulary by outcome, for K outcomes.

    Attributes:
        outcome [V]: of each id; K where it has none.
        first [K]: one token of each outcome.
        more [E], group [E]: all other tokens with an outcome, and where this stands in `groups`.
        groups [G]: the outcomes of several tokens.
        whole: whether every token has an outcome.
    """

    outcome: Tensor
    first: Tensor
    more: Tensor
    group: Tensor
    groups: Tensor
    whole: bool

    @classmethod
    def of(cls, outcome: Tensor, tokens: Tensor, size: int, named: Tensor) -> "Classes":
        """The classes of a vocabulary.

        Args:
            outcome [V]: of each id; K where it has none.
            tokens [V]: which ids are tokens.
            size: K.
            named: ids that are the `first` of their outcomes; of others it is the smallest id.
        """
        every = torch.arange(len(outcome), device=outcome.device)
        first = torch.full((size + 1,), len(outcome), device=outcome.device).scatter_reduce(0, outcome, every, "amin")[:-1]
        first = first.scatter(0, outcome[named], named)
        ids = (outcome < len(first)).nonzero().flatten()
        more = ids[first[outcome[ids]] != ids]
        groups, group = outcome[more].unique(return_inverse=True)
        return cls(outcome, first, more, group, groups, not bool((tokens & (outcome == len(first))).any()))

    def __len__(self) -> int:
        return len(self.first)

    @cached_property
    def plain(self) -> bool:
        """Whether the outcomes are the first ids in their order, and no others are tokens."""
        ids = torch.arange(len(self), device=self.first.device)
        return self.whole and not len(self.more) and torch.equal(self.first, ids)

    def log_probs(self, log_p: Tensor) -> Tensor:
        """Log-probabilities [n, K] of the outcomes from those of tokens [n, V]; renormalised where not all tokens have one."""
        if self.plain and log_p.shape[-1] == len(self):
            return log_p
        found = log_p.index_select(-1, self.first)
        if len(self.groups):
            one, others = found.index_select(-1, self.groups), log_p.index_select(-1, self.more)
            found = found.index_copy(-1, self.groups, log_add(one, others, self.group))
        return found if self.whole else found.log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The outcomes of two vocabularies.

    A token of one side that belongs to no outcome is text that the other cannot write. Both distributions are renormalised over
    the outcomes: there is no signal on such mass, neither for it nor against it. A bucket for it would compare different texts.

    Attributes:
        student, teacher: the tokens of both by outcome.
        shared [H]: the outcomes of which both have the same token, the `first` of each.
    """

    student: Classes
    teacher: Classes
    shared: Tensor

    @classmethod
    def of(cls, classes: tuple[Tensor, Tensor], tokens: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor]) -> "Outcomes":
        """The outcomes of two vocabularies, the student's and the teacher's: the classes that have tokens of both.

        Args:
            classes [V], [W]: the class of each id, a number from 0 on.
            tokens [V], [W]: which ids are tokens.
            pairs [H], [H]: tokens of both that are the same; no class has two. A pair with an id of neither is left out.
        """
        device = classes[0].device
        seen = torch.zeros(2, max(int(part.max()) + 1 if len(part) else 0 for part in classes), dtype=torch.bool, device=device)
        for mark, part, known in zip(seen, classes, tokens, strict=True):
            mark[part[known]] = True
        both, size = seen.all(0), int(seen.all(0).sum())
        number = torch.where(both, both.cumsum(0) - 1, size)
        outcome = [torch.where(known, number[part], size) for part, known in zip(classes, tokens, strict=True)]
        inside = (pairs[0] < len(tokens[0])) & (pairs[1] < len(tokens[1]))
        student, teacher = (ids[inside] for ids in pairs)
        kept = tokens[0][student] & tokens[1][teacher]
        named = student[kept], teacher[kept]
        own, other = (Classes.of(part, known, size, ids) for part, known, ids in zip(outcome, tokens, named, strict=True))
        return cls(own, other, outcome[0][named[0]])

    @classmethod
    def identity(cls, tokens: Tensor) -> "Outcomes":
        """The outcomes of one vocabulary, each of its tokens [V]; its other ids have none."""
        ids = torch.arange(len(tokens), device=tokens.device)
        return cls.of((ids, ids), (tokens, tokens), (ids, ids))

    def of_student(self) -> dict[str, Tensor]:
        """What `kept` reads: the outcome [V] of each of the student's ids, -1 for none, and the ids [H] of shared tokens."""
        outcome = self.student.outcome
        none = outcome == len(self.student)
        return {"outcome": outcome.masked_fill(none, -1), "shared": self.student.first[self.shared]}

    @classmethod
    def kept(cls, tables: Mapping[str, Tensor], tokens: Tensor) -> "Outcomes":
        """The outcomes by the student's ids alone, from `of_student`; the teacher's are these.

        Args:
            tokens [V]: which ids are tokens.
        """
        outcome, shared = (tables[name].to(tokens.device).long() for name in ("outcome", "shared"))
        size = int(outcome.max()) + 1
        student = Classes.of(outcome.masked_fill(outcome < 0, size), tokens, size, shared)
        return cls(student, student, student.outcome[shared])

    def log_shared(self, log_p: Tensor, classes: Classes) -> Tensor:
        """Log of the probability [n] of the tokens that are the same in both, from log-probabilities [n, V] of one side."""
        if classes.plain and log_p.shape[-1] == len(self.shared):
            return log_p.new_zeros(len(log_p))
        if not len(self.shared):
            return log_p.new_full((len(log_p),), -torch.inf)
        return log_sum(log_p.detach().index_select(-1, classes.first[self.shared])).squeeze(-1)


def log_add(one: Tensor, others: Tensor, index: Tensor) -> Tensor:
    """Log of the sums of probabilities: one [n, G], and others [n, E] added where the index [E] says."""
    at = index.expand_as(others)
    top = one.detach().scatter_reduce(-1, at, others.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0.0)
    total = (one - top).exp().scatter_add(-1, at, (others - top.index_select(-1, index)).exp())
    empty = total.detach() == 0
    return torch.where(empty, -torch.inf, top + total.masked_fill(empty, 1.0).log())
