"""Stopping all ranks after the same step when any of them receives a signal."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.dist.collectives import all_gather_json
from utils.errors import UserError
from utils.signals import StopRequest, end_notices, handle


T = TypeVar("T")


class Dropped(Exception):
    """Work that all ranks gave up together, because of a stop signal or because it failed on one of them."""

    def __init__(self, reason: str, number: signal.Signals | None) -> None:
        super().__init__(reason)
        self.signal = number


class StopSignal:
    """Collective to create, to `poll` and to `close`. Tells all ranks at the same step that one received a stop signal.

    Create it when training begins. From then until the process ends, a stop signal is noted here and does nothing else.
    `poll` starts to reduce the ranks' signals over its own gloo group, and reads the result that the previous poll
    started: it waits for no device, and the answer is ready a step later. `timeout` (seconds) is for the slowest rank.
    """

    def __init__(self, world_size: int, *, timeout: float) -> None:
        self._group: Any = None
        self._timeout = timeout
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._request = StopRequest()
        self._alone = multiprocessing.parent_process() is None and "TORCHELASTIC_RUN_ID" not in os.environ
        self._number = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None
        handle(self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._request.note(number)
        if self._request.at_once and self._alone:
            os._exit(128 + number)

    def poll(self) -> signal.Signals | None:
        """Collective, once per step. The signal to stop for after this step, or None. Do not poll after a signal."""
        if self._group is None:
            return self._request.signal
        self._wait()
        if self._number:
            return signal.Signals(int(self._number))
        self._number.fill_(self._request.signal or 0)
        self._work = dist.all_reduce(self._number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return None

    @property
    def requested(self) -> bool:
        """Whether this rank has received a stop signal, which the others may not know yet."""
        return self._request.signal is not None

    @property
    def patience(self) -> float:
        """Seconds that this rank may wait for its images, twice, before the others miss it in a collective."""
        return math.inf if self._group is None else self._timeout / 3

    def together(self, work: Callable[[], T]) -> T:
        """Collective. What work() returns, if it fails on no rank and no rank has received a stop signal.

        Else raises Dropped on all ranks together. `work` must not call collectives.
        """
        result: Any = None
        failure = None
        try:
            result = work()
        except Exception as error:
            failure = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        own: Any = [self._request.signal, failure]
        answers = [own] if self._group is None else all_gather_json(own, self._number.device, self._group)
        signals, failures = [number for number, _ in answers if number], [text for _, text in answers if text]
        if signals or failures:
            raise Dropped(failures[0] if failures else "", signal.Signals(max(signals)) if signals else None)
        return result

    def close(self) -> None:
        """Collective, when everything is saved. From now on stop signals have no effect: only an orderly end follows."""
        self._alone = False
        for notice in end_notices:
            notice()
        self._wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
