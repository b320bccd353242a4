"""An error on one rank becomes an error on all ranks, so no rank waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from utils.checkpoint.layout import DamagedCheckpoint
from utils.checkpoint.safe_load import first_words
from utils.dist.collectives import all_gather_json
from utils.errors import UserError


class RankFailed(Exception):
    """Raised on every rank after an unexpected error on one of them. The message names the cause and the rank."""


_KINDS = {kind.__name__: kind for kind in (UserError, DamagedCheckpoint, RankFailed)}


def run_together(work: Callable[[], Any], device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collective over the group. Call work() on every rank; returns all results, small values of JSON, in rank order.

    Raises the error of the first rank that failed, on all ranks: UserErrors as they are, others as RankFailed.
    """
    result: Any = None
    kind, message, own = "", "", None
    try:
        result = work()
    except UserError as error:
        kind, message = type(error).__name__, str(error)
    except Exception as error:
        own, kind, message = error, RankFailed.__name__, f"{_cause(error)}, on rank {dist.get_rank()}"
    outcomes = all_gather_json([kind, message, result], device, group)
    for kind, message, _ in outcomes:
        if kind:
            raise _KINDS.get(kind, UserError)(message) from own
    return [result for *_, result in outcomes]


def _cause(error: Exception) -> str:
    """One line. torch.save turns the system's error, a full disk for example, into one of its own: look behind it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {first_words(error)}"
