"""Options of `generator=vllm_server`: which fit together, checked before anything is started."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any


def check_servers(urls: Any, start: bool, options: Any) -> None:
    """Raises ValueError unless there is one source of servers, each named once."""
    if isinstance(urls, str) or isinstance(options, str):
        raise ValueError(
            f"generator.{'urls' if isinstance(urls, str) else 'options'} is a text; give urls as [http://<host>:<port>], "
            "options as {gpu_memory_utilization: 0.9}."
        )
    if bool(urls) == start:
        raise ValueError(
            "generator=vllm_server needs either generator.start=true or generator.urls=[http://<host>:<port>], not "
            f"{'both' if start else 'neither'}."
        )


def check_once(urls: Sequence[str]) -> None:
    """Raises ValueError for a server that is named twice: two updates of it at once would break each other."""
    if twice := sorted({url for url in urls if urls.count(url) > 1}):
        raise ValueError(f"generator.urls names {twice[0]} twice; name each server once.")


def check_numbers(servers: int, concurrency: int, timeout: float, patience: float) -> None:
    """Raises ValueError for a number of servers, requests or seconds that is out of range."""
    for name, count in (("concurrency", concurrency), ("servers", servers)):
        if count < 1:
            raise ValueError(f"generator.{name}={count} must be at least 1.")
    if not timeout > 0:
        raise ValueError(f"generator.timeout={timeout} must be more than 0 seconds.")
    if not patience >= 0:
        raise ValueError(f"generator.patience={patience} must be at least 0 seconds.")


def check_transfer(transfer: str, pickled: bool) -> None:
    """Raises ValueError for a way of weights that does not exist, was not allowed, or lacks its package."""
    if transfer not in ("files", "nccl", "ipc"):
        raise ValueError(f"generator.transfer={transfer} does not exist; choose files, nccl or ipc.")
    if transfer == "ipc" and not pickled:
        raise ValueError(
            "generator.transfer=ipc sends pickled handles, and a server that accepts them runs any code that reaches its port; "
            "set generator.allow_pickled_handles=true if nobody else can reach it, or take generator.transfer=nccl or files."
        )
    if transfer != "files" and find_spec("vllm") is None:
        raise ValueError(
            f"generator.transfer={transfer} needs vLLM in the run's own environment too: pip install vllm, or take "
            "generator.transfer=files."
        )
