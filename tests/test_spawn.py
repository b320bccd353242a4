"""Starting and stopping ranks: what ends one rank ends all of them, on all nodes, and every node prints the cause.

Processes of tests/helpers/node.py stand for whole nodes.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.commands import ROOT, finish, free_port, start, wait_for

from utils.errors import UserError
from utils.launch import spawn
from utils.launch.plan import ProcessPlan


class Node:
    """A process of tests/helpers/node.py, whose output is read as it comes."""

    def __init__(self, *flags: object) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/helpers/node.py"), *map(str, flags)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def ranks(self) -> dict[int, int]:
        """rank -> process number, of the ranks that train."""
        words = [line.split() for line in self.lines if " is process " in line]
        return {int(line[1]): int(line[4]) for line in words}

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """(exit status, output)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end within {timeout} s:\n{''.join(self.lines)}") from None
        self._reader.join(timeout=10)  # until the last rank has closed the pipe
        return status, "".join(self.lines)


@pytest.fixture
def start_nodes() -> Iterator[Callable[..., list[Node]]]:
    """`start_nodes(count, processes, *flags)`: `count` nodes of `processes` ranks each, which train."""
    started: list[Node] = []

    def call(count: int, processes: int, *flags: object) -> list[Node]:
        port = free_port()
        these = [Node("--nodes", count, "--node", node, "--processes", processes, "--port", port, *flags)
                 for node in range(count)]
        started.extend(these)
        wait_for(lambda: "step 5\n" in these[0].lines or any(node.process.poll() is not None for node in these), 120)
        wait_for(lambda: all(len(node.ranks()) == processes for node in these))
        return these

    yield call
    for node in started:
        node.process.kill()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # a zombie has ended
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_rank_ends_all_nodes_within_seconds(start_nodes):
    these = start_nodes(2, 1)
    os.kill(these[1].ranks()[1], signal.SIGKILL)
    begun = time.monotonic()
    ends = [node.end() for node in these]
    assert time.monotonic() - begun < 30  # 1 on a quiet machine
    for status, output in ends:
        last = output.rstrip().splitlines()[-1]
        for words in (f"rank 1 on node 1 ({socket.gethostname()}, process ", "SIGKILL", "all ranks were stopped"):
            assert words in last, output
        assert status == 1 and "Traceback" not in output and "saved" not in output


@pytest.mark.slow
def test_a_killed_rank_ends_the_one_node(start_nodes):
    (node,) = start_nodes(1, 2)
    os.kill(node.ranks()[1], signal.SIGKILL)
    begun = time.monotonic()
    status, output = node.end()
    assert time.monotonic() - begun < 30
    last = output.rstrip().splitlines()[-1]
    assert status == 1 and f"process {node.ranks()[1]}) was ended by" in last and "SIGKILL" in last, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_no_rank_outlives_its_parent_or_saves(start_nodes):
    (node,) = start_nodes(1, 1)
    node.process.kill()
    wait_for(lambda: not any(map(is_running, node.ranks().values())))
    assert "saved" not in "".join(node.lines)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_parent_ends_its_ranks_and_the_other_nodes(start_nodes, killed):
    these = start_nodes(2, 1)
    these[killed].process.kill()
    begun = time.monotonic()
    status, output = these[1 - killed].end()
    assert status == 1 and re.search(rf"^error: node {killed} .* is gone: .*all ranks were stopped", output, re.M)
    wait_for(lambda: not any(is_running(process) for node in these for process in node.ranks().values()))
    assert time.monotonic() - begun < 30  # 1 (node 0) and 6 on a quiet machine
    assert "saved" not in "".join(these[killed].lines) + output


@pytest.mark.slow
def test_a_signal_to_one_parent_stops_all_nodes_at_the_same_step(start_nodes):
    """A batch system may signal the ranks as well, and twice."""
    these = start_nodes(2, 1)
    for _ in range(2):
        for process in (these[1].process.pid, *these[1].ranks().values()):
            os.kill(process, signal.SIGUSR1)
    outputs = [node.end() for node in these]
    assert [status for status, _ in outputs] == [75, 75], outputs
    saved = [line.split() for _, output in outputs for line in output.splitlines() if "saved" in line]
    assert sorted(line[1] for line in saved) == ["0", "1"]
    assert len({line[4] for line in saved}) == 1 and {line[6] for line in saved} == {"SIGUSR1"}


@pytest.mark.slow
def test_a_signal_to_a_run_that_saves_nothing(start_nodes):
    (node,) = start_nodes(1, 1, "--no-save")
    os.kill(node.process.pid, signal.SIGTERM)
    status, output = node.end()
    assert status == 128 + signal.SIGTERM and "error" not in output, output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_one_node_at_once(start_nodes):
    (node,) = start_nodes(1, 1, "--linger", 100)
    if "SIGINT is ignored" in "".join(node.lines):
        pytest.skip("the tests were started in the background")
    everyone = (node.process.pid, *node.ranks().values())
    for process in everyone:
        os.kill(process, signal.SIGINT)
    wait_for(lambda: any("saved" in line for line in node.lines))
    time.sleep(1.2)
    assert node.process.poll() is None
    for process in everyone:
        os.kill(process, signal.SIGINT)
    status, output = node.end(timeout=30)
    assert status == 130 and "stopped at once by a second Ctrl-C" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_second_ctrl_c_after_the_save_does_not_change_the_status(start_nodes):
    (node,) = start_nodes(1, 2, "--rest", 2.5)
    if "SIGINT is ignored" in "".join(node.lines):
        pytest.skip("the tests were started in the background")
    everyone = (node.process.pid, *node.ranks().values())
    for process in everyone:
        os.kill(process, signal.SIGINT)
    wait_for(lambda: "nothing is left to save\n" in node.lines)
    time.sleep(1.2)
    for process in everyone:
        os.kill(process, signal.SIGINT)
    status, output = node.end(timeout=30)
    assert status == 75 and "stopped at once" not in output, output


@pytest.mark.slow
def test_a_signal_before_training_ends_it_at_once():
    node = Node("--prepare", 100)
    wait_for(lambda: any("prepares" in line for line in node.lines), seconds=120)
    node.process.terminate()
    status, output = node.end(timeout=30)
    assert status == 143 and "stopped by SIGTERM on node 0 before training" in output and "Traceback" not in output


@pytest.mark.slow
def test_an_error_of_a_rank_is_shown_with_its_traceback():
    node = Node("--processes", 2, "--fail", "the reason")
    status, output = node.end()
    assert status == 1 and "Traceback" in output
    assert "RuntimeError: the reason; all ranks were stopped" in output.rstrip().splitlines()[-1]


FAILS_BESIDE_LOADERS = """
import sys
sys.path.insert(0, {root!r})
import functools, os
from torch.utils.data import DataLoader
from data.loader import start_loader_worker
from utils.launch.plan import ProcessPlan
from utils.launch.spawn import launch

def work(context):
    kept.append(iter(DataLoader(range(8), num_workers=2, multiprocessing_context="fork",
                                worker_init_fn=functools.partial(start_loader_worker, os.getpid()))))
    next(kept[0])
    raise RuntimeError("the cause")

kept = []
launch(work, ProcessPlan(launcher="single", nodes=1, node_rank=0, processes_per_node=1, device_type="cpu", gpu=None,
                         backend="gloo", host="127.0.0.1", port=0))
"""


@pytest.mark.slow
def test_a_single_process_that_fails_does_not_wait_for_its_loaders(tmp_path):
    """Loading processes ignore SIGTERM, and Python's exit would wait for them."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS_BESIDE_LOADERS.format(root=str(ROOT)))
    output = finish(start(script), status=1, timeout=120)
    assert output.rstrip().endswith("RuntimeError: the cause"), output


# ---------------------------------------------------------------------------------------------------------------------
# The store

PLAN = ProcessPlan(launcher="spawn", nodes=1, node_rank=0, processes_per_node=2, device_type="cpu", gpu=None,
                   backend="gloo", host="127.0.0.1", port=0)


def reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
        return True
    except OSError:
        return False


def test_the_store_listens_at_the_given_address_only():
    store = spawn._host_store(PLAN)
    assert reaches("127.0.0.1", store.port) and not reaches("127.0.0.2", store.port)


def test_a_name_that_means_the_loopback_only_here_listens_everywhere():
    """/etc/hosts of many machines: their own name is 127.0.1.1, but other nodes know their address."""
    store = spawn._host_store(replace(PLAN, nodes=2, host="localhost"))
    assert reaches("127.0.0.1", store.port) and reaches("127.0.0.2", store.port)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no-such-host.invalid"])
def test_an_address_where_it_cannot_listen_is_named(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--dist-url tcp://{host}:{port}: cannot listen on port {port}.*\("):
            spawn._host_store(replace(PLAN, host=host, port=port))
