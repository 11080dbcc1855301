"""A model that is never trained, and where its weights are while nothing reads them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from opd_lightning.losses.targets import HiddenScores
from opd_lightning.models.cpu import fast_on_cpu
from opd_lightning.models.sharding import Sharding, one_token
from opd_lightning.models.student import Student
from opd_lightning.types import Sequences
from opd_lightning.utils.vocabulary import ValidIds


class Frozen(Student):
    """A model that is never trained: whole on a device, or spread over devices, whose layers are gathered one by one to read.

    Args:
        lm, chunk, valid_ids: as for `Student`.
        device: where it computes.
        sharding: the devices that it is spread over; None keeps it whole.
        offload: whether its weights, or each device's part of them, are on the host between uses.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        chunk: int,
        valid_ids: ValidIds | None,
        device: Any,
        sharding: Sharding | None = None,
        offload: bool = False,
    ):
        super().__init__(lm, chunk, valid_ids)
        self.requires_grad_(False).eval()
        self.place, self.sharding, self.offload = torch.device(device), sharding, offload
        if sharding is not None:
            sharding.spread(self, offload)
        else:
            self.to("cpu" if offload else self.place)

    @contextmanager
    def eval_mode(self) -> Iterator[PreTrainedModel]:
        """A context with the whole language model on its device."""
        moved = self.offload and self.sharding is None and not self.in_eval_mode
        if moved:
            self.to(self.place)
        try:
            with super().eval_mode() as lm:
                yield lm
        finally:
            if moved:
                self.to("cpu")

    @contextmanager
    def reading(self) -> Iterator[PreTrainedModel]:
        """A context for forward passes; of a model that is spread only embedding, last norm and head are gathered at once.

        Every device has to make as many passes, unless the model is whole around it.
        """
        if self.sharding is None or self.in_eval_mode:
            with self.eval_mode() as lm:
                yield lm
            return
        assert isinstance(self, FSDPModule)
        with torch.no_grad():
            self.unshard()
            try:
                yield self.lm
            finally:
                self.reshard()

    def read(self, batches: Sequence[Sequences], snapshot: bool = False) -> HiddenScores:
        """This model's distributions on the completions of all batches; the head is a copy where its weights do not stay."""
        leaves = self.offload or self.sharding is not None
        with self.reading() as lm, fast_on_cpu(lm):
            hidden = [self.hidden(sequences) for sequences in self.evened(batches)]
            return self.scores(hidden[: len(batches)], copy=leaves)

    def evened(self, batches: Sequence[Sequences]) -> list[Sequences]:
        """The batches, and batches of a token, so that all devices that wait for each other have equally many."""
        if self.sharding is None or self.in_eval_mode:
            return list(batches)
        return [*batches, *[one_token(self.place)] * (self.sharding.most(len(batches)) - len(batches))]
