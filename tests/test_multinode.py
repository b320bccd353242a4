"""How nodes meet and watch one another: first with threads as nodes, then main.py on two nodes with a cut network."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from helpers.commands import ROOT, finish, free_port, wait_for

from utils.errors import UserError
from utils.launch import multinode, secret
from utils.launch.multinode import Cause, NodeLink, Record, State, first_cause
from utils.launch.secret import SignedStore

FACTS = {"--world-size": 2, "program": "abc"}


class Network:
    """What lies between a node and node 0: it passes bytes on until it is cut, or node 0 ends."""

    def __init__(self, port: int) -> None:
        self._passes = threading.Event()
        self._passes.set()
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self._sockets[0].getsockname()[1]
        self._target = port
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._sockets[0].accept()[0], socket.create_connection(("127.0.0.1", self._target))
                self._sockets += near, far
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._passes.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        self._passes.clear()

    def end(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Meeting:
    """Node 0's store, and the links of the nodes to it."""

    def __init__(self, count: int, timeout: float) -> None:
        self.count, self._timeout = count, timeout
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.network = Network(self.store.port)
        self.links: list[NodeLink] = []

    def link(self, node: int, *, through_network: bool = False, secret: bytes = b"", **facts: object) -> NodeLink:
        port = self.network.port if through_network else self.store.port
        self.links.append(NodeLink(("127.0.0.1", port), node=node, nodes=self.count, facts={**FACTS, **facts},
                                   timeout=self._timeout, store=None if node else self.store, secret=secret))
        return self.links[-1]

    def meet(self, through_network: tuple[int, ...] = ()) -> list[NodeLink]:
        """The links of all nodes, after they have met."""
        links = [self.link(node, through_network=node in through_network) for node in range(self.count)]
        assert in_threads(*[link.meet for link in links]) == [None] * self.count
        return links


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Meeting]]:
    monkeypatch.setattr(multinode, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(multinode, "ABSENT_SECONDS", 1.0)
    monkeypatch.setattr(multinode, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(multinode, "SILENCE_SECONDS", 2.0)
    made: list[Meeting] = []

    def make(count: int, timeout: float = 30) -> Meeting:
        made.append(Meeting(count, timeout))
        return made[-1]

    yield make
    for each in made:
        for link in each.links:
            link.close()
        each.network.end()


def in_threads(*calls: Callable) -> list:
    """What they return, or the message of the UserError that they raise, called at the same time."""
    def outcome(call: Callable) -> object:
        try:
            return call()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def report_all(links: list[NodeLink], *reports: Cause | None) -> list[Cause | None]:
    return in_threads(*[lambda link=link, report=report: link.report(report) for link, report in zip(links, reports)])


def error(kind: str, node: int, time: float = 0.0) -> Cause:
    return Cause(kind, f"{kind} on node {node}", node, time)


def test_success_is_success_on_all_nodes(meeting):
    links = meeting(3).meet()
    assert report_all(links, None, None, None) == [None] * 3
    assert not any(link.alarm for link in links)


def test_no_node_leaves_before_all_have_reported(meeting):
    first, second = meeting(2).meet()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(first.report, None)
        time.sleep(0.5)
        assert not early.done()
        assert second.report(error("crash", 1)) == early.result(5) == error("crash", 1)


def test_all_nodes_learn_the_root_cause(meeting):
    """Node 0's ranks fail first, because they lose those of node 2, which were killed. Node 1 stops its ranks."""
    links = meeting(3).meet()

    def stop(node: int, report: Cause | None) -> Cause | None:
        if node == 1:
            wait_for(lambda: links[1].alarm)
        return links[node].report(report)

    reports = [error("lost", 0, time=1), None, Cause("crash", "killed", 2, time=9, traceback="é" * 100_000)]
    assert in_threads(*[lambda node=node: stop(node, reports[node]) for node in range(3)]) == [reports[2]] * 3


def test_causes_have_an_order():
    lost, gone, bug, mistake, crash, stopped = (
        error(kind, 0) for kind in ("lost", "gone", "error", "user", "crash", "stopped"))
    assert first_cause([lost, gone, bug, mistake, crash, stopped]) == stopped
    assert first_cause([lost, gone, bug, mistake, crash]) == crash
    assert first_cause([lost, gone, bug]) == bug
    assert first_cause([error("error", 0, 2.0), error("error", 1, 1.0)]).node == 1
    assert first_cause([]) is None
    assert (mistake.exit_status, bug.exit_status, Cause("stopped", "", 0, signal=15).exit_status) == (2, 1, 143)


@pytest.mark.slow
def test_a_parent_that_ends_is_named(meeting):
    links = meeting(3).meet()
    links[2].close()
    wait_for(lambda: links[0].alarm and links[1].alarm)
    found = report_all(links[:2], None, None)
    assert [(cause.kind, cause.node) for cause in found] == [("gone", 2)] * 2


def test_a_parent_that_ends_is_named_sooner_after_a_failure(meeting, monkeypatch):
    """The ranks of the other nodes miss its ranks at once."""
    monkeypatch.setattr(multinode, "SILENCE_SECONDS", 1000)
    links = meeting(2).meet()
    links[1].close()
    cause = links[0].report(error("lost", 0))
    assert (cause.kind, cause.node) == ("gone", 1) and "no sign of life for " in cause.message


@pytest.mark.slow
def test_a_cut_network_is_noticed_on_both_sides(meeting):
    both = meeting(2)
    first, second = both.meet(through_network=(1,))
    both.network.cut()
    begun = time.monotonic()
    wait_for(lambda: first.alarm and second.alarm)
    assert time.monotonic() - begun < 10  # 2 on a quiet machine
    for cause, node in zip(report_all([first, second], None, None), (1, 0)):
        assert (cause.kind, cause.node) == ("gone", node) and "no sign of life for " in cause.message


def test_node_0_that_ends_is_named(meeting):
    both = meeting(2)
    _, second = both.meet(through_network=(1,))
    both.network.end()
    cause = second.report(error("lost", 1))
    assert cause.kind == "gone" and "node 0 (127.0.0.1) is gone: its process has ended" in cause.message


@pytest.mark.slow
def test_nodes_that_do_not_come_are_named(meeting, capsys, monkeypatch):
    monkeypatch.setattr(multinode, "WAITING_SECONDS", 0.3)
    four = meeting(4, timeout=2)
    answers = in_threads(four.link(0).meet, four.link(2).meet)
    assert answers[0] == answers[1] and "nodes 1, 3 of 4 did not come within 2 s (--dist-timeout)" in answers[0]
    assert capsys.readouterr().out.count("waiting for nodes 1, 3 of 4, up to 2 s") == 2


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_node_0_that_does_not_come_is_named(host):
    port = free_port()
    link = NodeLink((host, port), node=1, nodes=2, facts=FACTS, timeout=1)
    with pytest.raises(UserError, match=f"tcp://{host}:{port}: node 1 .*(refused|not known|resolution)"):
        link.meet()
    link.close()


def test_a_program_that_never_answers_is_not_node_0():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        link = NodeLink(("127.0.0.1", port), node=1, nodes=2, facts=FACTS, timeout=1)
        with pytest.raises(UserError, match=f"tcp://127.0.0.1:{port}: node 1 did not reach node 0 .*no answer"):
            link.meet()
        link.close()


def test_two_nodes_with_one_rank_are_named(meeting):
    three = meeting(3)
    answers = in_threads(three.link(0).meet, three.link(1).meet, three.link(1).meet)
    assert len(set(answers)) == 1 and "--rank 1 was given to two nodes" in answers[0]
    assert answers[0].count(socket.gethostname()) == 2


@pytest.mark.parametrize("node", [1, 5])
def test_other_flags_are_named(meeting, node):
    both = meeting(2)
    answers = in_threads(both.link(0).meet, both.link(node, program="xyz").meet)
    assert answers[0] == answers[1] and f"program is xyz on node {node}" in answers[0] and "abc on node 0" in answers[0]


def test_a_latecomer_does_not_end_the_run(meeting):
    both = meeting(2)
    links = both.meet()
    with pytest.raises(UserError, match="--rank 1 was given to two nodes"):
        both.link(1).meet()
    assert not links[0].alarm
    assert report_all(links, None, None) == [None, None]


@pytest.mark.slow
def test_a_node_may_start_again_while_the_others_wait(meeting):
    three = meeting(3)
    first, early = three.link(0), three.link(1)
    wait_for(lambda: early._state.missing == "node 2 of 3")
    early.close()
    wait_for(lambda: first._state.missing == "nodes 1, 2 of 3")
    links = [first, three.link(1), three.link(2)]
    assert in_threads(*[link.meet for link in links]) == [None] * 3
    assert report_all(links, None, None, None) == [None] * 3


def test_node_0_may_start_again_while_the_others_wait(meeting):
    first, second = meeting(3), meeting(3)
    first.link(0)
    early = first.link(1, through_network=True)
    wait_for(lambda: early._state.missing == "node 2 of 3")
    early._address = "127.0.0.1", second.store.port
    first.network.end()
    links = [second.link(0), early, second.link(2)]
    assert in_threads(*[link.meet for link in links]) == [None] * 3
    assert report_all(links, None, None, None) == [None] * 3


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"[1]\n", b"", b"x" * 3_000_000])
def test_junk_does_not_end_the_run(meeting, junk):
    both = meeting(2)
    with socket.create_connection(("127.0.0.1", both.store.port)) as stranger:
        with contextlib.suppress(OSError):  # the store hangs up
            stranger.sendall(junk)
        links = both.meet()
        with contextlib.suppress(OSError):
            stranger.sendall(junk)
    assert report_all(links, None, None) == [None, None]


WRITTEN_BY_STRANGERS = ["", "x", "[" * 100_000, "Infinity", "9" * 5_000_000, json.dumps({"program": "abc"}),
                        json.dumps(State("ended", cause=Cause("stopped", "forged", 0, signal=15))),
                        json.dumps(Record("here", math.inf, reported=True, cause=Cause("crash", "forged", 1)))]


@pytest.mark.parametrize("stranger", [b"", b"another"])
def test_what_strangers_write_is_ignored(meeting, stranger):
    """They find the names of all keys, write to them and delete them, before the start and after it."""
    both = meeting(2)
    store = dist.TCPStore("127.0.0.1", both.store.port, is_master=False)
    own = SignedStore(store, stranger)
    links = [both.link(0, secret=b"secret")]

    def attack() -> None:
        for text in WRITTEN_BY_STRANGERS:
            for key in [*store.list_keys(), "state", "refusal", "node/1", "node/99"]:
                store.set(key, text)
            for key, value in (("state", State("ended")), ("refusal", "forged"), ("node/1", Record("here", 0.0))):
                own.set(key, value)
                for found in store.list_keys():
                    if found.endswith(key):  # the run's own key; its signature is unknown
                        store.set(found, own._signed(key, value))
            time.sleep(0.1)
        for key in store.list_keys():
            store.delete_key(key)

    attack()
    links.append(both.link(1, secret=b"secret"))
    assert in_threads(*[link.meet for link in links]) == [None, None]
    attack()
    time.sleep(0.3)
    assert not any(link.alarm for link in links)
    assert report_all(links, None, error("crash", 1)) == [error("crash", 1)] * 2


def test_malformed_records_do_not_end_a_run_without_a_secret(meeting):
    """Then anyone can sign. What has another form is still ignored."""
    both = meeting(2)
    links = both.meet()
    store = SignedStore(dist.TCPStore("127.0.0.1", both.store.port, is_master=False), b"")
    for value in (7, [], ["ended"] * 9, {"a": 1}, ["ended", "", ["no kind", "message"]], ["ended", "", [[], 0]]):
        for key in ("state", "node/0", "node/1"):
            store.set(key, value)
        time.sleep(0.2)
    deep = "[" * 100_000
    store._store.set("node/1", secret._sign(b"", "node/1", deep) + deep)
    time.sleep(0.2)
    assert not any(link.alarm for link in links)
    assert report_all(links, None, None) == [None, None]


def test_a_node_with_another_secret_is_refused_alone(meeting):
    both = meeting(2)
    first = both.link(0, secret=b"right value")
    (refusal,) = in_threads(both.link(1, secret=b"wrong value").meet)
    assert "node 1 finds no run with its ARCFACE_SECRET there" in refusal
    assert "value" not in refusal and "abc" not in refusal
    links = [first, both.link(1, secret=b"right value")]
    assert in_threads(*[link.meet for link in links]) == [None, None]
    assert report_all(links, None, None) == [None, None]


def test_a_job_that_was_suspended_goes_on(meeting, monkeypatch):
    """Slurm stops the processes of all nodes, perhaps for hours, and continues them."""
    both = meeting(2)
    links, suspended = both.meet(), 0.0
    monkeypatch.setattr(multinode, "time", SimpleNamespace(
        time=time.time, sleep=time.sleep, monotonic=lambda: time.monotonic() + suspended))
    suspended = 10_000.0
    time.sleep(0.5)
    assert not any(link.alarm for link in links)
    assert report_all(links, None, None) == [None, None]


# ---------------------------------------------------------------------------------------------------------------------
# main.py on two nodes, with a network that is cut


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
            self._ip("link", "add", self._ends[0], "netns", self._names[0], "type", "veth",
                     "peer", "name", self._ends[1], "netns", self._names[1])
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
    """For machines where namespaces are not permitted: node 1's parent is stopped instead, so that it falls silent."""

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


# With less patience.
MAIN = ("from utils.launch import multinode; multinode.SILENCE_SECONDS = 4; "
        "import main; main.exit_on_user_error(main.main)")


@pytest.mark.slow
def test_a_cut_network_ends_both_nodes_and_the_run_resumes(faces, tmp_path, network):
    """The published command, without --output on node 0; node 1 has none: there it is a file."""
    common = ["--enable-model-parallel", "-a", "mobilefacenet", "--num-classes", "11", "-b", "4", "-j", "0", "-p", "1",
              "--nproc-per-node", "1", "--multiprocessing-distributed"]
    home, other = tmp_path / "node-0", tmp_path / "node-1"
    home.mkdir()
    other.mkdir()

    def start_nodes(count: int, *flags: object) -> list[subprocess.Popen]:
        url = f"tcp://{network.hosts[0]}:{free_port()}"
        return [
            subprocess.Popen(
                [*network.prefix(node), sys.executable, "-u", "-c", MAIN, str(faces), *common, "--dist-url", url,
                 "--world-size", str(count), "--rank", str(node), *map(str, flags),
                 *(["--output", __file__] if node else [])],
                cwd=(home, other)[node], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )
            for node in range(count)
        ]

    both = start_nodes(2, "--seed", 1, "--max-steps", 10_000, "--epochs", 10_000, "--save-freq", 1)
    head = []
    for line in both[0].stdout:
        head.append(line)
        if " step 4/" in line:  # by now a checkpoint is complete
            break
    assert " step 4/" in head[-1], "".join(head)
    network.cut(both[1].pid)
    begun = time.monotonic()
    output = finish(both[0], status=1)
    assert time.monotonic() - begun < 60
    silence = re.search(r"^error: node 1 \(.*\) is gone: no sign of life for (\d+) s", output, re.M)
    assert silence and 4 <= int(silence[1]) < 30, output
    if isinstance(network, Loopback):
        network.mend(both[1].pid)  # node 0 has closed the connection meanwhile
    output = finish(both[1], status=1)
    assert f"error: node 0 ({network.hosts[0]}) is gone: " in output and "all ranks were stopped" in output
    if isinstance(network, Namespaces):
        network.mend(both[1].pid)

    step = json.loads((home / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    for nodes, end, resume in ((2, step + 2, "checkpoint.pth.tar"), (1, step + 4, "auto")):
        flags = ["--max-steps", end, "--epochs", 10_000, "--resume", resume]
        outputs = [finish(node) for node in start_nodes(nodes, *flags)]
        assert f"done: {end} steps" in outputs[0] and "resuming" in outputs[0]
    assert not list(other.iterdir())
