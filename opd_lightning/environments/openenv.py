"""OpenEnv: environments of the OpenEnv protocol on a server, one session for each episode (package websockets)."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from opd_lightning.types import Example, Messages, Verdict


class Session:
    """One episode on a server; the rewards of its steps are the verdict.

    Args:
        url: of the server, such as http://127.0.0.1:8000.
        options: the `OpenEnv` that makes it.
    """

    threaded = True
    judges = True

    def __init__(self, url: str, options: "OpenEnv"):
        self.url, self.options, self.step_seconds = url, options, 2 * options.seconds
        self.socket: Any = None
        self.rewards: list[float] = []

    def reset(self, example: Example) -> Messages:
        """The example's chat with the first observation behind its last turn."""
        if self.socket is None:
            self.socket = connect(self.url, self.options.seconds)
        text = self.text(self.ask("reset", {**self.options.reset, **self.seed(example)}))
        *before, last = example.messages
        return [*before, {**last, "content": f"{last['content']}\n\n{text}" if text else last["content"]}]

    def seed(self, example: Example) -> dict[str, int]:
        """The seed of the server's episode, which all samples of an example share."""
        return {"seed": zlib.crc32(example.id.encode()) >> 1} if self.options.seeded else {}

    def step(self, reply: str) -> tuple[Messages, Verdict | None]:
        """The observation behind a reply; none at the end, with the rewards as the verdict."""
        answer = self.ask("step", {**self.options.action, self.options.reply: reply})
        self.rewards.append(finite(answer.get("reward") or 0.0))
        own = Verdict(bounded(self.rewards[-1]), feedback=self.text(answer) or None)
        if not answer.get("done") and len(self.rewards) < self.options.max_turns:
            return [{"role": self.options.role, "content": self.text(answer)}], own
        self.close()
        self.whole = replace(own, content=bounded(sum(self.rewards))) if self.options.total else own
        return [], own

    def verdict(self, reply: str) -> Verdict:
        """The verdict on the episode: the sum of the rewards, or the last."""
        return self.whole

    def ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a message; raises RuntimeError with the server's words for an error."""
        self.socket.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(self.socket.recv(timeout=self.options.seconds))
        if answer.get("type") == "error":
            raise RuntimeError(f"{self.url}: {answer.get('data', {}).get('message', 'an error without words')}")
        return dict(answer.get("data") or {})

    def text(self, answer: Mapping[str, Any]) -> str:
        """The observation as a text: one field of it, or all of it as JSON."""
        observation, name = answer.get("observation") or {}, self.options.observation
        found = observation.get(name, "") if name else {k: v for k, v in observation.items() if k not in ("reward", "done")}
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        return text[: self.options.max_characters]

    def close(self) -> None:
        """End the session."""
        if self.socket is not None:
            with suppress(Exception):  # the server may have gone
                self.socket.send(json.dumps({"type": "close"}))
            with suppress(Exception):
                self.socket.close()
        self.socket = None


class OpenEnv:
    """Makes a session for each episode, on the servers in turn.

    The task gives the first chat of an episode, such as the instructions; its own verifier is not asked.

    Args:
        urls: servers, http://<host>:<port> each; each must allow as many sessions at once as it gets.
        reply: the field of an action that holds the student's reply.
        action: other fields of an action.
        observation: the field of an observation that the student reads; None shows all as JSON.
        reset: arguments of every reset.
        seeded: reset with a seed made of the example's id, so that the samples of a prompt are of one episode.
        total: the verdict is the sum of the rewards, in [0, 1]; False takes the last.
        max_turns: replies.
        seconds: for one answer of the server; an episode that waits longer has failed.
        max_characters: longer observations are cut.
        role: of the turns with observations.

    Raises:
        ValueError: a URL is none, or a number is out of range.
    """

    judges = True
    remote = True

    def __init__(
        self,
        urls: str | Sequence[str],
        reply: str = "message",
        action: Mapping[str, Any] | None = None,
        observation: str | None = None,
        reset: Mapping[str, Any] | None = None,
        seeded: bool = True,
        total: bool = True,
        max_turns: int = 8,
        seconds: float = 60.0,
        max_characters: int = 4000,
        role: str = "user",
    ):
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        for url in self.urls or [""]:
            if urlsplit(url).scheme not in ("http", "https", "ws", "wss") or not urlsplit(url).hostname:
                raise ValueError(f"environment.urls={url!r} is no URL; write http://<host>:<port>, or a list of them.")
        for name, value in (("max_turns", max_turns), ("max_characters", max_characters)):
            if value < 1:
                raise ValueError(f"environment.{name}={value} must be at least 1.")
        if seconds <= 0:
            raise ValueError(f"environment.seconds={seconds} must be positive.")
        self.reply, self.action, self.observation, self.reset = reply, action or {}, observation, reset or {}
        self.seeded, self.total, self.max_turns, self.seconds = seeded, total, max_turns, seconds
        self.max_characters, self.role, self.made = max_characters, role, count()

    def __call__(self) -> Session:
        """A new session."""
        return Session(self.urls[next(self.made) % len(self.urls)], self)


def finite(reward: Any) -> float:
    """A reward as a number; raises ValueError if it is none, as JSON's NaN."""
    if not math.isfinite(number := float(reward)):
        raise ValueError(f"the server's reward is {number}")
    return number


def bounded(reward: float) -> float:
    """A reward as a score in [0, 1]."""
    return min(max(reward, 0.0), 1.0)


def connect(url: str, seconds: float) -> Any:
    """A connection to a server's sessions.

    Raises:
        ValueError: the package is missing.
    """
    try:
        from websockets.sync.client import connect as connected
    except ImportError as error:
        raise ValueError("environment=openenv needs a package: pip install 'opd-lightning[openenv]'.") from error
    address = url.rstrip("/").replace("http", "ws", 1) if url.startswith("http") else url.rstrip("/")
    return connected(f"{address}/ws", open_timeout=seconds, max_size=2**24, proxy=None)
