"""The scorer: a teacher's weights behind a teacher's prompt, reading the very token ids that the student wrote."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.batching import packed_index, plan_micro_batches
from opd_lightning.data.renderer import encode_chat
from opd_lightning.generation.transformers import Completions, Sampling, complete
from opd_lightning.models import Student
from opd_lightning.types import Attempt, LogitSource, Prompts, Rollout, join
from opd_lightning.utils.metrics import StepMetrics
from opd_lightning.utils.seeds import seeded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What a teacher says of a rollout.

    Attributes:
        source: its distributions on the N packed completion tokens; zeros where it was told nothing.
        told [B]: False where its context had nothing to tell, or the prompt with it was too long; nothing was read there.
        overlong [B]: True where it was too long.
        tokens, flops: what it read, and what that took without logits.
    """

    source: LogitSource
    told: Tensor
    overlong: Tensor
    tokens: int
    flops: int


class Scorer:
    """A source of next-token distributions on completions, and of completions.

    Args:
        weights: a weights policy; see `weights.py`.
        context: what it is shown; see `opd_lightning.teachers.contexts`.
        tokenizer: the student's.
    """

    def __init__(self, weights, context, tokenizer: PreTrainedTokenizerBase):
        self.weights, self.context, self.tokenizer = weights, context, tokenizer

    def score(
        self, student: Student, rollout: Rollout, micro_tokens: int | None, attempts: Sequence[Attempt] | None = None
    ) -> Scores:
        """Read the completions of a rollout.

        Args:
            student: for policies whose weights are the student's.
            micro_tokens: padded tokens per forward pass; None reads everything at once.
            attempts: the B judged completions, for contexts that take them.
        """
        prompts = self.prompt_ids(rollout.prompts, attempts, rollout.samples)
        lengths = rollout.lengths.tolist()
        window = student.window if self.weights.source is None else self.weights.source.window()
        limit = self.context.max_prompt_tokens or window
        # What never changes was measured before training; what attempts say may be too long for the teacher.
        room = [min(window - n, limit) for n in lengths]
        fits = [p is not None and (attempts is None or len(p) <= room[b]) for b, p in enumerate(prompts)]
        long = [p is not None and not fit for p, fit in zip(prompts, fits, strict=True)]
        # With nothing to read, one row is read all the same: other devices may wait for this one's share of the weights.
        rows = [b for b, fit in enumerate(fits) if fit] or [0]
        asked = {b: (prompts[b] if fits[b] else None) or rollout.prompts.ids[b] for b in rows}
        totals = [len(asked[b]) + lengths[b] for b in rows]
        plan = [[rows[i] for i in part] for part in plan_micro_batches(totals, micro_tokens)]
        pad = self.tokenizer.pad_token_id
        batches = [join([asked[b] for b in part], rollout.ids[part], rollout.lengths[part], pad) for part in plan]
        read = self.weights.read(student, batches)
        hidden = read.hidden.new_zeros(sum(lengths), read.hidden.shape[-1])
        hidden[torch.cat([packed_index(part, rollout.lengths) for part in plan])] = read.hidden
        told, overlong = (torch.tensor(column, device=rollout.ids.device) for column in (fits, long))
        source, flops = LogitSource(hidden, read.project, read.vocabulary), self.weights.sizes(student).read(totals)
        return Scores(source, told, overlong, sum(totals), flops)

    def write(self, student: Student, prompts: Prompts, sampling: Sampling, seed: int) -> tuple[Completions, int, int]:
        """Answer the prompts as this teacher reads them.

        Returns:
            One completion per prompt, drawn from `seed`, the tokens that passed through the teacher, and its FLOPs.
        """
        prompt_ids = [ids for ids in self.prompt_ids(prompts) if ids is not None]
        assert len(prompt_ids) == len(prompts.ids), "a context that waits for attempts cannot word a prompt to write behind"
        with self.weights.lend(student) as lm, seeded(seed, lm.device):
            done = complete(lm, prompt_ids, sampling, self.tokenizer)
        pairs = [(len(ids), n) for ids, n in zip(prompt_ids, done.lengths.tolist(), strict=True)]
        return done, sum(map(sum, pairs)), self.weights.sizes(student).write(pairs)

    def prompt_ids(
        self, prompts: Prompts, attempts: Sequence[Attempt] | None = None, samples: int = 1
    ) -> list[list[int] | None]:
        """The teacher's prompt of each row, None where there is nothing to tell; rows of one prompt are adjacent.

        Args:
            attempts: the judged completion of each row; the siblings of row b are the other rows of its prompt.
        """
        ids: list[list[int] | None] = []
        known: dict[str, list[int]] = {}
        for b, example in enumerate(prompts.examples):
            first = b - b % samples
            own = None if attempts is None else attempts[b]
            others = [] if attempts is None else [attempts[i] for i in range(first, first + samples) if i != b]
            chat = self.context(example, own, others)
            if chat is None:
                ids.append(None)
                continue
            key = repr(chat)
            if key not in known:
                known[key] = encode_chat(self.tokenizer, chat, **self.context.template_options)
            ids.append(known[key])
        return ids


def ask(
    scorers: Mapping[str, Scorer],
    student: Student,
    rollout: Rollout,
    micro_tokens: int | None,
    attempts: Sequence[Attempt] | None,
    metrics: StepMetrics,
) -> tuple[dict[str, LogitSource], Tensor | None]:
    """What several scorers say of a rollout, and which rows [B] all of them know; None where they know all for certain.

    Raises:
        ValueError: a completion holds an id that one of them does not have.
    """
    sources, told = {}, None
    for name, scorer in scorers.items():
        scores = scorer.score(student, rollout, micro_tokens, attempts)
        sources[name] = scores.source
        metrics.total(f"{name}_tokens", torch.tensor(scores.tokens, device=rollout.ids.device))
        metrics.total("flops/teacher", torch.tensor(scores.flops, device=rollout.ids.device))
        if int(rollout.ids.max()) >= scores.source.vocabulary:
            raise ValueError(
                f"a completion holds the id {int(rollout.ids.max())}, which {name} does not have (its vocabulary is "
                f"{scores.source.vocabulary}); choose models of one family."
            )
        if scorer.context.reads_attempts:
            told = scores.told if told is None else told & scores.told
            metrics.mean(f"rollout/{name}_told", scores.told.float())
            metrics.mean(f"rollout/{name}_overlong", scores.overlong.float())
            if scores.overlong.any() and not scores.told.any():
                log.warning(
                    f"warning: every prompt of the {name} in this rollout is too long with what its context tells, so nothing "
                    "is learned from it; raise context.max_prompt_tokens, or lower rollout.max_new_tokens."
                )
    return sources, told
