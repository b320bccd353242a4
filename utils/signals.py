"""Stopping early: signals, and how the processes of a run answer them.

SIGINT (Ctrl-C), SIGTERM and SIGUSR1 ask a run to stop. Until training begins there is nothing to save, and a signal ends
a process as the system does by default, at once. From then on

    parent      forwards the first signal to its ranks; a Ctrl-C a second or more later ends them at once
    rank        notes it (StopSignal); all ranks of all nodes agree on the step to stop at, save, and exit with EXIT_SAVED
    loader      ignores it: the rank that it reads for ends it

Ranks stay in their parent's process group, so that Ctrl-C in a terminal reaches them twice, directly and forwarded: a rank
under a parent (or under torchrun) does not count, it only notes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


# What a batch system's script starts again, and nothing else: success is 0, a user's mistake 2, a failure 1, and a process
# that a signal ended without saving has 128 + signal.
EXIT_SAVED = os.EX_TEMPFAIL  # 75


# Signals that are closer together are one: a batch system may signal the process and its group.
_TWICE_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """The first stop signal of this process, and whether Ctrl-C came again; what a handler of signals needs to know."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._time = 0.0

    def note(self, number: int) -> bool:
        """True if this one means: at once."""
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._time = signal.Signals(number), now
            return False
        return number == signal.SIGINT and now - self._time >= _TWICE_SECONDS


def handle(handler: object) -> dict[int, object]:
    """`signal.signal` for the stop signals, but for those that this process was started to ignore (`nohup main.py &`).

    Returns the handlers before, for `restore`.
    """
    return {
        number: signal.signal(number, handler)
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }


def restore(handlers: dict[int, object]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_with_parent(parent: int) -> None:
    """From now on this process ends, without saving, when `parent`, the process that started it, does.

    A rank that went on without its parent would race with the job that takes its place. (torch asks for SIGINT, which is
    noted here and would make it save.)
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
