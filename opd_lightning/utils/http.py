"""JSON over HTTP: a server, and several equal ones, with time limits, retries and concurrent requests."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from threading import Lock
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from opd_lightning.utils.addresses import check_key_env, checked_url, on_loopback, origin
from opd_lightning.utils.errors import RESUME
from opd_lightning.utils.interrupts import interruptible
from opd_lightning.utils.secrets import MASK, redact_secrets
from opd_lightning.utils.threads import results, submit_all

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 30.0
TEMPORARY = (408, 429)
"""Refusals after which the same request can succeed later."""


class ServerError(ValueError):
    """A request that a server refuses.

    Attributes:
        status: the HTTP status; None without an answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Lost(ServerError):
    """No answer, or one after which the same request can succeed later."""


class NoRedirects(HTTPRedirectHandler):
    """Follows no redirect, which would take the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """One server.

    Args:
        url: such as http://127.0.0.1:8000; a final /v1 is ignored.
        timeout: seconds that one request may take.
        key_env: environment variable with the API key; none is sent where it is not set.
        field: the configuration's field, for errors.
        direct: pass by proxies of the environment, which are passed by on loopback in any case.

    Raises:
        ValueError: the URL is none or holds a secret, or `key_env` is a key.
    """

    def __init__(
        self, url: str, timeout: float = 600.0, key_env: str = "VLLM_API_KEY", field: str = "generator", direct: bool = True
    ):
        check_key_env(key_env, field)
        self.url, self.timeout, self.key_env, self.direct = checked_url(url, field, key_env), timeout, key_env, direct

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The JSON answer to a GET request."""
        return self.request("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """The JSON answer to a POST request."""
        return self.request("POST", path, {} if body is None else body, timeout)

    def request(self, method: str, path: str, body: Any, timeout: float | None) -> Any:
        """A request's JSON answer; None for an empty one.

        Raises:
            Lost: no answer, an internal error, or a server that is busy.
            ServerError: the server refuses the request.
            Interrupted: a signal ended the wait.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        opener = build_opener(NoRedirects, *[ProxyHandler({})] * (self.direct or on_loopback(self.url)))
        asked = Request(self.url + path, data, headers, method=method)
        try:
            with interruptible(), opener.open(asked, timeout=timeout or self.timeout) as answer:
                text = answer.read()
        except HTTPError as error:
            raise self.refusal(path.partition("?")[0], error, key) from error
        except (OSError, HTTPException) as error:
            raise Lost(one_line(getattr(error, "reason", error)) or type(error).__name__) from error
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            if text[:1] in (b"{", b"["):
                raise Lost("its answer breaks off") from error
            refused = f"the server at {self.url} refuses {path.partition('?')[0]}"
            raise ServerError(f"{refused}: its answer is no JSON.") from error

    def refusal(self, path: str, error: HTTPError, key: str | None) -> ServerError:
        """The error for an answer that is none, with a remedy where the fault is the key's or the address's."""
        code, there = error.code, f"the server at {self.url}"
        if 300 <= code < 400:
            place = origin(error.headers.get("Location") or "", self.url)
            return ServerError(
                f"{there} redirects {path} to {place}, which is not followed, for the key would go there; give the address of "
                "the server itself.",
                code,
            )
        message = f"{code}: {message_of(error, key)}"
        if code >= 500 or code in TEMPORARY:
            return Lost(message, code)
        remedy = ""
        if code in (401, 403):
            remedy = f" The key in the environment variable {self.key_env} is " + ("not the server's." if key else "missing.")
        return ServerError(f"{there} refuses {path} ({message}).{remedy}", code)

    def healthy(self) -> bool:
        """Does it answer? ServerError if what answers is no such server, which waiting would not change."""
        try:
            self.get("/health", timeout=10)
        except Lost:
            return False
        return True

    def wait(self, patience: float, gone: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it is healthy, with pauses that grow; False after so many seconds, or where it is `gone`."""
        end, pause = time.monotonic() + patience, 0.1
        while not (up := self.healthy()) and time.monotonic() < end and not gone():
            with interruptible():
                time.sleep(min(pause, max(0.0, end - time.monotonic())))
            pause = min(2 * pause, 5.0)
        return up


class Servers:
    """Servers with the same model. A request that fails is sent again, to the next server, after a growing wait.

    A server that stays away is left out for the rest of the run, with a warning, as long as another answers.

    Args:
        urls: such as http://127.0.0.1:8000, one or several.
        key_env: environment variable with the API key.
        timeout_s: for one request, in seconds.
        retries: further attempts of a request, and further failures in a row after which a server is left out.
        concurrency: requests at a time.
        field: the configuration's field, for errors.

    Raises:
        ValueError: a URL is none or holds a secret, `key_env` is a key, or a number is out of range.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 300.0,
        retries: int = 5,
        concurrency: int = 16,
        field: str = "teacher.servers",
    ):
        given = [urls] if isinstance(urls, str) else list(urls)
        self.present = [Server(url, timeout_s, key_env, field, direct=False) for url in given or [""]]
        for name, value, least in (("timeout_s", timeout_s, 0.001), ("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise ValueError(f"{field}.{name}={value} must be at least {least}.")
        self.timeout_s, self.retries, self.concurrency, self.field = timeout_s, retries, concurrency, field
        self.first_wait_s = 0.5
        self.lock = Lock()
        self.failing: dict[Server, tuple[int, float]] = {}  # failures in a row, and the time from which on one more counts

    @property
    def urls(self) -> list[str]:
        """The URLs of the servers that are not left out."""
        return [server.url for server in self.present]

    def get(self, path: str) -> Any:
        """The JSON answer to a GET request."""
        return self.ask(lambda server: server.get(path), 0)

    def post(self, path: str, payload: Any, turn: int = 0) -> Any:
        """The JSON answer to a POST request, which the server whose turn it is gets first."""
        return self.ask(lambda server: server.post(path, payload), turn)

    def post_all(self, path: str, payloads: Sequence[Any]) -> list[Any]:
        """The answers to all payloads, in their order; the servers take turns.

        Raises:
            ServerError: the first request that fails for good; those not yet sent are dropped.
        """
        return results(submit_all(lambda i: self.post(path, payloads[i], i), range(len(payloads)), self.concurrency))

    def ask(self, request: Callable[[Server], Any], turn: int) -> Any:
        """The answer to a request, after retries at the servers in turn.

        Raises:
            ServerError: one refuses it, or none answers.
        """
        tried: Counter[Server] = Counter()
        errors: dict[Server, Lost] = {}
        while True:
            servers, begun = self.present, time.monotonic()
            server = min(servers[turn % len(servers) :] + servers[: turn % len(servers)], key=lambda one: tried[one])
            try:
                answer = request(server)
            except Lost as error:
                tried[server], errors[server] = tried[server] + 1, error
                self.failed(server, begun, error)
                if not all(tried[one] for one in self.present):
                    continue  # another may answer at once
                if (count := min(tried[one] for one in self.present)) > self.retries:
                    after = "one try" if count == 1 else f"{count} tries"
                    told = ", ".join(dict.fromkeys(str(errors[one]) for one in self.present))
                    raise Lost(
                        f"{self.field}.urls={', '.join(self.urls)} gives no answer after {after} ({told}). Start the server, "
                        f"or correct the URL. {RESUME}.",
                        error.status,
                    ) from error
                with interruptible():
                    time.sleep(self.pause(count))
            else:
                self.failing.pop(server, None)
                return answer

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures."""
        return min(self.first_wait_s * 2 ** (failures - 1), LONGEST_WAIT_S)

    def failed(self, server: Server, begun: float, error: Lost) -> None:
        """Count a failure of a request that was begun at that time; leave the server out after the last that is allowed."""
        with self.lock:
            failures, until = self.failing.get(server, (0, 0.0))
            if server not in self.present or begun < until:
                return
            self.failing[server] = failures + 1, time.monotonic() + self.pause(failures + 1)
            if failures >= self.retries and len(self.present) > 1:
                self.present = [one for one in self.present if one is not server]
                log.warning(
                    f"warning: {self.field}.urls: {server.url} stays away ({error}) and is left out; the run goes on with "
                    f"{', '.join(self.urls)}."
                )


def message_of(error: HTTPError, key: str | None) -> str:
    """The message in an error's answer, shortened, without the key."""
    text: Any = ""
    with suppress(OSError, HTTPException, ValueError, AttributeError):
        text = error.read().decode(errors="replace")
        found = json.loads(text)
        found = found.get("error", found)
        text = found.get("message", found) if isinstance(found, dict) else found
    return one_line(str(text).replace(key, MASK) if key else text) or "nothing"


def one_line(text: Any) -> str:
    """A text in one line of at most 300 characters, without secrets."""
    return " ".join(str(redact_secrets(str(text))).split())[:300]
