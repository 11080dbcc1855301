"""A vLLM server of this library's own: a port for it, and how it must have been started."""

import json
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd_lightning.utils.http import Lost, Server, ServerError

SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Entries of a model's configuration by which another model is noticed."""


def free_port(host: str = "") -> int:
    """A port that nothing listens on."""
    family, *_, address = socket.getaddrinfo(host or "0.0.0.0", 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


def check_host(host: str) -> None:
    """Raises ValueError for a host at which no server of this machine can listen."""
    try:
        free_port(host)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"generator.host={host} is no address of this machine ({error}); give one that it has, such as 127.0.0.1, or ::1 "
            "for IPv6."
        ) from error


def check_settings(server: Server, backend: str, student: Any) -> None:
    """Raises ValueError if a server was started without what a run needs, or with another model.

    Args:
        student: the configuration of the student.
    """
    try:
        config = server.get("/server_info?config_format=json")["vllm_config"]
    except Lost as error:
        raise ValueError(
            f"the server at {server.url} does not tell how it was started ({error}); look at its output."
        ) from error
    except ServerError as error:
        if error.status != 404:
            raise
        raise ValueError(
            f"the server at {server.url} has no routes for new weights; start it with VLLM_SERVER_DEV_MODE=1, for this run "
            "alone (docs/engines.md)."
        ) from error
    if (mode := config["model_config"]["logprobs_mode"]) != "processed_logprobs":
        raise ValueError(f"the server at {server.url} reports {mode}; start it with --logprobs-mode processed_logprobs.")
    found = (config.get("weight_transfer_config") or {}).get("backend")
    if found != backend:
        raise ValueError(
            f"the server at {server.url} takes weights by {found}, the run sends them by {backend}; start it with "
            f'--weight-transfer-config \'{{"backend": "{backend}"}}\', or change generator.transfer.'
        )
    check_model(server, config["model_config"], student)


def check_model(server: Server, served: dict[str, Any], student: Any) -> None:
    """Raises ValueError if a server's model has another shape than the student, whose weights would not fit into it."""
    text = student.get_text_config().to_dict()
    own = {"model_type": student.model_type} | {name: text.get(name) for name in SHAPE[1:]}
    for name, value in (configuration_of(served) or shape_in(inspection(server))).items():
        if own.get(name) is not None and value != own[name]:
            raise ValueError(
                f"the server at {server.url} serves another model, {served.get('model')} ({name} {value}), than the student "
                f"{student.name_or_path or student.model_type} ({name} {own[name]}), whose weights do not fit into it; serve "
                "the student's start model."
            )


def configuration_of(served: dict[str, Any]) -> dict[str, Any]:
    """What is known of a served model's shape: what the server tells, or else its folder, where it is seen here."""
    found = served.get("hf_config") or {}
    file = Path(str(served.get("model"))) / "config.json"
    if not found and file.is_file():
        found = file.read_text()
    if isinstance(found, str):
        try:
            found = json.loads(found[found.index("{") :])
        except ValueError:
            return {}
    found = found | (found.get("text_config") or {}) | {"model_type": found.get("model_type")}
    return {name: found[name] for name in SHAPE if found.get(name) is not None}


def inspection(server: Server) -> str:
    """vLLM's print of the first worker's model, which shows a model that is known by a hub's name; "" if there is none."""
    with suppress(ServerError, KeyError, IndexError, TypeError):
        return str(server.post("/collective_rpc", {"method": "get_model_inspection"}, timeout=60)["results"][0])
    return ""


def shape_in(printed: str) -> dict[str, int]:
    """What a printed model says of its shape: the sizes of its input layer, and its layers on all devices."""
    embedding = re.search(r"\(embed_tokens\): VocabParallelEmbedding\(.*?embedding_dim=(\d+), org_vocab_size=(\d+)", printed)
    # Equal layers share a line, as in "(0-27, 29): 29 x Qwen3DecoderLayer()("; those of other devices are PPMissingLayer.
    layers = re.findall(r"^ *\([\d, -]+\): (?:(\d+) x )?(?:\w*Decoder|PPMissing)Layer\(", printed, re.MULTILINE)
    if embedding is None or not layers:
        return {}
    count = sum(int(equal or 1) for equal in layers)
    return {"hidden_size": int(embedding[1]), "vocab_size": int(embedding[2]), "num_hidden_layers": count}
