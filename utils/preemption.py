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
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

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


class StopSignal:
    """Collective to make, to `poll` and to `close`: the first stop signal that any rank gets, known to all at the same step.

    `poll` starts to reduce the ranks' signals over a gloo group of its own and reads what the poll before it started: no
    device is waited for, and the answer lies ready a step later. Made when training begins; from then on, until the
    process ends, signals are noted here and do nothing else.

    Args:
        world_size: ranks in the default group.
        timeout: seconds to wait for the slowest rank.
    """

    def __init__(self, world_size: int, *, timeout: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if world_size > 1 else None
        self._request = StopRequest()
        self._alone = multiprocessing.parent_process() is None and "TORCHELASTIC_RUN_ID" not in os.environ
        self._number = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        handle(self._note)

    def _note(self, number: int, frame: object) -> None:
        if self._request.note(number) and self._alone:
            os._exit(128 + number)

    def poll(self) -> signal.Signals | None:
        """Collective, once per step. The signal to stop for after this step, or None; not to be called again after one."""
        mine = self._request.signal
        if self._group is None:
            return mine
        self._wait()
        if self._number:
            return signal.Signals(int(self._number))
        self._number.fill_(mine or 0)
        self._work = dist.all_reduce(self._number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return None

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def close(self) -> None:
        """Collective. Signals stay harmless: what follows is the orderly end of the process."""
        self._wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)


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
