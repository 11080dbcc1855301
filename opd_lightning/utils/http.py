"""JSON over HTTP to one or several equal servers: concurrent requests, time limits and retries."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
LONGEST_WAIT_S = 30.0


class ServerError(ValueError):
    """An error of a server.

    Attributes:
        status: the HTTP status; None without an answer.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status

    @property
    def temporary(self) -> bool:
        """Can the same request succeed later?"""
        return self.status is None or self.status in (408, 429) or self.status >= 500


class Servers:
    """Servers with the same model. A request that fails is sent again, to the next server, after a growing wait.

    Args:
        urls: such as http://127.0.0.1:8000, one or several; a final /v1 is ignored.
        key_env: environment variable with the API key; none is sent where it is not set.
        timeout_s: for one request, in seconds.
        retries: further attempts of a request.
        concurrency: requests at a time.
        field: the configuration's field, for errors.

    Raises:
        ValueError: a URL is none, or a number is out of range.
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
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in ([urls] if isinstance(urls, str) else urls)]
        for url in self.urls or [""]:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError(f"{field}.urls={url!r} is no URL; write http://<host>:<port>, or a list of them.")
        for name, value, least in (("timeout_s", timeout_s, 0.001), ("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise ValueError(f"{field}.{name}={value} must be at least {least}.")
        self.key_env, self.timeout_s, self.retries, self.concurrency, self.field = (
            key_env,
            timeout_s,
            retries,
            concurrency,
            field,
        )
        self.first_wait_s = 0.5

    def get(self, path: str, server: int = 0) -> Any:
        """The JSON answer to a GET request."""
        return self.request(path, None, server)

    def post(self, path: str, payload: Any, server: int = 0) -> Any:
        """The JSON answer to a POST request."""
        return self.request(path, payload, server)

    def post_all(self, path: str, payloads: Sequence[Any]) -> list[Any]:
        """The answers to all payloads, in their order; the servers take turns.

        Raises:
            ServerError: the first request that fails for good; those not yet sent are dropped.
        """
        pool = ThreadPoolExecutor(min(self.concurrency, max(len(payloads), 1)))
        try:
            return list(pool.map(lambda i: self.post(path, payloads[i], i), range(len(payloads))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def request(self, path: str, payload: Any, server: int) -> Any:
        """The JSON answer to a request, after retries.

        Raises:
            ServerError: no server gives one.
        """
        for attempt in range(self.retries + 1):
            url = self.urls[(server + attempt) % len(self.urls)]
            try:
                return self.send(url, path, payload)
            except ServerError as error:
                if not error.temporary:
                    raise
                if attempt == self.retries:
                    tries = f"{attempt + 1} tries" if attempt else "one try"
                    raise ServerError(
                        f"{self.field}.urls={url} gives no answer after {tries} ({error}). Start the server, or correct the "
                        "URL; then the same command goes on from the last checkpoint, or begins anew where there is none.",
                        error.status,
                    ) from error
                time.sleep(min(self.first_wait_s * 2**attempt, LONGEST_WAIT_S))
        raise AssertionError("unreachable")

    def send(self, url: str, path: str, payload: Any) -> Any:
        """Send one request once; raises ServerError for anything but a JSON answer."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env):
            headers["Authorization"] = f"Bearer {key}"
        body = None if payload is None else json.dumps(payload).encode()
        # A proxy does not reach this machine's own loopback.
        opener = build_opener(ProxyHandler({})) if urlsplit(url).hostname in LOOPBACK else build_opener()
        try:
            with opener.open(Request(url + path, body, headers), timeout=self.timeout_s) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            raise ServerError(f"{url}{path} answers {error.code}: {message_of(error.read())}", error.code) from error
        except json.JSONDecodeError as error:
            raise ServerError(f"{url}{path} does not answer in JSON", 400) from error
        except (URLError, OSError) as error:
            raise ServerError(" ".join(str(getattr(error, "reason", error)).split())[:200]) from error


def message_of(body: bytes) -> str:
    """The message in the body of an error, shortened."""
    text = body.decode(errors="replace")
    try:
        answer = json.loads(text)
        error = answer.get("error", answer)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (json.JSONDecodeError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "nothing"
