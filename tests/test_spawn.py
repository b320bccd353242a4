"""Starting and stopping ranks: what ends one rank ends all of them, on all nodes, and every node prints the cause.

Processes of tests/helpers/node.py stand for whole nodes.
"""

from __future__ import annotations

import errno
import json
import multiprocessing as mp
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from helpers.commands import ROOT, finish, free_port, start, wait_for

from utils.errors import UserError
from utils.launch import rank, secret, spawn
from utils.launch.plan import ProcessPlan
from utils.signals import StopRequest


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
@pytest.mark.parametrize("where", ["sharded", "save"])
def test_a_rank_that_stands_still_ends_the_run_after_the_timeout(where):
    """In every group: torchshard's, and while the others wait for a save, which may itself take longer."""
    node = Node("--processes", 2, "--stand-still", where, "--timeout", 4)
    begun = time.monotonic()
    status, output = node.end(60)
    assert status == 1 and "another rank did not answer within 4 s" in output.splitlines()[-1], output
    assert time.monotonic() - begun < 45


def test_ranks_that_were_started_end_if_another_cannot_be(monkeypatch):
    started = []

    class Process:
        pid = 1

        def __init__(self, **arguments):
            self.killed = False

        def start(self):
            if started:
                raise OSError(11, "Resource temporarily unavailable")
            started.append(self)

        def kill(self):
            self.killed = True

    context = type("Context", (), {"Pipe": lambda self, duplex: mp.Pipe(duplex), "Process": Process})
    monkeypatch.setattr(spawn.mp, "get_context", lambda kind: context())
    with pytest.raises(UserError, match="process 2 of 3 .*Resource temporarily unavailable"):
        spawn._start(print, ProcessPlan("spawn", 1, 0, 3, "cpu", None, "gloo", "127.0.0.1", 0), (), mp.Pipe()[1])
    assert [process.killed for process in started] == [True]


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
# Why a rank failed


@pytest.mark.parametrize("letter", ["x", "\0", "\x1b", "é", "\udcff", "\U0001f600"])
@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_a_report_fits_into_a_pipe(kind, letter):
    """The parent reads it when the rank has ended: a rank that waits until it is read never ends."""
    report = rank._describe_failure(kind(letter * 10**6))
    assert len(report) < 2**16 and json.loads(report)["message"]


def test_a_rank_that_waits_in_vain_says_so_in_plain_words():
    error = RuntimeError("[/src/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 12000ms for recv operation "
                         "to complete")
    report = json.loads(rank._describe_failure(error))
    assert report["message"].startswith("another rank did not answer within 12 s (see --dist-timeout)")
    assert report["kind"] == "lost" and "unbound_buffer" in report["traceback"]


def test_a_rank_that_touches_a_truncated_file_is_explained():
    reader, writer = mp.Pipe(duplex=False)
    writer.close()
    cause = spawn._explain(-signal.SIGBUS, reader, "rank 0", PLAN, StopRequest())
    assert "rank 0 was ended by SIGBUS" in cause.message and "truncated" in cause.message


class Changed:
    """Training data that have changed when a rank receives them."""

    def __setstate__(self, state: object) -> None:
        raise UserError("DIR: has changed since this run started; start it again")

    def __getstate__(self) -> dict[str, int]:
        return {"number": 1}


def test_what_a_rank_cannot_receive_is_one_line():
    task = pickle.loads(pickle.dumps(spawn._Task(print, PLAN, (Changed(),))))
    reader, writer = mp.Pipe(duplex=False)
    process = mp.get_context("fork").Process(
        target=rank.run_child, args=(0, task, os.getpid(), writer, mp.Pipe()[1]))
    process.start()
    process.join(60)
    assert process.exitcode == 1
    cause = spawn._explain(1, reader, "rank 0", PLAN, StopRequest())
    assert (cause.kind, cause.message) == ("user", "DIR: has changed since this run started; start it again")


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


def test_an_address_that_only_leads_to_this_machine_listens_everywhere():
    """As behind NAT. With one node nobody else has to come, so there it is a mistake (see below)."""
    store = spawn._host_store(replace(PLAN, nodes=2, host="192.0.2.1"))
    assert reaches("127.0.0.1", store.port) and reaches("127.0.0.2", store.port)


def test_idle_connections_of_strangers_do_not_keep_the_processes_out():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    strangers: list[socket.socket] = []
    try:
        store = spawn._host_store(PLAN)
        while len(strangers) < 400:
            strangers.append(socket.create_connection(("127.0.0.1", store.port), timeout=5))
        client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        client.set("key", "value")
        assert store.get("key") == b"value"
    finally:
        for stranger in strangers:
            stranger.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_run_of_one_node_draws_a_secret(monkeypatch):
    monkeypatch.setenv(secret.VARIABLE, "")
    secret.draw_secret()
    drawn = secret.read_secret()
    assert len(drawn) == 64
    secret.draw_secret()
    assert secret.read_secret() == drawn  # one that was given stays


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1", "no-such-host.invalid"])
def test_an_address_where_it_cannot_listen_is_named(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--dist-url tcp://{host}:{port}: cannot listen on port {port}.*\("):
            spawn._host_store(replace(PLAN, host=host, port=port))


@pytest.mark.parametrize("number, remedy", [(errno.EACCES, "below 1024 are for root"), (errno.EADDRINUSE, "0 for any")])
def test_a_port_that_it_cannot_have(monkeypatch, number, remedy):
    monkeypatch.setattr(socket, "create_server", mock.Mock(side_effect=OSError(number, os.strerror(number))))
    with pytest.raises(UserError, match=f"--dist-url tcp://127.0.0.1:80: cannot listen on port 80 .*{remedy}"):
        spawn._host_store(replace(PLAN, host="127.0.0.1", port=80))
