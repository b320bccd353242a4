"""Stop signals: all ranks stop after the same step, and signals close to each other count once."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from utils.dist.stop import Dropped, StopSignal
from utils.errors import UserError
from utils.signals import StopRequest, handle


def poll_until_stopped(rank: int, world_size: int, signalled: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Poll until a signal comes. `signalled`: rank -> (step, signal that the rank receives then).

    Returns the step after which `poll` stops, and the signal.
    """
    stop = StopSignal(world_size, timeout=60)
    for step in range(1, 100):
        if rank in signalled and signalled[rank][0] == step:
            os.kill(os.getpid(), signalled[rank][1])
        if rank == 0:
            time.sleep(0.01)  # the other ranks wait only for its answer of the step before
        stopped_by = stop.poll()
        if stopped_by:
            break
    stop.close()
    return step, stopped_by


def test_a_run_under_nohup_keeps_ignoring_sighup():
    before = {number: signal.getsignal(number) for number in handle(signal.SIG_DFL)}
    ours = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in handle(signal.SIG_DFL) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in (before | {signal.SIGHUP: ours}).items():
            signal.signal(number, handler)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_stop_after_the_same_step(pools, world_size):
    last = world_size - 1
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        results = pools(world_size).run(poll_until_stopped, {last: (5, number)})
        assert results == [(5 if world_size == 1 else 6, number)] * world_size  # other ranks know it a step later


def test_two_signals_on_two_ranks_give_one_answer(pools):
    results = pools(2).run(poll_until_stopped, {0: (3, signal.SIGUSR1), 1: (3, signal.SIGTERM)})
    assert results == [(4, signal.SIGTERM)] * 2
    results = pools(2).run(poll_until_stopped, {0: (3, signal.SIGUSR1), 1: (9, signal.SIGTERM)})
    assert results == [(4, signal.SIGUSR1)] * 2


def drop(rank: int, world_size: int, failing: int | None, signalled: int | None) -> tuple[int, str, int | None]:
    """(the pieces of work done, why it was dropped, by which signal): the second piece fails, or meets a signal."""
    stop, done = StopSignal(world_size, timeout=60), 0

    def work() -> int:
        if done == 1 and rank == failing:
            raise UserError("no such image")
        if done == 1 and rank == signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        return done + 1

    try:
        while done < 5:
            done = stop.together(work)
    except Dropped as dropped:
        return done, str(dropped), dropped.signal
    finally:
        stop.close()
    raise AssertionError("not dropped")


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_drop_their_work_together(pools, world_size):
    last = world_size - 1
    assert pools(world_size).run(drop, last, None) == [(1, "no such image", None)] * world_size
    assert pools(world_size).run(drop, None, last) == [(1, "", signal.SIGTERM)] * world_size


def without_waiting(rank: int, world_size: int) -> float:
    """The seconds that rank 1 spends in its first poll, while rank 0 is late."""
    stop = StopSignal(world_size, timeout=60)
    dist.barrier()
    if rank == 0:
        time.sleep(2)
    start = time.perf_counter()
    stop.poll()
    seconds = time.perf_counter() - start
    stop.close()
    return seconds


@pytest.mark.slow
def test_a_poll_does_not_wait_for_the_other_ranks(pools):
    assert pools(2).run(without_waiting)[1] < 1


def test_the_second_ctrl_c_is_the_one_that_comes_later(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    request = StopRequest()
    assert request.signal is None
    request.note(signal.SIGINT)
    assert not request.at_once and request.signal == signal.SIGINT
    now[0] += 0.1  # forwarded, or sent to the whole process group
    request.note(signal.SIGINT)
    now[0] += 1
    request.note(signal.SIGTERM)  # a batch system repeats it, and the save may still succeed
    assert not request.at_once
    request.note(signal.SIGINT)
    assert request.at_once and request.signal == signal.SIGINT
