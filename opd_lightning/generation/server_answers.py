"""Answers of vLLM servers: whose weights wrote a completion, and the completion itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from opd_lightning.generation.copying import finished
from opd_lightning.types import Completion
from opd_lightning.utils.errors import RESUME


def stale(answer: Mapping[str, Any], weights: str, url: str) -> str | None:
    """What is wrong with a completion that is not by these weights, or was broken off; None if nothing is.

    Args:
        weights: the version of the last push, <run>-<number>.

    Raises:
        ValueError: the server does not say which weights wrote it, or they are another run's.
    """
    choice = answer["choices"][0]
    if choice["finish_reason"] not in ("stop", "length"):
        return f"it broke a completion off: {choice['finish_reason']}"
    versions = {span["version"] for span in choice.get("weight_versions") or []}
    if not versions:
        raise ValueError(
            f"the server at {url} does not say which weights wrote a completion (weight_versions), so an old one could not be "
            "told from a new one; serve with vLLM 0.32 or newer."
        )
    own = weights.rpartition("-")[0]
    if others := sorted(version for version in versions if version != "default" and version.rpartition("-")[0] != own):
        raise ValueError(
            f"another run has given the server at {url} its weights ({', '.join(others)}); one server serves one run: end the "
            f"other, or give this one a server of its own. {RESUME}."
        )
    return f"it holds the weights {', '.join(versions)}, not {weights}" if versions - {weights} else None


def completion(choice: Mapping[str, Any], ends: Sequence[int], greedy: bool, version: int | None) -> Completion:
    """A completion from a server's answer."""
    logprobs = None if greedy else [float(token["logprob"]) for token in choice["logprobs"]["content"]]
    return finished(list(choice["token_ids"]), choice["finish_reason"], choice["stop_reason"], logprobs, ends, version)
