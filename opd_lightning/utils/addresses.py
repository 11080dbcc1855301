"""Addresses: URLs of servers, which hold no secrets, and the environment variables of their keys."""

import os
import re
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

from opd_lightning.utils.secrets import MASK, is_secret


def checked_url(url: str, field: str, key_env: str) -> str:
    """A server's URL without a final /v1.

    Raises:
        ValueError: it is none, or it holds what only a key's environment variable should.
    """
    shown = re.sub(r"[^/]*@", f"{MASK}@", re.sub(r"[?#].*", "", str(url)))
    try:
        parts = urlsplit(str(url))
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, or a port that is no number
        usable = False
    if not usable:
        raise ValueError(f"{field}.urls={shown!r} is no URL; write http://<host>:<port>, or a list of them.")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"{field}.urls={shown!r}: a URL with a user, a password or a query would be written to files and logs; write "
            f"http://<host>:<port>, and put the key into the environment variable {key_env}."
        )
    return str(url).rstrip("/").removesuffix("/v1")


def check_key_env(name: str, field: str) -> None:
    """Raises ValueError for a key in the place of the name of its environment variable; the message does not repeat it."""
    usual = re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and ("_" in name or is_secret(name))
    if name and not usual and name not in os.environ:
        raise ValueError(
            f"{field}.key_env is no environment variable, and looks like a key; keys are not written into configurations: put "
            "it into a variable, such as OPENAI_API_KEY, and give the variable's name."
        )


def url_of(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that listens on a host, which may be an IPv6 address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def on_loopback(url: str) -> bool:
    """Is it a server of this machine that others do not reach?"""
    host = ""
    with suppress(ValueError):
        host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def origin(url: str, base: str) -> str:
    """The scheme and the host of a URL that may be relative to another, without what could be secret."""
    try:
        parts = urlsplit(urljoin(base, url))
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "another address"
    return f"{parts.scheme}://{parts.hostname}{port}"
