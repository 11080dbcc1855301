"""vLLM's connector that writes hidden states to files, for machines without CUDA; with CUDA take vLLM's own, its base."""

import os

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class Written:
    """The event of a copy that is complete."""

    def query(self) -> bool:
        return True


class HiddenStatesFiles(ExampleHiddenStatesConnector):
    """The base class copies by a CUDA stream into pinned memory; this one copies at once."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        assert self._kv_cache is not None
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten()
        hidden = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).clone()
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        save_file({"hidden_states": hidden, "token_ids": pending.token_ids.clone()}, pending.filename)
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is not None:
            os.close(lock)  # releases the lock that readers wait for
        self._req_copy_events[pending.req_id] = Written()  # type: ignore[assignment]
