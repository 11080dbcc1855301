"""Credit: which rewards of an episode each of its replies answers for.

Each function maps the verdicts [B] on episodes and the rewards [B, T] of their replies to returns [B, T], or [B, 1] where they
are those of all replies. Advantages compare the returns of the same reply in the episodes of a prompt; behind its end
an episode has the return 0.
"""

from collections.abc import Callable

from torch import Tensor


def episode(verdicts: Tensor, rewards: Tensor) -> Tensor:
    """The verdict on the whole episode, for each reply (GRPO on conversations, as verl and prime-rl have it)."""
    return verdicts[:, None]


def turn(verdicts: Tensor, rewards: Tensor) -> Tensor:
    """The reply's own reward (turn-level advantages, arXiv 2505.11821)."""
    return rewards


def return_to_go(verdicts: Tensor, rewards: Tensor) -> Tensor:
    """The sum of the reply's own reward and those behind it: what a reply can still change (REINFORCE, Williams 1992)."""
    return rewards.flip(1).cumsum(1).flip(1)


CREDITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"episode": episode, "turn": turn, "return_to_go": return_to_go}
