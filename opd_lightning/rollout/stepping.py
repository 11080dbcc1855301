"""Stepping: calls of the environments of a batch; what they return is checked, and one that fails is a `Failed` alone."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from opd_lightning.contracts import Environment
from opd_lightning.types import Example, Messages, Verdict
from opd_lightning.utils.threads import Failed, call_all, failure

log = logging.getLogger(__name__)

Answer = tuple[Messages, Verdict | None]


def begun(environments: Sequence[Environment], examples: Sequence[Example]) -> list[Messages | Failed]:
    """The first messages of each environment."""
    calls = [partial(one.reset, example) for one, example in zip(environments, examples, strict=True)]
    return [tried(partial(checked_turns, found)) for found in side_by_side(environments, calls)]


def stepped(environments: Sequence[Environment], replies: Sequence[str], seed: int) -> list[Answer | Failed]:
    """The results of one step of each environment, at once where they can step together."""
    together = getattr(environments[0], "step_all", None) if environments else None
    if together is None:
        calls = [partial(one.step, text) for one, text in zip(environments, replies, strict=True)]
        found = side_by_side(environments, calls)
    else:
        found = tried(lambda: list(zip(together(environments, replies, seed), environments, strict=True)))
        found = [found] * len(environments) if isinstance(found, Failed) else [answer for answer, _ in found]
    return [tried(partial(checked_answer, answer)) for answer in found]


def judged(environment: Environment, reply: str) -> Verdict | Failed | None:
    """The environment's verdict on an episode that has ended; None without one."""
    judge = getattr(environment, "verdict", None)
    return None if judge is None else tried(lambda: checked_verdict(judge(reply)))


def closed(environments: Sequence[Environment]) -> None:
    """Close the environments that can be closed; one that fails is warned of."""
    for close in (close for one in environments if (close := getattr(one, "close", None)) is not None):
        if isinstance(found := tried(close), Failed):
            log.warning(f"warning: an environment could not be closed: {found.text}")


def tried(call: Callable[[], Any]) -> Any:
    """The result of a call of a user's program; a `Failed` where it raises."""
    try:
        return call()
    except Exception as error:
        return Failed(failure(error))


def side_by_side(environments: Sequence[Environment], calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of one call for each environment; those of threaded ones run at once."""
    if environments and getattr(environments[0], "threaded", False):
        return call_all(calls, getattr(environments[0], "step_seconds", None))
    return [tried(call) for call in calls]


def checked_answer(answer: Any) -> Any:
    """The result of a step, or its failure; raises ValueError if it is no pair of turns and a verdict."""
    if isinstance(answer, Failed):
        return answer
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(f"step returned {shown(answer)}, not a pair of messages and a verdict")
    return checked_turns(answer[0]), checked_verdict(answer[1])


def checked_turns(turns: Any) -> Any:
    """Turns whose texts can be tokenized, or their failure; raises ValueError if they are none."""
    if isinstance(turns, Failed):
        return turns
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"the environment gave {shown(turns)}, not a list of turns {{'role': ..., 'content': ...}}")
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"the environment gave the turn {shown(turn)}, not {{'role': ..., 'content': ...}}")
    # Half of a surrogate pair, as in damaged UTF-8, is no text for a tokenizer.
    return [{**turn, "content": turn["content"].encode("utf-8", "replace").decode()} for turn in turns]


def checked_verdict(verdict: Any) -> Verdict | None:
    """A verdict, or None; raises ValueError if it is neither, or its score is not in [0, 1]."""
    if verdict is None:
        return None
    if not isinstance(verdict, Verdict):
        raise ValueError(f"the environment gave the verdict {shown(verdict)}, not a Verdict or None")
    if not (math.isfinite(verdict.content) and 0.0 <= verdict.content <= 1.0):
        raise ValueError(f"the environment gave a verdict of {verdict.content}; scores lie in [0, 1]")
    return verdict


def shown(value: Any) -> str:
    """The begin of a value, for errors."""
    return repr(value)[:80]
