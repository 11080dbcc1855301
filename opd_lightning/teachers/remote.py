"""A teacher behind a server: its k most probable tokens and the written token, by HTTP."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.data.batching import packed_index
from opd_lightning.losses.targets import HiddenScores, SampledLogProbs, TopKLogProbs, TopKScores
from opd_lightning.models import Pretrained
from opd_lightning.teachers.alignment.readings import alignment_of
from opd_lightning.teachers.base import BaseTeacher
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.fingerprint import Fingerprint
from opd_lightning.teachers.reading import Reading, read
from opd_lightning.teachers.self_test import check_local, check_repeats, check_vocabulary, each, served_models
from opd_lightning.teachers.weights.external import External
from opd_lightning.teachers.wire import VLLM
from opd_lightning.types import Cost, Sample
from opd_lightning.utils.http import ServerError, Servers
from opd_lightning.utils.vocabulary import ValidIds


class RemoteTeacher(BaseTeacher):
    """A model behind a server, with the student's tokenizer; a completions endpoint that gives log-probabilities of prompts.

    Before training it is tested: the tokenizer, equal answers to equal questions, and, with `local`, the log-probabilities.
    FLOPs of a served model are not counted.

    Args:
        servers: where it is served.
        model: its name there; None takes the only one.
        k: most probable tokens per position; 0 asks for the written token alone. A server may limit it (vLLM: --max-logprobs).
        api: the server's interface; see `wire`.
        tokenizer: folder or hub id of its tokenizer; None compares the student's with the server's.
        local: folder or hub id of the same model, loaded for the test and dropped; None leaves that part of the test out.
        tolerance: nats per token by which the test's log-probabilities may differ.
        context: builds the teacher's prompt; see `teachers.contexts`.
        alignment: how a teacher with another tokenizer is read, see `alignment.readings`; None takes "shared" if it is needed.
        chat_template: its chat template, where it has another tokenizer without one.

    Raises:
        ValueError: k or the tolerance is negative.
    """

    reads_context = True
    served = True

    def __init__(
        self,
        servers: Servers,
        model: str | None = None,
        k: int = 20,
        api: Any = None,
        tokenizer: str | None = None,
        local: str | None = None,
        tolerance: float = 0.1,
        context: NoContext | None = None,
        alignment: Any = None,
        chat_template: str | None = None,
    ):
        super().__init__(context)
        self.alignment = alignment_of(alignment)
        if tokenizer is not None:
            self.own_tokenizer = Pretrained(tokenizer, chat_template=chat_template, field="teacher.tokenizer")
        if k < 0:
            raise ValueError(f"teacher.k={k} must not be negative; 0 asks for the written token alone.")
        if tolerance < 0:
            raise ValueError(f"teacher.tolerance={tolerance} must not be negative.")
        self.servers, self.model, self.k, self.api = servers, model, k, VLLM() if api is None else api
        self.tokenizer_path, self.local, self.tolerance = tokenizer, local, tolerance
        self.provides = frozenset({"topk", "sampled"} if k else {"sampled"})
        self.top_k = k or None
        self.window: int | None = None
        self.tested = False

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Test the server, once.

        Raises:
            ValueError: it gives no answer, has another tokenizer, contradicts itself, or serves other weights than `local`.
        """
        if self.tested:
            return
        self.model, self.window = served_models(self.servers, self.model)
        ids = ValidIds.of(tokenizer.get_vocab())
        if self.tokenizer_path is None:
            each(self.servers, partial(check_vocabulary, model=self.model, tokenizer=tokenizer))
        else:
            External(self.tokenizer_path, field="teacher.tokenizer").check_tokenizer(tokenizer)
        logprobs = check_repeats(self, ids)
        if self.local is not None:
            check_local(self, Pretrained(self.local, field="teacher.local"), ids, logprobs)
        where = f"{self.servers.field}.urls={self.servers.urls[0]} (model {self.model})"
        self.fingerprint, self.tested = Fingerprint(where, logprobs, self.tolerance), True

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> TopKScores | HiddenScores:
        """The log-probabilities of the samples' trainable tokens; see `reading.read` for those without a target."""
        device = self.student.lm.device
        window = min(self.student.window, self.window or self.student.window)
        reading = read(self, samples, window, None, device)
        positions = self.ask([ids_of(reading, row) for row in reading.rows])
        counts = [sample.trainable for sample in samples]
        n = sum(counts)
        ids = torch.arange(self.k).repeat(n, 1)  # of tokens that are not read, which are not valid
        logprobs, sampled = torch.full((n, self.k), -1.0), torch.full((n,), -1.0)
        for row, (row_ids, row_logprobs, row_sampled) in zip(reading.rows, positions, strict=True):
            index, column = packed_index([row], counts), columns(reading, row)
            ids[index], logprobs[index], sampled[index] = row_ids[column], row_logprobs[column], row_sampled[column]
        ids, logprobs = of_tokens(ids, logprobs, self.student.head.known)
        logprobs, sampled = logprobs.to(device), sampled.to(device)
        target = (
            TopKLogProbs(ids.to(device), logprobs, sampled, reading.valid)
            if self.k
            else SampledLogProbs(sampled, reading.valid)
        )
        return TopKScores(target, self.student.head.known.size, Cost(reading.tokens, 0), reading.metrics)

    def ask(self, rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each row of token ids: `wire.Positions`.

        Raises:
            ValueError: the server refuses a request, or its answer lacks what is needed.
        """
        assert self.model is not None, "the server is asked for its model first"
        try:
            answers = self.servers.post_all(self.api.path, [self.api.request(self.model, row, self.k) for row in rows])
        except ServerError as error:
            if error.status != 400 or "logprobs" not in str(error):
                raise
            raise ValueError(
                f"teacher.k={self.k}: {error} Choose a smaller teacher.k, or start the server with --max-logprobs {self.k}."
            ) from error
        try:
            return [self.api.parse(answer, row, self.k) for answer, row in zip(answers, rows, strict=True)]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{self.servers.field}.urls={self.servers.urls[0]}: {error}; the server must give log-probabilities of "
                f"prompts, {self.k} per token. Choose another teacher.api, or another teacher.k."
            ) from error


def of_tokens(ids: Tensor, logprobs: Tensor, known: ValidIds) -> tuple[Tensor, Tensor]:
    """Ids [n, k] and log-probabilities [n, k] without ids that are no tokens of the student's, such as rows of padding.

    Their places come last and name no token (-inf), so that their probability counts as that of the rest.
    """
    foreign = ~known.contains(ids)
    if not foreign.any():
        return ids, logprobs
    foreign, order = foreign.sort(dim=-1, stable=True)
    ids, logprobs, k = ids.gather(-1, order), logprobs.gather(-1, order), ids.shape[1]
    candidates = [i for i in range(min(known.size, 2 * k + len(known.absent))) if i not in set(known.absent)]
    logprobs = logprobs.masked_fill(foreign, -torch.inf)
    for row in foreign.any(1).nonzero().flatten().tolist():
        used = set(ids[row].tolist())
        unused = [i for i in candidates if i not in used]
        ids[row, foreign[row]] = torch.tensor(unused[: int(foreign[row].sum())])
    return ids, logprobs


def ids_of(reading: Reading, row: int) -> list[int]:
    """The token ids of a sample behind the teacher's prompt."""
    sample = reading.samples[row]
    return [*reading.prompts[row], *sample.token_ids[sample.prompt_length :].tolist()]


def columns(reading: Reading, row: int) -> Tensor:
    """The positions of a sample's trainable tokens among all tokens but the first, behind the teacher's prompt."""
    sample = reading.samples[row]
    return sample.loss_mask.nonzero().squeeze(1) + len(reading.prompts[row]) - sample.prompt_length - 1
