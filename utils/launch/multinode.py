"""The nodes of a run. Every node has one parent process, which starts the node's ranks; the parents meet before that, and
watch one another until the end, so that whatever ends one node ends all of them, with the same words.

Node 0's parent listens at --dist-url (Coordinator), and all parents, its own as well, connect there (NodeLink). They send
lines of JSON, one object each:

    node -> coordinator     {"hello": {node, host, process, facts}}     first
                            {"report": cause or null}                   its ranks have ended: by a failure, or well
    coordinator -> node     {"waiting": [node, ...]}                    who has not come yet
                            {"start": store_port}                       all have come: start the ranks
                            {"alarm": true}                             a node failed: stop, and report
                            {"end": cause or null}                      the run is over, by this cause, or well
    both                    {}                                          every second, to be heard

A closed connection tells at once that a parent has ended, silence that the network is cut. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError

HEARTBEAT_SECONDS = 1.0


# A network that stands still for a moment must not end a run of days.
SILENCE_SECONDS = 20.0


# After a failure, for all nodes to tell what they saw of it: their ranks notice within moments, or never.
ANSWER_SECONDS = 5.0
WAITING_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_MAX_LINE_BYTES = 1 << 20


# The first that is found is the cause, the others followed from it. "lost" is an error of a rank that misses another one.
KINDS = ("stopped", "crash", "user", "error", "gone", "lost")


@dataclass(frozen=True)
class Cause:
    """Why a run ended before its time."""

    kind: str  # one of KINDS
    message: str
    node: int
    time: float = 0.0  # of this kind the earliest counts
    traceback: str = ""
    signal: int = 0  # of "stopped"

    @property
    def exit_status(self) -> int:
        return {"stopped": 128 + self.signal, "user": 2}.get(self.kind, 1)


def first_cause(causes: list[Cause]) -> Cause | None:
    return min(causes, key=lambda cause: (KINDS.index(cause.kind), cause.time), default=None)


def _names(nodes: list[int], of: int) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))} of {of}"


class _Connection:
    """A socket that carries lines of JSON. Sending never raises: a connection that is gone shows when it is read."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(SILENCE_SECONDS)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connected
        self.heard = self.sent = time.monotonic()
        self._rest = b""
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock:
            try:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                pass
            self.sent = time.monotonic()

    def beat(self) -> None:
        if time.monotonic() - self.sent >= HEARTBEAT_SECONDS:
            self.send({})

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived, when the socket is readable; None at its end, or for what is none of ours."""
        try:
            received = self.socket.recv(65536)
        except OSError:
            return None
        if not received:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + received).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        if len(self._rest) > _MAX_LINE_BYTES or not all(isinstance(message, dict) for message in messages):
            return None
        return messages


@dataclass
class _Member:
    """What the coordinator knows of a node."""

    connection: _Connection
    node: int
    host: str
    process: int
    reported: bool = False
    cause: Cause | None = None
    gone: str = ""  # how it was lost, if it was

    def __str__(self) -> str:
        return f"node {self.node} ({self.host})"


class Coordinator:
    """Node 0's: waits for the nodes, then for what ends the run, and tells all of them, from a thread of its own.

    Raises UserError where the port is taken.
    """

    def __init__(self, *, port: int, nodes: int, facts: dict[str, Any], store_port: int, timeout: float) -> None:
        self._nodes, self._facts, self._store_port, self._timeout = nodes, facts, store_port, timeout
        try:
            if socket.has_dualstack_ipv6():
                self._listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
            else:
                self._listener = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            raise UserError(f"--dist-url: cannot listen on port {port} ({error.strerror}); another run may be using it: "
                            "give a free port") from None
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._members: dict[int, _Member] = {}
        self._begin = time.monotonic()
        self._started = self._alarm = self._ended = None  # when
        self._said_waiting = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """When this node's link has heard the end: wait, not for long, until the others have."""
        self._thread.join(2 * ANSWER_SECONDS)
        self._listener.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(timeout=0.2):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if self._ended is None:
                self._look(now)
            # Each node hangs up when it has read the end: closing first could take it from its hands.
            elif not self._open() or now - self._ended > ANSWER_SECONDS:
                return
            for member in self._members.values():
                if not member.gone:
                    member.connection.beat()

    def _open(self) -> list[Any]:
        return [key for key in self._selector.get_map().values() if key.data is not None]

    def _accept(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:
            return
        connection = _Connection(connected)
        self._selector.register(connected, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection) -> None:
        messages = connection.receive()
        member = next((member for member in self._members.values() if member.connection is connection), None)
        if messages is None:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            if member is not None and not member.gone:
                member.gone = "its process has ended"
                if self._started is None:  # it may come again
                    del self._members[member.node]
            return
        for message in messages:
            if "hello" in message and member is None:
                self._welcome(connection, message["hello"])
            elif "report" in message and member is not None:
                member.reported = True
                member.cause = Cause(**message["report"]) if message["report"] else None

    def _welcome(self, connection: _Connection, hello: dict[str, Any]) -> None:
        try:
            member = _Member(connection, int(hello["node"]), str(hello["host"]), int(hello["process"]))
            facts = dict(hello["facts"])
        except (KeyError, TypeError, ValueError):  # a stranger
            return
        refusal = self._refusal(member, facts)
        if refusal is None:
            self._members[member.node] = member
            return
        cause = Cause("user", refusal, member.node)
        connection.send({"end": dataclasses.asdict(cause)})
        if self._started is None:  # else a run that is complete goes on
            self._end(cause)

    def _refusal(self, member: _Member, facts: dict[str, Any]) -> str | None:
        for name, value in self._facts.items():
            if facts.get(name) != value:
                return (f"{name} is {facts.get(name)} on {member} and {value} on node 0 ({socket.gethostname()}): "
                        "start all nodes with the same flags and the same program")
        other = self._members.get(member.node)
        if other is not None:
            return (f"--rank {member.node} was given to two nodes, {other.host} (process {other.process}) and {member.host} "
                    f"(process {member.process}): number them from 0 to {self._nodes - 1}")
        return None

    def _look(self, now: float) -> None:
        """Decide what is next, if anything."""
        if self._started is None:
            missing = [node for node in range(self._nodes) if node not in self._members]
            waited = now - self._begin
            if not missing:
                self._started = now
                self._tell({"start": self._store_port})
            elif waited > self._timeout:
                self._end(Cause("user", f"{_names(missing, self._nodes)} did not come within {self._timeout:g} s "
                                        "(--dist-timeout): start every node, with this --dist-url and a --rank of its own", missing[0]))
            elif waited > WAITING_SECONDS and not self._said_waiting:
                self._said_waiting = True
                self._tell({"waiting": missing})
            return
        open_members = [member for member in self._members.values() if not member.gone]
        for member in open_members:
            if not member.reported and now - member.connection.heard > SILENCE_SECONDS:
                member.gone = f"nothing was heard of it for {SILENCE_SECONDS:g} s; is the network cut, or the machine down?"
        waiting = [member for member in open_members if not member.gone and not member.reported]
        failed = any(member.cause is not None or member.gone and not member.reported for member in self._members.values())
        if failed and self._alarm is None:
            self._alarm = now
            self._tell({"alarm": True})
        if failed and waiting and now - self._alarm > ANSWER_SECONDS:
            for member in waiting:
                member.gone = f"it did not answer within {ANSWER_SECONDS:g} s; is the network cut, or the machine down?"
            waiting = []
        if not waiting:
            causes = [member.cause for member in self._members.values() if member.cause is not None]
            causes += [Cause("gone", f"{member} is gone: {member.gone}", member.node)
                       for member in self._members.values() if member.gone and not member.reported]
            self._end(first_cause(causes))

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self._members.values():
            member.connection.send(message)

    def _end(self, cause: Cause | None) -> None:
        self._ended = time.monotonic()
        self._tell({"end": dataclasses.asdict(cause) if cause else None})


class NodeLink:
    """A parent's connection to the coordinator.

    `meet`, start the ranks, look at `alarm` now and then, and `report` in the end.
    """

    def __init__(self, *, host: str, port: int, node: int, nodes: int, facts: dict[str, Any], timeout: float) -> None:
        self._address, self._node, self._nodes, self._facts, self._timeout = (host, port), node, nodes, facts, timeout
        self._cause: Cause | None = None
        self._over = threading.Event()
        self.alarm = False  # a node has failed, or node 0 is gone: this node's ranks are to be stopped

    def meet(self) -> int:
        """Wait until all nodes have come; the port of the ranks' store, on the coordinator's machine. Raises UserError."""
        self._connection = _Connection(self._connect())
        hello = {"node": self._node, "host": socket.gethostname(), "process": os.getpid(), "facts": self._facts}
        self._connection.send({"hello": hello})
        # Who is missing in the end the coordinator tells, which may have been started later; this is for its silence.
        deadline = time.monotonic() + self._timeout + SILENCE_SECONDS
        while True:
            self._connection.socket.settimeout(max(0.1, deadline - time.monotonic()))
            messages = self._connection.receive()
            if messages is None:
                raise UserError(f"{self._url}: node 0 has ended, or something else answers there, before all {self._nodes} "
                                "nodes had come; see node 0's output")
            for message in messages:
                if "waiting" in message:
                    print(f"waiting for {_names(message['waiting'], self._nodes)}, up to {self._timeout:g} s (--dist-timeout)",
                          flush=True)
                elif "end" in message:
                    raise UserError(Cause(**message["end"]).message)
                elif "start" in message:
                    self._connection.socket.settimeout(SILENCE_SECONDS)
                    threading.Thread(target=self._listen, daemon=True).start()
                    return message["start"]

    @property
    def _url(self) -> str:
        return f"--dist-url tcp://{self._address[0]}:{self._address[1]}"

    def _connect(self) -> socket.socket:
        # Node 0 listens already: if it does not reach itself, the others will not reach it either.
        deadline = time.monotonic() + (min(self._timeout, SILENCE_SECONDS) if self._node == 0 else self._timeout)
        while True:
            try:
                return socket.create_connection(self._address, timeout=max(0.1, deadline - time.monotonic()))
            except OSError as error:
                if time.monotonic() + _RETRY_SECONDS > deadline:
                    if self._node == 0:
                        raise UserError(f"{self._url}: node 0 cannot reach itself there ({error.strerror or error}); give an "
                                        "address of node 0 that the other nodes reach") from None
                    raise UserError(f"{self._url}: node {self._node} did not reach node 0 there within {self._timeout:g} s "
                                    f"(--dist-timeout; {error.strerror or error}): is node 0 started, is that its address, is the "
                                    "port open?") from None
            time.sleep(_RETRY_SECONDS)

    def _listen(self) -> None:
        """Until the end: beat, and hear what the coordinator says."""
        connection = self._connection
        connection.heard = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(connection.socket, selectors.EVENT_READ)
            while True:
                ready = selector.select(timeout=0.2)
                messages = connection.receive() if ready else []
                for message in messages or ():
                    if "end" in message:
                        return self._finish(Cause(**message["end"]) if message["end"] else None)
                    self.alarm |= "alarm" in message
                if messages is None:
                    return self._finish(Cause("gone", f"node 0 ({self._address[0]}) is gone: its process has ended", 0))
                if time.monotonic() - connection.heard > SILENCE_SECONDS:
                    return self._finish(Cause("gone", f"node 0 ({self._address[0]}) is gone: nothing was heard of it for "
                                                      f"{SILENCE_SECONDS:g} s; is the network cut, or the machine down?", 0))
                connection.beat()

    def _finish(self, cause: Cause | None) -> None:
        self._cause = cause
        self.alarm |= cause is not None
        self._connection.socket.close()
        self._over.set()

    def report(self, cause: Cause | None) -> Cause | None:
        """Tell how this node's ranks ended, wait for the others, and return what ended the run: None, if nothing did.

        `cause` None: well, or because of `alarm`.
        """
        if not self._over.is_set():
            self._connection.send({"report": dataclasses.asdict(cause) if cause else None})
        self._over.wait()
        return first_cause([known for known in (cause, self._cause) if known is not None])


def show(cause: Cause, node: int, nodes: int) -> None:
    """The last words of a run, on stderr of each node. `message` names rank and node where there are several."""
    if cause.kind == "user":
        elsewhere = f"node {cause.node}: " if cause.node != node else ""
        print(f"error: {elsewhere}{cause.message}", file=sys.stderr, flush=True)
        return
    if cause.kind == "stopped":
        print(cause.message, file=sys.stderr, flush=True)
        return
    stopped = "all nodes were stopped" if nodes > 1 else "all ranks of this node were stopped"
    if cause.traceback and cause.node == node:
        print(cause.traceback, end="", file=sys.stderr)
    print(f"error: {cause.message}; {stopped}", file=sys.stderr, flush=True)
