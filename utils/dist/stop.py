"""Stopping all ranks at the same step when any of them gets a signal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import torch
import torch.distributed as dist
from datetime import timedelta
from utils.signals import handle, StopRequest


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
