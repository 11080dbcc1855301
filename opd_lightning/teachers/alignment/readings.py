"""Readings of a teacher with another tokenizer: what its scores of its own tokens say about the student's.

Each is an object with `provides(kinds)`, what it can tell given what the teacher provides, `check_divergence(divergence)`, and
`scores(inner, match)`, the teacher's scores of M tokens of its own as scores of the student's N tokens. `teacher.alignment`
chooses one by its name in `ALIGNMENTS`, or gives another object. One may have `names_tokens` = False where its outcomes are no
tokens, `groups_tokens` = True where `match.shared` shall have classes of tokens, and `unkept`, why its scores cannot be kept.
"""

from typing import Any

import torch

from opd_lightning.losses.targets import SampledLogProbs, TopKScores
from opd_lightning.teachers.alignment.match import Match
from opd_lightning.teachers.alignment.scores import AlignedScores, OnShared, by_rank, sampled_logprobs
from opd_lightning.utils.vocabulary import valid_ids_of


class Spans:
    """The sampled tokens' signal on spans, the shortest stretches of text that are whole tokens in both tokenizations.

    A span g has the bytes of n tokens of the student's and m of the teacher's. Its signal is the usual one of sampled tokens
    (Thinking Machines, "On-Policy Distillation"), with sums of log-probabilities over the same bytes as in approximate
    likelihood matching (ALM, arXiv 2503.20083):

        c_g = sum_{i in g} log S(y_i) - sum_{j in g} log T(z_j)

    It is spread evenly: each of the n tokens has c_g / n, so that a completion's signals add up to its log-ratio over the
    aligned text. For n = m = 1 it is the sampled token's own, whose gradient is unbiased; for n > 1 it is 1 / n of the signal
    of the span as a whole, and zero where both give it the same probability. Token t has as its target the log-probability

        log T_t = log S'(y_t) - c'_g / n

    with S' the log-probabilities with which the tokens were drawn, which have to be the student's own: a sampling at another
    temperature or top p is refused. loss/vocab_support=sampled reads it. DPCA (arXiv 2606.09456) aligns to the same spans.
    """

    unkept = "spans are for tokens that the student has just drawn, and a recorded rollout has others"

    def check_sampling(self, sampling: Any) -> None:
        """Raises ValueError for a sampling that changes the student's distribution: S' would be another than the loss's."""
        usual = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        changed = {name: found for name, one in usual.items() if (found := getattr(sampling, name)) not in (None, one)}
        if changed:
            raise ValueError(
                f"teacher.alignment=spans spreads the signal of a span by the log-probabilities of the sampling, and "
                f"rollout.sampling changes these ({', '.join(f'{k}={v}' for k, v in changed.items())}), so that the gradient "
                "would be biased; use temperature=1, top_p=1 and top_k=0, or choose teacher.alignment=shared."
            )

    def provides(self, kinds: frozenset[str]) -> frozenset[str]:
        """Sampled log-probabilities."""
        return kinds & {"sampled"}

    def check_divergence(self, divergence: Any) -> None:
        """Every divergence will do."""

    def scores(self, inner: Any, match: Match) -> TopKScores:
        """The scores of the student's tokens; a token has none where its span holds what is no text, or is not valid."""
        own, covered = sampled_logprobs(inner, match.teacher_ids)
        student, teacher = match.per_span(match.student_span), match.per_span(match.teacher_span, own)
        alone = match.of_span(student) == 1
        drawn = match.sampler_logprob
        valid = match.of_span(match.exact & (match.per_span(match.teacher_span, (~covered).long()) == 0))
        if drawn is None:
            if bool((valid & ~alone).any()):
                raise ValueError(
                    "teacher.alignment=spans spreads a signal over several tokens, for which it reads the log-probabilities "
                    "with which they were drawn, and this rollout has none; let the student sample them "
                    "(rollout.sampling.temperature=1), or choose teacher.alignment=shared."
                )
            drawn = torch.zeros_like(own[:1]).expand(len(match.student_span))
        drawn = drawn.to(own.dtype)
        signal = match.per_span(match.student_span, drawn) - teacher
        spread = drawn - match.of_span(signal / student.clamp_min(1))
        log_t = torch.where(alone, match.of_span(teacher), spread)
        target = SampledLogProbs(torch.where(valid, log_t, -1.0), valid)
        return TopKScores(target, match.vocabulary.size, inner.cost, {**inner.metrics, **match.metrics(valid)})


class SharedVocabulary:
    """The divergence over what the next text begins with, where both tokenizations have a boundary.

    At a byte offset where a token begins in both, both predict the same text, each by its own tokens. An outcome v is a shared
    token (the same bytes in both vocabularies) with all tokens of either side that only this one has and that the other side
    would begin with v: the teacher's `ab` belongs to `a` if the student writes `a`, `b` (`data/beginnings.py`). With the K
    outcomes,

        S~(v) = sum of S over the student's tokens of v,   T~(v) likewise of the teacher's,   loss = D(S~, T~)

    for any divergence D of the loss. It is a coarsening: by the data-processing inequality a KL of these is at most that over
    all tokens, if both had the same; for equal tokenizers it is that KL. Where both would write the same texts, S~ = T~, and
    loss and gradient are zero. Tokens of text that the other side cannot write (special ones, what a normaliser changes)
    belong to no outcome; S~ and T~ are renormalised without them, so that their mass is neither rewarded nor punished. One
    bucket for both rests would equate different texts: a student would learn to write its own tokens for the teacher's.

    What stays biased: T~ knows nothing of what follows v within the teacher's longer token. Inside of such a token of the text
    there is no target; and behind an `a` that the teacher chose as a whole token, it gives `b` less than text does, for it
    would have written `ab` (Phan et al., arXiv 2512.14954, correct likelihoods for it). Bytes that a tokenizer divides
    otherwise in front of other text are counted as if alone: there one text is two outcomes (of German texts read by SmolLM2
    and Gemma at 1 % of the offsets, of English at 0.2 %), and a KL of equal models is not zero.

    TRL's GOLD and KDFlow compare shared tokens too, without the others, so that their values are no divergence. Of a teacher
    that tells its top k, the outcomes of these are compared, and all others as one; what is not listed of a listed outcome is
    missing there.
    """

    groups_tokens = True

    def provides(self, kinds: frozenset[str]) -> frozenset[str]:
        """As much as the teacher, but for the written token, which may be several."""
        return kinds & {"full", "topk"}

    def check_divergence(self, divergence: Any) -> None:
        """Every divergence will do."""

    def scores(self, inner: Any, match: Match) -> AlignedScores:
        """The scores of the student's tokens."""
        row = match.rows(inner.valid)
        target = OnShared(match.shared, valid_ids_of(inner))
        metrics = {**inner.metrics, **match.metrics(row >= 0)}
        return AlignedScores(inner, row, target, match.vocabulary.size, match.vocabulary.absent, metrics)


class SortedProbabilities:
    """The divergence of sorted probabilities: the universal logit distillation loss (ULD, arXiv 2402.12030), as a baseline.

    Where a token begins in both tokenizations, the probabilities of both are sorted, and the shorter list is filled with zeros:

        loss = D(sort(S), sort(T)),   with D = sum_r |S_(r) - T_(r)| in the paper

    which is twice loss/divergence=total_variation. Which tokens they are of is not read. A divergence that is infinite for a
    probability of zero, such as a KL, does not fit vocabularies of two sizes.
    """

    names_tokens = False
    unkept = "sorted probabilities are of the whole vocabulary, of which k would be another distance"

    def provides(self, kinds: frozenset[str]) -> frozenset[str]:
        """The whole vocabulary."""
        return kinds & {"full"}

    def check_divergence(self, divergence: Any) -> None:
        """Raises ValueError for a divergence that is infinite where one side gives no probability."""
        certain, even = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.5, 0.5]]).log()
        if not all(torch.isfinite(divergence(*pair).sum()) for pair in ((certain, even), (even, certain))):
            raise ValueError(
                "teacher.alignment=uld fills the shorter list of probabilities with zeros, where this divergence is infinite; "
                "choose loss/divergence=total_variation, which is half of ULD's distance, or jsd."
            )

    def scores(self, inner: Any, match: Match) -> AlignedScores:
        """The scores of the student's tokens."""
        row = match.rows(inner.valid)
        metrics = {**inner.metrics, **match.metrics(row >= 0)}
        return AlignedScores(inner, row, by_rank, match.vocabulary.size, match.vocabulary.absent, metrics)


METHODS = ("provides", "check_divergence", "scores")
ALIGNMENTS = {"spans": Spans(), "shared": SharedVocabulary(), "uld": SortedProbabilities()}


def alignment_of(value: Any) -> Any:
    """The reading of a name, or an object that is one; None for None.

    Raises:
        ValueError: there is none of that name, or the object lacks a method of a reading.
    """
    if value is None or (not isinstance(value, str) and all(callable(getattr(value, name, None)) for name in METHODS)):
        return value
    if not isinstance(value, str) or value not in ALIGNMENTS:
        raise ValueError(
            f"teacher.alignment={value!r} is no reading; choose {', '.join(ALIGNMENTS)}, null, or an object with the methods "
            f"{', '.join(METHODS)}."
        )
    return ALIGNMENTS[value]
