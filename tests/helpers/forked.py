"""Whole runs in forked processes, which start at once: killed runs, and eight processes. Run by test_checkpoint.py:

    python3 tests/helpers/forked.py FACES DIRECTORY KILLS

This is a program of its own because a process that has computed has threads, and cannot be forked. A run is a process
in its own group that holds the lock of --output and waits for its ranks, like main.py. Prints the results as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402, F401 (a save imports it: once here, not in every run)

from helpers.commands import read_metrics  # noqa: E402
from helpers.saved import assert_same_training  # noqa: E402
from helpers.training import train  # noqa: E402
from utils.files import lock_output  # noqa: E402

locks = []


def start(world_size: int, argv: list[str], output: Path) -> int:
    """Start a run of `world_size` ranks. Returns its process ID, which is its process group's, too."""
    store = os.path.join(tempfile.mkdtemp(), "store")
    process = os.fork()
    if process:
        return process
    os.setsid()
    status = 1
    try:
        output.mkdir(exist_ok=True)
        locks.append(lock_output(str(output)))  # held, and inherited by the ranks
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        ranks = [start_rank(rank, world_size, store, [*argv, "--output", str(output)]) for rank in range(world_size)]
        status = max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks)
    finally:
        os._exit(status)


def start_rank(rank: int, world_size: int, store: str, argv: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        train(rank, world_size, argv)
        dist.barrier()
        status = 0
    finally:
        os._exit(status)


def finish(process: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == 0, f"a run ended with status {status}"


def unfinished(output: Path) -> set[tuple[str, int]]:
    """Saves in progress, and the remains of a killed one, which do not change until the next one begins."""
    found = set()
    for path in output.glob("checkpoints/*.part"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def kill_again_and_again(argv: list[str], output: Path, kills: int) -> dict[str, int]:
    """Start the run `kills` times, kill it at random, two of three times inside a save, then let it finish."""
    moments, inside, done = random.Random(0), 0, 0
    for life in range(kills):
        rest = unfinished(output)
        process = start(2, argv, output)
        deadline = time.monotonic() + (60 if life % 3 else moments.uniform(0, 3))
        saves_to_wait_for, saving = moments.randrange(1, 4), False
        while time.monotonic() < deadline and os.waitpid(process, os.WNOHANG) == (0, 0):
            before, saving = saving, bool(unfinished(output) - rest)
            saves_to_wait_for -= saving and not before
            if life % 3 and saves_to_wait_for == 0:
                time.sleep(moments.uniform(0, 0.01))
                break
            time.sleep(0.001)
        else:
            if time.monotonic() < deadline:
                break  # it has finished
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        done, inside = done + 1, inside + bool(unfinished(output) - rest)
    finish(start(2, argv, output))
    return {"kills": done, "inside a save": inside}


def main(faces: str, directory: Path, kills: int) -> None:
    torch.set_num_threads(1)
    argv = [faces, "-b", "12", "-j", "0", "--num-classes", "11", "--enable-model-parallel", "--seed", "1",
            "--epochs", "99", "--max-steps", "40"]
    result = {}
    for name, flags in (("", []), ("sampled ", ["--sample-rate", "0.3", "--loss", "adaface"])):
        finish(start(2, [*argv, *flags], directory / f"{name}whole"))
        result[name] = kill_again_and_again([*argv, *flags, "--save-freq", "1", "--resume", "auto"],
                                            directory / f"{name}killed", kills)
        assert_same_training(directory / f"{name}killed", directory / f"{name}whole")
        killed, whole = ([line["loss"] for line in read_metrics(directory / f"{name}{run}")]
                         for run in ("killed", "whole"))
        assert killed == whole

    argv = [faces, "-b", "24", "-j", "0", "--num-classes", "9", "--sync-bn", "--precision", "float64", "--seed", "3",
            "--epochs", "9", "--enable-model-parallel"]
    finish(start(1, [*argv, "--max-steps", "4"], directory / "one"))
    finish(start(4, [*argv, "--max-steps", "3"], directory / "four"))
    resume = ["--resume", str(directory / "four/checkpoint.pth.tar")]
    finish(start(8, [*argv, *resume, "--enable-zero-optim", "--max-steps", "4"], directory / "eight"))

    assert_same_training(directory / "eight", directory / "one", tolerance=1e-9)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
