"""Many nodes: how their parents meet, and that whatever ends one of them ends all, with its cause named everywhere.

The protocol is tested with nodes that are threads; processes of tests/helpers/node.py stand for whole nodes; and main.py trains on
two nodes in network namespaces of their own, where the machine permits that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.commands import ROOT, finish, free_port

from utils.errors import UserError
from utils.launch import fingerprint, multinode
from utils.launch.fingerprint import program_fingerprint
from utils.launch.multinode import Cause, Coordinator, NodeLink, first_cause

FACTS = {"--world-size": 2, "program": "abc"}


@pytest.fixture
def meeting(monkeypatch) -> Iterator[Callable]:
    """`meeting(nodes)`: a coordinator, and a function that makes the link of a node to it."""
    monkeypatch.setattr(multinode, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(multinode, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(multinode, "SILENCE_SECONDS", 1.5)
    coordinators = []

    def make(count: int, timeout: float = 30) -> tuple[Coordinator, Callable[..., NodeLink]]:
        coordinator = Coordinator(port=0, nodes=count, facts=FACTS, store_port=77, timeout=timeout)
        coordinators.append(coordinator)
        return coordinator, lambda node, **facts: NodeLink(
            host="127.0.0.1", port=coordinator.port, node=node, nodes=count, facts={**FACTS, **facts}, timeout=timeout)

    yield make
    for coordinator in coordinators:
        coordinator.close()


def in_threads(*calls: Callable) -> list:
    """What they return, or the UserError that they raise, called at the same time."""
    def outcome(call: Callable):
        try:
            return call()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def met(link: Callable[..., NodeLink], count: int) -> list[NodeLink]:
    links = [link(node) for node in range(count)]
    assert in_threads(*[each.meet for each in links]) == [77] * count
    return links


def error(kind: str, node: int, time: float = 0.0) -> Cause:
    return Cause(kind, f"{kind} on node {node}", node, time)


def test_a_run_that_ends_well_ends_so_on_all_nodes(meeting):
    _, link = meeting(3)
    links = met(link, 3)
    assert in_threads(*[lambda each=each: each.report(None) for each in links]) == [None] * 3
    assert not any(each.alarm for each in links)


def test_nobody_leaves_before_all_are_done(meeting):
    _, link = meeting(2)
    first, second = met(link, 2)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(first.report, None)
        time.sleep(0.5)
        assert not early.done()
        assert second.report(error("crash", 1)) == early.result(5) == error("crash", 1)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_the_cause_is_found_and_told_to_all(meeting):
    """Node 0's ranks fail first, as far as it can tell, because they miss those of node 2, which were killed; node 1's go on."""
    _, link = meeting(3)
    links = met(link, 3)
    reports = [error("lost", 0, time=1), None, error("crash", 2, time=9)]

    def stop(node: int) -> Cause | None:
        if node == 1:
            wait_for(lambda: links[1].alarm)
        return links[node].report(reports[node])

    assert in_threads(*[lambda node=node: stop(node) for node in range(3)]) == [error("crash", 2, time=9)] * 3


def test_causes_have_an_order():
    lost, gone, bug, mistake, crash, stopped = (error(kind, 0) for kind in ("lost", "gone", "error", "user", "crash", "stopped"))
    assert first_cause([lost, gone, bug, mistake, crash, stopped]) == stopped
    assert first_cause([lost, gone, bug, mistake, crash]) == crash
    assert first_cause([lost, gone, bug]) == bug
    assert first_cause([error("error", 0, 2.0), error("error", 1, 1.0)]).node == 1
    assert first_cause([]) is None
    assert (mistake.exit_status, bug.exit_status, Cause("stopped", "", 0, signal=15).exit_status) == (2, 1, 143)


def test_a_parent_that_ends_is_missed_at_once(meeting):
    _, link = meeting(3)
    links = met(link, 3)
    links[2]._connection.socket.shutdown(socket.SHUT_RDWR)
    begun = time.monotonic()
    wait_for(lambda: links[0].alarm and links[1].alarm)
    found = in_threads(lambda: links[0].report(None), lambda: links[1].report(None))
    assert time.monotonic() - begun < 1
    assert [(cause.kind, cause.node) for cause in found] == [("gone", 2)] * 2
    assert "its process has ended" in found[0].message


def test_a_node_that_falls_silent_is_missed(meeting):
    _, link = meeting(2)
    first, second = met(link, 2)
    second._connection.beat = lambda: None
    cause = first.report(None)
    assert cause.node == 1 and "nothing was heard of it for 1.5 s" in cause.message


def test_node_0_that_falls_silent_is_missed(meeting):
    _, link = meeting(2)
    first, second = met(link, 2)
    second._connection.receive = lambda: []  # what node 0 says does not arrive
    wait_for(lambda: second.alarm)
    cause = second.report(None)
    assert cause.node == 0 and "nothing was heard of it for 1.5 s" in cause.message
    assert first.report(None).node == 1


def test_node_0_that_ends_is_named(meeting):
    coordinator, link = meeting(2)
    _, second = met(link, 2)
    for key in coordinator._open():
        key.data.socket.shutdown(socket.SHUT_RDWR)
    cause = second.report(error("lost", 1))
    assert cause.kind == "gone" and "node 0 (127.0.0.1) is gone" in cause.message


def test_who_does_not_come_is_named(meeting, capsys, monkeypatch):
    monkeypatch.setattr(multinode, "WAITING_SECONDS", 0.3)
    _, link = meeting(4, timeout=1)
    answers = in_threads(link(0).meet, link(2).meet)
    assert answers[0] == answers[1] and "nodes 1, 3 of 4 did not come within 1 s (--dist-timeout)" in answers[0]
    assert capsys.readouterr().out.count("waiting for nodes 1, 3 of 4, up to 1 s") == 2


def test_node_0_that_does_not_come_is_named():
    port = free_port()
    with pytest.raises(UserError, match=f"tcp://127.0.0.1:{port}: node 1 did not reach node 0 there within 1 s"):
        NodeLink(host="127.0.0.1", port=port, node=1, nodes=2, facts=FACTS, timeout=1).meet()
    with pytest.raises(UserError, match="no-such-host.invalid:1: node 1 did not reach node 0"):
        NodeLink(host="no-such-host.invalid", port=1, node=1, nodes=2, facts=FACTS, timeout=1).meet()
    with pytest.raises(UserError, match="node 0 cannot reach itself there"):
        NodeLink(host="127.0.0.1", port=port, node=0, nodes=2, facts=FACTS, timeout=1).meet()


def test_two_nodes_with_one_rank_are_named(meeting):
    _, link = meeting(3)
    answers = in_threads(link(0).meet, link(1).meet, link(1).meet)
    assert len(set(answers)) == 1 and "--rank 1 was given to two nodes" in answers[0]
    assert answers[0].count(socket.gethostname()) == 2


def test_other_flags_are_named(meeting):
    _, link = meeting(2)
    answers = in_threads(link(0).meet, link(1, program="xyz").meet)
    assert answers[0] == answers[1] and "program is xyz on node 1" in answers[0] and "and abc on node 0" in answers[0]


def test_a_latecomer_does_not_end_the_run(meeting):
    _, link = meeting(2)
    links = met(link, 2)
    with pytest.raises(UserError, match="--rank 1 was given to two nodes"):
        link(1).meet()
    assert not links[0].alarm
    assert in_threads(*[lambda each=each: each.report(None) for each in links]) == [None, None]


def test_a_node_may_end_and_come_again_while_the_others_wait(meeting):
    _, link = meeting(2)
    early = link(1)
    early._connection = multinode._Connection(early._connect())
    early._connection.send({"hello": {"node": 1, "host": "x", "process": 1, "facts": FACTS}})
    time.sleep(0.3)
    early._connection.socket.close()
    time.sleep(0.3)
    assert in_threads(*[lambda each=each: each.report(None) for each in met(link, 2)]) == [None, None]


@pytest.mark.parametrize("words", [
    b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b'{"hello": 3}\n', b'{"hello": {"node": "x"}}\n', b"[1]\n", b'{"report": {}}\n', b"",
    b'{"hello": {"node": 0, "host": "", "process": 0, "facts": 7}}\n', b"x" * 3_000_000,
])
def test_strangers_do_not_matter(meeting, words):
    coordinator, link = meeting(2)
    with socket.create_connection(("127.0.0.1", coordinator.port)) as stranger, contextlib.suppress(OSError):
        stranger.sendall(words)
        links = met(link, 2)
        stranger.sendall(words)
    assert in_threads(*[lambda each=each: each.report(None) for each in links]) == [None, None]


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match=f"port {taken.getsockname()[1]}"):
        Coordinator(port=taken.getsockname()[1], nodes=2, facts={}, store_port=1, timeout=1)


def test_the_program_is_known_by_its_files(tmp_path, monkeypatch):
    (tmp_path / "utils" / "launch").mkdir(parents=True)
    file = tmp_path / "utils" / "launch" / "fingerprint.py"
    file.write_text("1")
    monkeypatch.setattr(fingerprint, "__file__", str(file))
    first = program_fingerprint()
    (tmp_path / "utils" / "notes.txt").write_text("no matter")
    assert program_fingerprint() == first
    file.write_text("2")
    assert program_fingerprint() != first


# ---------------------------------------------------------------------------------------------------------------------
# Nodes that are processes


class Node:
    """A tests/helpers/node.py, its output read as it comes."""

    def __init__(self, *flags: object, prefix: tuple[str, ...] = ()) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(ROOT / "tests/helpers/node.py"), *map(str, flags)], stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def ranks(self) -> dict[int, int]:
        """rank -> process number, of those that train."""
        words = [line.split() for line in self.lines if " is process " in line]
        return {int(line[1]): int(line[4]) for line in words}

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """(exit status, output)."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end within {timeout} s:\n{''.join(self.lines)}") from None
        self._reader.join(timeout=10)  # until the last rank has closed it too
        return status, "".join(self.lines)


@pytest.fixture
def start_nodes() -> Iterator[Callable[..., list[Node]]]:
    """`start_nodes(count, processes, *flags)`: nodes of so many ranks that have trained for some steps."""
    started: list[Node] = []

    def call(count: int, processes: int, *flags: object) -> list[Node]:
        port = free_port()
        these = [Node("--nodes", count, "--node", node, "--processes", processes, "--port", port, *flags)
                 for node in range(count)]
        started.extend(these)
        wait_for(lambda: "step 5\n" in these[0].lines or any(node.process.poll() is not None for node in these), seconds=120)
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


def test_a_killed_rank_ends_all_nodes_within_seconds(start_nodes):
    these = start_nodes(2, 1)
    os.kill(these[1].ranks()[1], signal.SIGKILL)
    begun = time.monotonic()
    ends = [node.end() for node in these]
    assert time.monotonic() - begun < 30  # 2 on a quiet machine
    for status, output in ends:
        last = output.rstrip().splitlines()[-1]
        assert status == 1 and last.startswith(f"error: rank 1 on node 1 ({socket.gethostname()}, process ") and (
            "was ended by SIGKILL" in last and "all nodes were stopped" in last), output
        assert "Traceback" not in output and "saved" not in output


def test_a_killed_rank_ends_the_one_node(start_nodes):
    (node,) = start_nodes(1, 2)
    os.kill(node.ranks()[1], signal.SIGKILL)
    begun = time.monotonic()
    status, output = node.end()
    assert time.monotonic() - begun < 30
    last = output.rstrip().splitlines()[-1]
    assert status == 1 and last.startswith(f"error: rank 1 (process {node.ranks()[1]}) was ended by SIGKILL"), output
    assert "Traceback" not in output


def test_no_rank_outlives_its_parent_or_saves(start_nodes):
    (node,) = start_nodes(1, 2)
    node.process.kill()
    wait_for(lambda: not any(map(is_running, node.ranks().values())))
    assert "saved" not in "".join(node.lines)


def test_a_killed_parent_ends_its_ranks_and_the_other_nodes(start_nodes):
    these = start_nodes(2, 1)
    these[0].process.kill()
    begun = time.monotonic()
    status, output = these[1].end()
    assert status == 1 and "error: node 0 (127.0.0.1) is gone: its process has ended; all nodes were stopped" in output
    wait_for(lambda: not any(is_running(process) for node in these for process in node.ranks().values()))
    assert time.monotonic() - begun < 30
    assert "saved" not in "".join(these[0].lines) + output


def test_a_signal_to_one_parent_stops_all_nodes_at_the_same_step(start_nodes):
    """As from a batch system that also signals the rank, twice."""
    these = start_nodes(2, 1)
    for _ in range(2):
        for process in (these[1].process.pid, *these[1].ranks().values()):
            os.kill(process, signal.SIGUSR1)
    outputs = [node.end() for node in these]
    assert [status for status, _ in outputs] == [75, 75], outputs
    saved = [line.split() for _, output in outputs for line in output.splitlines() if "saved" in line]
    assert sorted(line[1] for line in saved) == ["0", "1"]
    assert len({line[4] for line in saved}) == 1 and {line[6] for line in saved} == {"SIGUSR1"}


def test_a_signal_to_a_run_that_saves_nothing(start_nodes):
    (node,) = start_nodes(1, 2, "--no-save")
    node.ranks()
    os.kill(node.process.pid, signal.SIGTERM)
    status, output = node.end()
    assert status == 128 + signal.SIGTERM and "error" not in output, output


def test_a_second_ctrl_c_ends_one_node_at_once(start_nodes):
    (node,) = start_nodes(1, 2, "--linger", 100)
    if "SIGINT is ignored" in "".join(node.lines):
        pytest.skip("the tests were started in the background")
    everyone = (node.process.pid, *node.ranks().values())
    for process in everyone:
        os.kill(process, signal.SIGINT)
    wait_for(lambda: sum("saved" in line for line in node.lines) == 2)
    time.sleep(1.2)
    assert node.process.poll() is None
    for process in everyone:
        os.kill(process, signal.SIGINT)
    status, output = node.end(timeout=30)
    assert status == 130 and "stopped at once by a second Ctrl-C" in output and "Traceback" not in output


def test_a_signal_before_training_ends_it_at_once():
    node = Node("--prepare", 100)
    wait_for(lambda: any("prepares" in line for line in node.lines), seconds=120)
    node.process.terminate()
    status, output = node.end(timeout=30)
    assert status == 143 and "stopped by SIGTERM before training began" in output and "Traceback" not in output


FAKE_SLURM = {
    "srun": """echo "$@" > "$FAKE/command"; echo $$ > "$FAKE/pid"; trap 'exit 75' USR1; while :; do sleep 0.05; done""",
    "scancel": """[ "$*" = "--signal=USR1 $((20000 * 3 + 7)).0" ] && kill -USR1 "$(cat "$FAKE/pid")" """,
    "scontrol": """case "$1" in show) printf 'gpu-a\\ngpu-b\\n' ;; requeue) echo "$2" > "$FAKE/requeued" ;; esac""",
}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_script_passes_the_signal_on_and_requeues(tmp_path, number):
    for name, commands in FAKE_SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{commands}\n")
        (tmp_path / name).chmod(0o755)
    process = subprocess.Popen(
        ["bash", "scripts/slurm.sh", "--epochs", "3"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "SLURM_JOB_ID": "60007",
             "SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_JOB_NUM_NODES": "2", "DATA": "faces"},
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    time.sleep(0.2)
    assert not (tmp_path / "requeued").exists()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and (tmp_path / "requeued").read_text() == "60007\n" and "back into the queue" in output
    command = (tmp_path / "command").read_text()
    for words in ("main.py", "faces", "--dist-url tcp://gpu-a:20007", "--world-size 2", "--resume auto --epochs 3"):
        assert words in command


# ---------------------------------------------------------------------------------------------------------------------
# main.py on two nodes, one of which is cut off


class Namespaces:
    """Two network namespaces joined by a cable."""

    hosts = ("10.213.7.1", "10.213.7.2")

    def __init__(self) -> None:
        self._names = [f"arcface-{os.getpid()}-{node}" for node in (0, 1)]
        self._ends = [f"arc{os.getpid() % 10**6}n{node}" for node in (0, 1)]  # 15 characters at most

    def __enter__(self) -> Namespaces:
        try:
            for name in self._names:
                self._ip("netns", "add", name)
            self._ip("link", "add", self._ends[0], "netns", self._names[0], "type", "veth", "peer", "name", self._ends[1],
                     "netns", self._names[1])
            for name, end, host in zip(self._names, self._ends, self.hosts):
                self._ip("-n", name, "addr", "add", f"{host}/24", "dev", end)
                self._ip("-n", name, "link", "set", end, "up")
                self._ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError):
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def prefix(self, node: int) -> tuple[str, ...]:
        return "ip", "netns", "exec", self._names[node]

    def cut(self, process: int) -> None:
        self._ip("-n", self._names[1], "link", "set", self._ends[1], "down")

    def mend(self, process: int) -> None:
        self._ip("-n", self._names[1], "link", "set", self._ends[1], "up")


class Loopback:
    """Without the right to make namespaces: both nodes here, and the one to be cut off is stopped, so that it falls silent."""

    hosts = ("127.0.0.1", "127.0.0.1")

    def prefix(self, node: int) -> tuple[str, ...]:
        return ()

    def cut(self, process: int) -> None:
        os.kill(process, signal.SIGSTOP)

    def mend(self, process: int) -> None:
        os.kill(process, signal.SIGCONT)


@pytest.fixture
def network() -> Iterator[Namespaces | Loopback]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Namespaces())
        except (OSError, subprocess.CalledProcessError):
            made = Loopback()
        yield made


# main.py, with less patience
MAIN = "import sys; from utils.launch import multinode; multinode.SILENCE_SECONDS = 4; import main; main.exit_on_user_error(main.main)"


def test_train_cut_one_node_off_see_the_message_resume(faces, tmp_path, network):
    common = ["--enable-model-parallel", "-a", "mobilefacenet", "--num-classes", "11", "-b", "4", "-j", "0", "-p", "1",
              "--nproc-per-node", "1", "--multiprocessing-distributed", "--world-size", "2", "--output", str(tmp_path)]

    def start_both(*flags: object) -> list[subprocess.Popen]:
        url = f"tcp://{network.hosts[0]}:{free_port()}"
        return [
            subprocess.Popen(
                [*network.prefix(node), sys.executable, "-u", "-c", MAIN, str(faces), *common, "--dist-url", url, "--rank",
                 str(node), *map(str, flags)],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for node in (0, 1)
        ]

    both = start_both("--seed", 1, "--max-steps", 10_000, "--epochs", 10_000)
    head = []
    for line in both[0].stdout:
        head.append(line)
        if " step 8/" in line:  # of six to an epoch: one checkpoint is written
            break
    assert " step 8/" in head[-1], "".join(head)
    network.cut(both[1].pid)
    begun = time.monotonic()
    output = finish(both[0], status=1)
    assert time.monotonic() - begun < 60
    assert f"error: node 1 ({socket.gethostname()}) is gone: nothing was heard of it for 4 s" in output
    if isinstance(network, Loopback):
        network.mend(both[1].pid)  # node 0 has closed the connection meanwhile
    output = finish(both[1], status=1)
    assert f"error: node 0 ({network.hosts[0]}) is gone: " in output and "all nodes were stopped" in output
    network.mend(both[1].pid) if isinstance(network, Namespaces) else None

    step = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    both = start_both("--max-steps", step + 2, "--epochs", 10_000, "--resume", "auto")
    outputs = [finish(node) for node in both]
    assert f"done: {step + 2} steps" in outputs[0] and "going on from" in outputs[0]
