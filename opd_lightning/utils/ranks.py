"""Ranks: what one process of a run does for all of them."""

from collections.abc import Callable
from typing import Any

from torch import distributed


def rank() -> int:
    """This process's rank; 0 where the run has one process."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size() -> int:
    """The number of the run's processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        distributed.barrier()


def of_all_ranks(value: Any) -> list[Any]:
    """The value of each rank."""
    values = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def on_first_rank(action: Callable[[], Any]) -> Any:
    """The result of an action that rank 0 alone takes, or its error, on every rank."""
    if world_size() == 1:
        return action()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = action()
        except Exception as error:
            box[1] = error
    distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
