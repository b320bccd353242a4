"""One node of a run of tiny steps, as the tests start it: everything of `launch`, nothing of a model. A process of its own,
because it is to be killed and signalled; it imports little, to start in two seconds.

    python3 tests/node.py --nodes 2 --node 1 --processes 2 --port 29500 [--steps N] [--timeout S] [--silence S] [--fail RANK ...]

Rank 0 prints a line each step, every rank its process number once; "saved" means that a checkpoint would have been written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.distributed as dist

from utils import nodes
from utils.distributed import ProcessPlan, Worker, launch
from utils.errors import UserError, exit_on_user_error
from utils.preemption import EXIT_SAVED, StopSignal


def work(worker: Worker, options: argparse.Namespace) -> int:
    time.sleep(options.prepare)
    stop = StopSignal(worker.world_size, timeout=60)
    print(f"rank {worker.rank} is process {os.getpid()}", flush=True)
    for step in range(1, options.steps + 1):
        dist.all_reduce(torch.ones(2))
        time.sleep(0.02)
        if worker.is_main:
            print(f"step {step}", flush=True)
        if step == 3 and worker.rank == options.fail:
            raise UserError("a bad flag") if options.user else ValueError("a bug")
        stopped_by = stop.poll()
        if stopped_by:
            print(f"rank {worker.rank} saved after {step} for {stopped_by.name}", flush=True)
            stop.close()
            return EXIT_SAVED
    stop.close()
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag, default in (("nodes", 1), ("node", 0), ("processes", 2), ("port", 0), ("steps", 1000)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--silence", type=float, default=nodes.SILENCE_SECONDS)
    parser.add_argument("--prepare", type=float, default=0)
    parser.add_argument("--fail", type=int)
    parser.add_argument("--user", action="store_true")
    options = parser.parse_args()
    nodes.SILENCE_SECONDS = options.silence
    plan = ProcessPlan(
        launcher="spawn", nodes=options.nodes, node_rank=options.node, processes_per_node=options.processes,
        device_type="cpu", gpu=None, backend="gloo", host=options.host, port=options.port, timeout=options.timeout,
    )
    sys.exit(launch(work, plan, options))


if __name__ == "__main__":
    exit_on_user_error(main)
