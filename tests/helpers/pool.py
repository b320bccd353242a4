"""Persistent pools of gloo processes, one pool per world size, so that a distributed test starts no process.

`run(function, *args)` calls `function(rank, world_size, *args)` in every process and returns the list of results. The
function is sent by name: it must be a module-level function of a module in tests/.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 900.0


class Pool:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list = []
        self._pipes: list = []

    def run(self, function: Callable, *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise TimeoutError(f"{function.__name__}: no answer within {TIMEOUT} s at world size {self.world_size}")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    succeeded, results[rank] = pipe.recv()
                except EOFError:
                    succeeded, results[rank] = False, "the process died"
                if not succeeded:
                    # The others may wait for this rank in a collective: kill them all. The next test gets a new pool.
                    message = results[rank]
                    self.close()
                    raise AssertionError(f"rank {rank} of {self.world_size}:\n{message}")
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="arcface-pool-")
        store = os.path.join(self._directory.name, "store")
        for rank in range(self.world_size):
            pipe, far_end = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, far_end), daemon=True)
            process.start()
            far_end.close()
            self._processes.append(process)
            self._pipes.append(pipe)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            self._directory.cleanup()
        self._processes, self._pipes = [], []


def _serve(rank: int, world_size: int, store: str, pipe: multiprocessing.connection.Connection) -> None:
    tests = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests), str(tests.parent)]
    import torch  # here: the parent does not need it to start the processes
    import torch.distributed as dist

    torch.set_num_threads(1)  # the tests themselves run in several processes
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(rank, world_size, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
