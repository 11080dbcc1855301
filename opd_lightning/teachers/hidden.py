"""A teacher behind a vLLM server that writes hidden states to files: its exact full vocabulary, by its own output layer.

The server runs `extract_hidden_states` on the last layer with a connector that writes files in a folder that this process
reads; docs/served_teachers.md has the command. The states are those before the final norm.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.contracts import Renderer
from opd_lightning.data.batching import packed_index
from opd_lightning.generation.probe import Probe, written_logprobs
from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models import Pretrained, Student
from opd_lightning.models.output_layers import final_norm, without_blocks
from opd_lightning.teachers.contexts import NoContext
from opd_lightning.teachers.reading import read
from opd_lightning.teachers.remote import RemoteTeacher, columns, ids_of
from opd_lightning.teachers.weights.external import External
from opd_lightning.teachers.wire import Positions
from opd_lightning.types import Cost, Sample
from opd_lightning.utils.http import Servers
from opd_lightning.utils.interrupts import interruptible
from opd_lightning.utils.vocabulary import ValidIds


class RemoteHiddenTeacher(RemoteTeacher):
    """A model behind a vLLM server whose logits of the whole vocabulary are computed here, in chunks, from hidden states.

    Of the model's folder only the final norm and the output layer are read. Before training, log-probabilities of a probe are
    compared with the server's own.

    Args:
        servers, model, tolerance, context, alignment, chat_template: see `RemoteTeacher`.
        path: folder or hub id of the served model.
        dtype: of its norm and output layer.

    Raises:
        ValueError: no path is given.
    """

    gives_hidden_states = True

    def __init__(
        self,
        servers: Servers,
        path: str | None = None,
        dtype: str = "float32",
        model: str | None = None,
        tolerance: float = 0.1,
        context: NoContext | None = None,
        alignment: Any = None,
        chat_template: str | None = None,
    ):
        own = {"tokenizer": path, "alignment": alignment, "chat_template": chat_template}
        super().__init__(servers, model, k=0, tolerance=tolerance, context=context, **own)  # type: ignore[arg-type]
        if path is None:
            raise ValueError("teacher.path=null: give the folder or hub id of the served model, whose output layer is read.")
        self.weights = External(path, dtype)
        self.output_layer = self.weights.source
        self.provides, self.top_k = frozenset({"full", "topk", "sampled"}), None

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Compare the folder's tokenizer with the student's, and ask the server for its model."""
        self.weights.check_tokenizer(tokenizer)
        super().check_tokenizer(tokenizer)

    def setup(self, student: Any, renderer: Renderer) -> None:
        """Read the output layer, and compare the server's log-probabilities of a probe with those of its hidden states.

        Raises:
            ValueError: they differ, or the server writes no hidden states that can be read here.
        """
        super().setup(student, renderer)
        source: Pretrained = self.weights.source
        lm = without_blocks(source).to(student.lm.device)
        self.norm = final_norm(lm, source.name)
        shared = student.head.known.intersection([ValidIds(source.vocab_size())])
        self.output = Student(lm, student.chunk, shared)
        rows = [row for row in Probe(shared).rows for _ in self.servers.urls]  # the servers take turns
        answers = self.answers(rows)
        served = torch.stack([self.api.parse(answer, row, 0)[2] for answer, row in zip(answers, rows, strict=True)])
        hidden = torch.stack([self.hidden(answer, row)[:-1] for answer, row in zip(answers, rows, strict=True)])
        logits = self.output.head.project(hidden.flatten(0, 1)).cpu()
        ours = written_logprobs(logits.unflatten(0, served.shape), torch.tensor(rows))
        difference = float((ours - served).abs().mean(1).max())
        if not difference <= self.tolerance:
            raise ValueError(
                f"the hidden states of {self.servers.field}.urls={self.servers.urls[0]} give other log-probabilities than the "
                f"server (by {difference:.2g} nats per token, teacher.tolerance={self.tolerance:g}): the folder {source.path} "
                "holds another model, or the server writes another layer; see docs/served_teachers.md."
            )

    def score(self, samples: Sequence[Sample], max_tokens: int | None = None) -> HiddenScores:
        """The distributions on the samples' trainable tokens; see `reading.read` for those without a target."""
        device, head = self.student.lm.device, self.output.head
        window = min(self.student.window, self.window or self.student.window)
        reading = read(self, samples, window, self.weights.valid_ids, device)
        rows = [ids_of(reading, row) for row in reading.rows]
        counts = [sample.trainable for sample in samples]
        hidden = torch.zeros(sum(counts), head.weight.shape[1], dtype=head.weight.dtype, device=device)
        for row, ids, answer in zip(reading.rows, rows, self.answers(rows), strict=True):
            hidden[packed_index([row], counts).to(device)] = self.hidden(answer, ids)[columns(reading, row).to(device)]
        known, cost = head.known, Cost(reading.tokens, 0)
        return HiddenScores(hidden, head.project, known.size, reading.valid, cost, reading.metrics, known.absent)

    def ask(self, rows: Sequence[Sequence[int]]) -> list[Positions]:
        """For each row of token ids: `wire.Positions`, of the written tokens alone; the files of hidden states are removed."""
        answers = self.answers(rows)
        for answer in answers:
            if path := states_path(answer):
                load(path, self.servers.timeout_s)
        return [self.api.parse(answer, row, 0) for answer, row in zip(answers, rows, strict=True)]

    def answers(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """The server's answers for rows of token ids, which name the files of their hidden states.

        They ask for log-probabilities, for which the server reads every token anew: its cache has no hidden states.
        """
        assert self.model is not None, "the server is asked for its model first"
        return self.servers.post_all(self.api.path, [self.api.request(self.model, row, 0) for row in rows])

    def hidden(self, answer: Any, ids: Sequence[int]) -> Tensor:
        """The hidden states [L, H] behind the final norm that an answer names; the file is removed.

        Raises:
            ValueError: there is no such file here, or it is of other tokens.
        """
        path = states_path(answer)
        where = f"{self.servers.field}.urls={self.servers.urls[0]}"
        if path is None:
            raise ValueError(
                f"{where} writes no hidden states; start it as docs/served_teachers.md says, or take teacher=remote."
            )
        states = load(path, self.servers.timeout_s)
        if states is None:
            raise ValueError(f"{where} wrote {path}, which cannot be read here; give it a folder that both see.")
        if states["token_ids"].tolist() != list(ids) or states["hidden_states"].shape[1] != 1:
            raise ValueError(f"{where} wrote hidden states of other tokens, or of several layers; see docs/served_teachers.md.")
        weight = next(self.norm.parameters())
        with torch.no_grad():
            return self.norm(states["hidden_states"][:, 0].to(weight.device, weight.dtype))

    def logit_flops(self, positions: int) -> int:
        """FLOPs of the output layer."""
        return 2 * positions * self.output.head.weight.numel()


def states_path(answer: Any) -> Path | None:
    """The file of hidden states that an answer names."""
    path = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
    return None if path is None else Path(path)


def load(path: Path, timeout_s: float) -> dict[str, Tensor] | None:
    """The tensors of a file that its writer still locks, which is removed; None if it is not there or not whole."""
    lock = Path(f"{path}.lock")
    try:
        if lock.exists():
            with interruptible(), FileLock(lock, timeout=timeout_s):
                pass
        return load_file(path)
    except (OSError, SafetensorError, Timeout):
        return None
    finally:
        for file in (path, lock):
            with suppress(OSError):
                file.unlink()
