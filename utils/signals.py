"""Stop signals: SIGINT (Ctrl-C), SIGTERM, SIGHUP (a terminal that closes) and SIGUSR1 ask a run to save and stop.

Before training there is nothing to save, and a stop signal kills a process as the system does by default. From then on

    parent      forwards the first signal to its ranks; a Ctrl-C a second or more later kills them
    rank        notes it (utils.dist.stop.StopSignal); all ranks save after the same step and exit with EXIT_SAVED
    loader      ignores it: its rank ends it

Ranks stay in their parent's process group, so a Ctrl-C in a terminal reaches them twice, from the terminal and from the
parent. So a rank under a parent, or under torchrun, does not count signals.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# The only status after which a batch system's script should start the run again. Success is 0, a failure 1, a user's
# mistake 2, and 128 + signal means that a signal ended the run without a save.
EXIT_SAVED = os.EX_TEMPFAIL  # 75

# What a rank calls when nothing is left to save: from then on a stop signal must not change how the run ends.
end_notices: list[Callable[[], Any]] = []

_TWICE_SECONDS = 1.0  # a batch system may signal the process and its group: signals closer than this are one
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """The first stop signal of this process, and whether Ctrl-C was pressed again."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.at_once = False
        self._time = 0.0

    def note(self, number: int) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._time = signal.Signals(number), now
        self.at_once |= number == signal.SIGINT and now - self._time >= _TWICE_SECONDS


def handle(handler: Any) -> dict[signal.Signals, Any]:
    """Install `handler` for the stop signals, except those that this process was started to ignore (`nohup main.py &`).

    Returns the previous handlers.
    """
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN}


def describe_death(number: int) -> str:
    """The signal that ended a process, and what may have been the reason."""
    hint = {signal.SIGKILL: " (out of memory? see dmesg)",
            signal.SIGBUS: " (was a mapped file truncated, such as the index of the images, or is /dev/shm full?)",
            }.get(signal.Signals(number), "")
    return signal.Signals(number).name + hint


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent`, the process that started it, ends.

    A rank without a parent would race with the job that replaces it. torch's own spawn asks for SIGINT instead, which a
    rank answers by saving.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
