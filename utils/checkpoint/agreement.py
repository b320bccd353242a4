"""An error on one rank becomes an error on all ranks, so no rank waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from utils.errors import UserError

T = TypeVar("T")


class RankFailed(Exception):
    """Raised on every rank after an unexpected error on one of them. The message names the cause and the rank."""


def run_together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Collective over the group. Call work() on every rank and return all results, which must be small, in rank order.

    Raises the error of the first rank that failed, on all ranks: UserErrors as they are, others as RankFailed.
    """
    result: T | None = None
    error: Exception | None = None
    own: Exception | None = None
    try:
        result = work()
    except UserError as raised:
        error = raised
    except Exception as raised:
        own, world_size = raised, dist.get_world_size()
        error = RankFailed(_cause(raised) + (f", on rank {dist.get_rank()}" if world_size > 1 else ""))
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (error, result), group=group)
    for problem, _ in outcomes:
        if problem is not None:
            raise problem from own
    return [value for _, value in outcomes]


def _cause(error: Exception) -> str:
    """One line. torch.save turns the system's error, a full disk for example, into one of its own: look behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
