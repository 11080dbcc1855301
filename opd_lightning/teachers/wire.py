"""Interfaces of servers: how a served model is asked for the log-probabilities of given tokens.

Each has `path` and
request(model, ids, k)     the payload of a request
parse(answer, ids, k)      for each token but the first: the k most probable tokens, and the token's own log-probability
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Positions = tuple[Tensor, Tensor, Tensor]
"""Ids [L - 1, k] and log-probabilities [L - 1, k] of the most probable tokens, and log-probabilities [L - 1] of the tokens."""


class VLLM:
    """The completions endpoint of vLLM, with `prompt_logprobs`."""

    path = "/v1/completions"

    def request(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """The payload; the endpoint generates one token at least, which is ignored."""
        return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}

    def parse(self, answer: Mapping[str, Any], ids: Sequence[int], k: int) -> Positions:
        """The log-probabilities.

        Raises:
            ValueError: the answer has none, or not for these tokens.
        """
        positions = answer["choices"][0].get("prompt_logprobs") if answer.get("choices") else None
        if positions is None or len(positions) != len(ids):
            raise ValueError("the answer has no prompt_logprobs of these tokens")
        rows, sampled = [], []
        for token, position in zip(ids[1:], positions[1:], strict=True):
            if str(token) not in position:
                raise ValueError(f"the answer has no log-probability of the token {token}")
            entries = [(int(i), float(entry["logprob"])) for i, entry in position.items()]
            own = next(logprob for i, logprob in entries if i == token)
            if len(entries) > k:  # the token itself is not among the k
                entries = [entry for entry in entries if entry[0] != token]
            rows.append(sorted(entries, key=lambda entry: -entry[1])[:k])
            sampled.append(own)
        return tensors(rows, sampled, k)


class SGLang:
    """The native endpoint of SGLang."""

    path = "/generate"

    def request(self, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
        """The payload."""
        return {
            "input_ids": list(ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": k,
        }

    def parse(self, answer: Mapping[str, Any], ids: Sequence[int], k: int) -> Positions:
        """The log-probabilities; raises ValueError if the answer has none, or not for these tokens."""
        meta = answer.get("meta_info", {})
        own, top = meta.get("input_token_logprobs"), meta.get("input_top_logprobs")
        if own is None or len(own) != len(ids) or (k and (top is None or len(top) != len(ids))):
            raise ValueError("the answer has no input_token_logprobs of these tokens")
        if [int(entry[1]) for entry in own[1:]] != list(ids[1:]):
            raise ValueError("the answer has log-probabilities of other tokens")
        rows = (
            [[(int(entry[1]), float(entry[0])) for entry in position[:k]] for position in top[1:]] if k else [[]] * len(own[1:])
        )
        return tensors(rows, [float(entry[0]) for entry in own[1:]], k)


def tensors(rows: Sequence[Sequence[tuple[int, float]]], sampled: Sequence[float], k: int) -> Positions:
    """The tensors of k entries per position.

    Raises:
        ValueError: a position has fewer.
    """
    short = min(map(len, rows), default=k)
    if short < k:
        raise ValueError(f"the answer has {short} of the {k} most probable tokens")
    ids = torch.tensor([[i for i, _ in row] for row in rows], dtype=torch.long).reshape(len(rows), k)
    logprobs = torch.tensor([[logprob for _, logprob in row] for row in rows], dtype=torch.float32).reshape(len(rows), k)
    return ids, logprobs, torch.tensor(sampled, dtype=torch.float32)
