"""Why a run ended early, and how every node prints it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

# Of several causes the first kind in this order is the root cause. "gone": a node that died or fell silent.
# "lost": a rank whose connection to another rank broke.
KINDS = ("stopped", "crash", "user", "error", "gone", "lost")


@dataclass(frozen=True)
class Cause:
    """Why a run ended early."""

    kind: str  # one of KINDS
    message: str  # with several nodes it names the node
    node: int
    time: float = 0.0  # of two causes of one kind the earlier one is the root cause
    traceback: str = ""
    signal: int = 0  # of "stopped"

    @property
    def exit_status(self) -> int:
        return {"stopped": 128 + self.signal, "user": 2}.get(self.kind, 1)


def first_cause(causes: list[Cause]) -> Cause | None:
    """The root cause. None if there are no causes."""
    return min(causes, key=lambda cause: (KINDS.index(cause.kind), cause.time), default=None)


def show(cause: Cause, node: int, nodes: int) -> None:
    """Print the cause on stderr, as the last words of a run on this node."""
    if cause.kind == "stopped":
        print(cause.message, file=sys.stderr, flush=True)
    elif cause.kind == "user":
        elsewhere = f"node {cause.node}: " if cause.node != node else ""
        print(f"error: {elsewhere}{cause.message}", file=sys.stderr, flush=True)
    else:
        if cause.node == node:
            print(cause.traceback, end="", file=sys.stderr)
        stopped = "all nodes were stopped" if nodes > 1 else "all ranks of this node were stopped"
        print(f"error: {cause.message}; {stopped}", file=sys.stderr, flush=True)
