"""One node of a run of tiny steps: all of `launch`, no model. Tests start it as a process, to kill and to signal it.

It imports little, so that it starts in two seconds.

    python3 tests/helpers/node.py --nodes 2 --node 1 --port 29500

"saved" in the output means that a checkpoint would have been written.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import torch
import torch.distributed as dist

from utils.checkpoint.writer import CheckpointWriter
from utils.dist.context import DistContext
from utils.dist.sharding import init_model_parallel
from utils.dist.stop import StopSignal
from utils.errors import exit_on_user_error
from utils.launch.plan import ProcessPlan
from utils.launch.spawn import launch
from utils.signals import EXIT_SAVED


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # in one piece: other ranks write too


def work(context: DistContext, options: argparse.Namespace) -> int:
    say(f"rank {context.rank} prepares")
    time.sleep(options.prepare)
    if options.stand_still:
        stand_still(context, options.stand_still)
    stop = StopSignal(context.world_size, timeout=60)
    say(f"rank {context.rank} is process {os.getpid()}")
    for step in range(1, options.steps + 1):
        if options.fail and context.rank == context.world_size - 1:
            raise RuntimeError(options.fail)
        dist.all_reduce(torch.ones(2))
        time.sleep(0.02)
        if context.is_main:
            say(f"step {step}")
        stopped_by = stop.poll()
        if stopped_by:
            say(f"rank {context.rank} saved after {step} for {stopped_by.name}")
            time.sleep(options.linger)
            stop.close()
            if options.rest:
                say("nothing is left to save")
                time.sleep(options.rest)
            return 128 + stopped_by if options.no_save else EXIT_SAVED
    stop.close()
    return 0


def stand_still(context: DistContext, where: str) -> None:
    """The last rank stops while the others wait for it: in torchshard's group, or for a save in progress."""
    group = init_model_parallel(context.world_size)
    writer = CheckpointWriter(context, ".", options={}, say=say)
    writer._thread = threading.Thread(target=lambda: time.sleep(1000), daemon=True)
    writer._thread.start()
    dist.barrier()
    if context.rank == context.world_size - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    writer.wait() if where == "save" else dist.all_reduce(torch.ones(2), group=group)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--prepare", type=float, default=0, help="seconds before training begins")
    parser.add_argument("--linger", type=float, default=0, help="seconds that a save takes")
    parser.add_argument("--rest", type=float, default=0, help="seconds from the end of the save to that of the rank")
    parser.add_argument("--fail", default="", help="the error that the last rank raises")
    parser.add_argument("--no-save", action="store_true", help="as in main.py: the exit status is 128 + signal")
    parser.add_argument("--stand-still", choices=("sharded", "save"), help="where the last rank stops (SIGSTOP)")
    parser.add_argument("--timeout", type=float, default=1800)
    options = parser.parse_args()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        say("SIGINT is ignored")
    plan = ProcessPlan(
        launcher="spawn", nodes=options.nodes, node_rank=options.node, processes_per_node=options.processes,
        device_type="cpu", gpu=None, backend="gloo", host="127.0.0.1", port=options.port, timeout=options.timeout,
    )
    sys.exit(launch(work, plan, options))


if __name__ == "__main__":
    exit_on_user_error(main)
