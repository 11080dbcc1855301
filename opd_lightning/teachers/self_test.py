"""Tests of a served teacher before training: which model, which tokenizer, and whether its answers hold."""

import logging
from collections.abc import Callable
from copy import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opd_lightning.generation.probe import Probe, written_logprobs
from opd_lightning.models import Pretrained
from opd_lightning.utils.http import Lost, ServerError, Servers
from opd_lightning.utils.vocabulary import ValidIds

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

BLOCK = 2048
"""Token ids per request for their text."""


def each(servers: Servers, question: Callable[[Servers], Answer]) -> list[Answer]:
    """Each server's own answer; one that stays away is left out with a warning, as long as another answers.

    Raises:
        Lost: none answers.
    """
    answers, lost = [], {}
    for server in servers.present:
        alone = copy(servers)
        alone.present, alone.failing = [server], {}
        try:
            answers.append(question(alone))
        except Lost as error:
            lost[server] = error
    if not answers:
        raise Lost(" ".join(map(str, lost.values())), next(iter(lost.values())).status)
    for server, reason in lost.items():
        log.warning(f"warning: {server.url} is left out, and the run goes on without it: {reason}")
    servers.present = [server for server in servers.present if server not in lost]
    return answers


def served_models(servers: Servers, name: str | None) -> tuple[str, int | None]:
    """The name of the model that every server has, and the most tokens that all of them read, if one tells.

    Raises:
        ValueError: a server has no such model, several of which none is chosen, or one by another name.
    """
    found = each(servers, lambda one: served_model(one, name))
    if len(names := sorted({model for model, _ in found})) > 1:
        raise ValueError(
            f"{servers.field}.urls={', '.join(servers.urls)} serve {' and '.join(names)}; serve one model by one name."
        )
    return names[0], min((window for _, window in found if window is not None), default=None)


def served_model(servers: Servers, name: str | None) -> tuple[str, int | None]:
    """The name of the served model, and the most tokens it reads, if the server tells.

    Raises:
        ValueError: the server has no such model, or several and none is chosen.
    """
    models = {str(model["id"]): model for model in (servers.get("/v1/models") or {}).get("data", [])}
    if name is None and len(models) == 1:
        name = next(iter(models))
    if name not in models:
        chosen = "gives several models" if name is None else f"has no model {name!r}"
        raise ValueError(f"{servers.field}.urls={servers.urls[0]} {chosen}; set teacher.model to one of {', '.join(models)}.")
    window = models[name].get("max_model_len")
    return name, None if window is None else int(window) - 1  # one token is generated


def check_vocabulary(servers: Servers, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the text of every id of the student's tokenizer with the server's.

    Raises:
        ValueError: an id has another text there, or the server does not tell.
    """
    ids = sorted(set(tokenizer.get_vocab().values()))
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        if texts_differ(servers, model, tokenizer, block):
            token = first_difference(servers, model, tokenizer, block)
            raise ValueError(
                f"{servers.field}.urls={servers.urls[0]} serves a model with another tokenizer: the token {token} is "
                f"{tokenizer.decode([token])!r} for the student. Choose a teacher of the student's family, or give "
                "the folder or hub id of its tokenizer as teacher.tokenizer (teacher.alignment=shared or spans)."
            )


def texts_differ(servers: Servers, model: str, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    """Whether the server decodes ids to another text than the student's tokenizer.

    Raises:
        ValueError: the server does not decode.
    """
    try:
        text = servers.post("/detokenize", {"model": model, "tokens": ids})["prompt"]
    except Lost:
        raise
    except ServerError as error:
        if error.status in (400, 422):
            return True  # an id that the server does not have
        raise ValueError(
            f"{servers.field}.urls={servers.urls[0]} does not tell its tokenizer ({error}); give the model's folder or hub id "
            "as teacher.tokenizer."
        ) from error
    return text != tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def first_difference(servers: Servers, model: str, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """The first id whose text differs, by halving."""
    while len(ids) > 1:
        half = ids[: len(ids) // 2]
        ids = half if texts_differ(servers, model, tokenizer, half) else ids[len(half) :]
    return ids[0]


def check_repeats(teacher: Any, valid_ids: ValidIds) -> Tensor:
    """The servers' log-probabilities of a probe [rows, tokens - 1], asked for twice.

    Raises:
        ValueError: the answers differ.
    """
    rows, servers = Probe(valid_ids).rows, len(teacher.servers.urls)
    every = [row for row in rows for _ in range(servers)]  # they take turns
    passes = [torch.stack([sampled for _, _, sampled in teacher.ask(every)]).view(len(rows), servers, -1) for _ in range(2)]
    first = passes[0][:, 0]
    difference = float((torch.stack(passes) - first[:, None]).abs().max())
    if not difference <= teacher.tolerance:
        urls = ", ".join(teacher.servers.urls)
        raise ValueError(
            f"{teacher.servers.field}.urls={urls} answers the same question with log-probabilities that differ "
            f"by up to {difference:.2g} nats (teacher.tolerance={teacher.tolerance:g}): several servers with different models, "
            "or sampling that changes them. Serve one model, or raise the tolerance."
        )
    return first


def check_local(teacher: Any, model: Pretrained, valid_ids: ValidIds, served: Tensor) -> None:
    """Compare the server's log-probabilities of the probe with those of a local copy of the model.

    Raises:
        ValueError: they differ.
    """
    rows = torch.tensor(Probe(valid_ids).rows)
    with torch.no_grad():
        logits = model.model().eval()(input_ids=rows).logits.float()[:, :-1]
    local = written_logprobs(logits, rows)
    difference = float((local - served).abs().mean())
    if not difference <= teacher.tolerance:
        raise ValueError(
            f"{teacher.servers.field}.urls={teacher.servers.urls[0]} serves other weights than teacher.local={model.path}: "
            f"log-probabilities differ by {difference:.2g} nats per token (teacher.tolerance={teacher.tolerance:g}). Serve "
            "that model, or correct teacher.local."
        )
