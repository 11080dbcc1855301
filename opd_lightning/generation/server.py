"""A vLLM server as a client sees it: requests over HTTP, and what its errors mean."""

import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Any

from opd_lightning.utils.secrets import redact_secrets

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Servers are reached directly, whatever proxy the environment names."""


class Lost(Exception):
    """A server that does not answer, or that answers with an internal error."""


class Server:
    """One server.

    Args:
        url: such as http://127.0.0.1:8000.
        timeout: seconds that one request may take.
    """

    def __init__(self, url: str, timeout: float = 600.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"generator.urls={url} is no URL; give it as http://<host>:<port>.")
        self.url, self.timeout = url.rstrip("/"), timeout

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The JSON answer to a GET request."""
        return self.request("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """The JSON answer to a POST request."""
        return self.request("POST", path, {} if body is None else body, timeout)

    def request(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        """A request's JSON answer.

        Raises:
            Lost: no answer, or an internal error.
            ValueError: the server refuses the request.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with OPENER.open(request, timeout=timeout or self.timeout) as answer:
                text = answer.read()
            return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            message = reason(error)
            if error.code >= 500:
                raise Lost(f"{error.code}: {message}") from error
            raise ValueError(f"the server at {self.url} refuses {path.partition('?')[0]} ({error.code}: {message}).") from error
        except (OSError, HTTPException, json.JSONDecodeError) as error:
            raise Lost(str(error) or type(error).__name__) from error

    def healthy(self) -> bool:
        """Does it answer?"""
        try:
            self.get("/health", timeout=10)
        except (Lost, ValueError):
            return False
        return True

    def wait(self, patience: float, gone: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it is healthy, with pauses that grow; False after so many seconds, or where it is `gone`."""
        end, pause = time.monotonic() + patience, 0.1
        while not (up := self.healthy()) and time.monotonic() < end and not gone():
            time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, 5.0)
        return up


def on_loopback(url: str) -> bool:
    """Is it a server of this machine that others do not reach?"""
    return url.partition("//")[2].startswith(("127.", "localhost", "[::1]"))


def reason(error: urllib.error.HTTPError) -> str:
    """The message in an error's answer, in one line of at most 300 characters."""
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(redact_secrets(text)).split())[:300]


def free_port(host: str = "") -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_settings(server: Server, backend: str) -> None:
    """Raises ValueError if a server was started without what a run needs."""
    try:
        config = server.get("/server_info?config_format=json")["vllm_config"]
    except (ValueError, Lost) as error:
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
