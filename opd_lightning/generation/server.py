"""A vLLM server of this library's own: a port for it, and how it must have been started."""

import socket

from opd_lightning.utils.http import Server, ServerError


def free_port(host: str = "") -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_settings(server: Server, backend: str) -> None:
    """Raises ValueError if a server was started without what a run needs."""
    try:
        config = server.get("/server_info?config_format=json")["vllm_config"]
    except ServerError as error:
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
