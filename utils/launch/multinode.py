"""How the nodes of a run meet and watch one another: whatever ends one node ends all of them, with one known cause.

Every node has one parent process, which starts the node's ranks. Node 0's parent hosts a TCPStore at --dist-url. The
parents meet there, and the ranks form their process group there. The parents' keys, with JSON values:

    node/<id>    written by a node every POLL_SECONDS (Record): its changing counter is the heartbeat
    arrivals     the ids of the nodes, each followed by a comma
    state        written by node 0 (State): who is missing, whether to start or to stop, and how the run ended

While the network is cut a store call blocks, whatever its timeout. So each parent makes its calls in a thread
(NodeLink), node 0 has a second one (Coordinator), and the main thread reads what they found and watches the clock.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from utils.errors import UserError
from utils.launch.cause import Cause, first_cause

POLL_SECONDS = 0.2
SILENCE_SECONDS = 20.0  # a network that stalls for a moment must not end a run of days
ANSWER_SECONDS = 5.0  # after a failure, when the other nodes notice within moments, or never
ABSENT_SECONDS = 2.0  # before the start: a node that is silent for this long has ended, and may be started again
WAITING_SECONDS = 10.0  # before a node prints which nodes it waits for


@dataclass(frozen=True)
class Record:
    """What a node publishes."""

    node: int
    host: str
    process: int
    facts: dict[str, Any]  # must be the same on all nodes
    beat: int
    reported: bool  # its ranks have ended
    cause: Cause | None  # why, unless they succeeded or were stopped because another node failed
    left: bool  # it has read how the run ended

    def __str__(self) -> str:
        return f"node {self.node} ({self.host}, process {self.process})"


@dataclass(frozen=True)
class State:
    """What node 0 publishes."""

    phase: str  # "waiting", "running", "stopping" (a node failed) or "ended"; "connecting" before node 0 was reached
    missing: list[int] = field(default_factory=list)  # nodes
    members: list[str] = field(default_factory=list)  # ids of the nodes, once all have come
    cause: Cause | None = None  # of "ended"; None is success


_Value = TypeVar("_Value", Record, State)


def _encode(value: Record | State) -> str:
    return json.dumps(dataclasses.asdict(value))


def _decode(kind: type[_Value], text: bytes) -> _Value | None:
    """None for a text that `_encode` did not write."""
    try:
        fields = json.loads(text)
        return kind(**{**fields, "cause": fields["cause"] and Cause(**fields["cause"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _name_nodes(nodes: list[int], total: int) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))} of {total}"


def _silent(seconds: float) -> str:
    return f"no sign of life for {seconds:.0f} s; was it killed, is the network cut, or the machine down?"


class Coordinator:
    """On node 0: waits for the nodes, then for what ends the run, and publishes the state, in a thread of its own.

    Args:
        store: a client that nothing else uses.
        nodes: how many.
        facts: name -> value, which every node must have.
        timeout: seconds to wait for the nodes.
    """

    def __init__(self, store: dist.Store, *, nodes: int, facts: dict[str, Any], timeout: float) -> None:
        self._store, self._nodes, self._facts, self._timeout = store, nodes, facts, timeout
        self._members: list[str] = []
        self._records: dict[str, Record] = {}
        self._heard: dict[str, float] = {}
        self._closing = False
        store.set("arrivals", "")
        self._publish("waiting")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until the other nodes have read how the run ended, but not for long."""
        self._closing = self._phase != "ended"
        self._thread.join(2 * ANSWER_SECONDS)

    def _run(self) -> None:
        try:
            self._wait_for_nodes()
            self._watch_nodes()
        except Exception as error:  # nobody would end the run
            self._publish("ended", cause=Cause("error", f"node 0's coordinator failed: {error!r}", 0))
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self._closing and time.monotonic() < deadline:
            if all(record.left for record in self._read_alive().values()):
                return

    def _publish(self, phase: str, *, missing: list[int] | None = None, cause: Cause | None = None) -> None:
        self._store.set("state", _encode(State(phase, missing or [], self._members, cause)))
        self._phase = phase

    def _read(self) -> dict[str, Record]:
        """Wait a moment, then read the records of the members, or, before the start, of all nodes that ever came."""
        time.sleep(POLL_SECONDS)
        names = self._members or self._store.get("arrivals").decode().split(",")[:-1]
        for name, text in zip(names, self._store.multi_get([f"node/{name}" for name in names])):
            record = _decode(Record, text)
            if record is not None and record != self._records.get(name):
                self._records[name], self._heard[name] = record, time.monotonic()
        return self._records

    def _silence(self, name: str) -> float:
        """The seconds since this node last wrote."""
        return time.monotonic() - self._heard[name]

    def _read_alive(self) -> dict[str, Record]:
        return {name: record for name, record in self._read().items() if self._silence(name) < ABSENT_SECONDS}

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + self._timeout
        while self._phase == "waiting" and not self._closing:
            alive = self._read_alive()
            missing = sorted(set(range(self._nodes)) - {record.node for record in alive.values()})
            refusal = self._refuse(list(alive.values()))
            if refusal is not None:
                self._publish("ended", cause=refusal)
            elif not missing:
                self._members, self._records = list(alive), alive
                self._publish("running")
            elif time.monotonic() > deadline:
                self._publish("ended", cause=Cause(
                    "user", f"{_name_nodes(missing, self._nodes)} did not come within {self._timeout:g} s "
                            "(--dist-timeout): start every node with this --dist-url and its own --rank", missing[0]))
            else:
                self._publish("waiting", missing=missing)

    def _refuse(self, records: list[Record]) -> Cause | None:
        """Why these nodes cannot train together."""
        numbers: dict[int, Record] = {}
        for record in records:
            for name, value in self._facts.items():
                if record.facts.get(name) != value:
                    return Cause("user", f"{name} is {record.facts.get(name)} on {record} and {value} on node 0: "
                                         "start all nodes with the same flags and the same program", record.node)
            other = numbers.setdefault(record.node, record)
            if other is not record:
                return Cause("user", f"--rank {record.node} was given twice, to {other.host} (process {other.process})"
                                     f" and {record.host} (process {record.process}): number the nodes from 0 to "
                                     f"{self._nodes - 1}", record.node)
        return None

    def _watch_nodes(self) -> None:
        failed_at = None
        while self._phase != "ended" and not self._closing:
            causes, unfinished = [], False
            for name, record in self._read().items():
                silence = self._silence(name)
                if record.reported:
                    causes += [record.cause] if record.cause else []
                elif silence > (SILENCE_SECONDS if failed_at is None else ANSWER_SECONDS):
                    causes.append(Cause("gone", f"{record} is gone: {_silent(silence)}", record.node))
                elif failed_at is not None and time.monotonic() - failed_at > SILENCE_SECONDS:
                    causes.append(Cause("gone", f"{record} could not end its ranks", record.node))
                else:
                    unfinished = True
            if not unfinished:
                self._publish("ended", cause=first_cause(causes))
            elif causes and failed_at is None:
                failed_at = time.monotonic()
                self._publish("stopping")


class NodeLink:
    """A parent's connection to the others: `meet`, start the ranks, watch `alarm`, `report` in the end, and `close`."""

    def __init__(self, *, host: str, port: int, node: int, nodes: int, facts: dict[str, Any], timeout: float) -> None:
        self._host, self._port, self._nodes, self._timeout = host, port, nodes, timeout
        self._record = Record(node, socket.gethostname(), os.getpid(), facts, 0, reported=False, cause=None, left=False)
        self._state = State("connecting")
        self._begin = self._heard = time.monotonic()
        self._failure = "no answer"  # why node 0 is out of reach
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait until all nodes have come. Raises UserError."""
        announced = False
        while self._state.phase not in ("running", "stopping"):
            time.sleep(POLL_SECONDS / 4)
            state, now = self._state, time.monotonic()
            if state.cause is not None:
                raise UserError(state.cause.message)
            if state.missing and not announced and now - self._begin > WAITING_SECONDS:
                announced = True
                print(f"waiting for {_name_nodes(state.missing, self._nodes)}, up to {self._timeout:g} s "
                      "(--dist-timeout)", flush=True)
            if now - self._heard > (self._timeout if state.phase == "connecting" else SILENCE_SECONDS):
                raise UserError(
                    f"--dist-url tcp://{self._host}:{self._port}: node {self._record.node} did not reach node 0 there "
                    f"within {now - self._heard:.0f} s (--dist-timeout; {self._failure}): is node 0 started, is that "
                    "its address, is the port open?")

    @property
    def alarm(self) -> bool:
        """Whether another node has failed, so that this node must stop its ranks."""
        return self._state.phase == "stopping" or self._end() is not None

    def report(self, cause: Cause | None) -> Cause | None:
        """Publish how this node's ranks ended, wait for the other nodes, and return what ended the run, None: success.

        `cause` is None if the ranks succeeded, or were stopped because of `alarm`.
        """
        self._record = dataclasses.replace(self._record, reported=True, cause=cause)
        while self._state.phase != "ended" and self._end() is None:
            time.sleep(POLL_SECONDS / 4)
        return first_cause([known for known in (cause, self._end()) if known is not None])

    def close(self) -> None:
        self._closing = True
        self._thread.join(2 * POLL_SECONDS)  # not for ever: a store call may block it

    def _end(self) -> Cause | None:
        """What ended the run, as far as this node knows."""
        state, silence = self._state, time.monotonic() - self._heard
        if state.phase == "ended":
            return state.cause
        if state.phase == "lost" or silence > SILENCE_SECONDS:
            why = "its process has ended" if state.phase == "lost" else _silent(silence)
            return Cause("gone", f"node 0 ({self._host}) is gone: {why}", 0)
        return None

    def _run(self) -> None:
        while self._state.phase in ("connecting", "waiting") and not self._closing:
            try:
                self._take_part()
            except (OSError, RuntimeError, ValueError) as error:
                self._failure = getattr(error, "strerror", None) or str(error).splitlines()[0]
                # Before the start node 0 may be started again.
                self._state = State("connecting" if self._state.phase in ("connecting", "waiting") else "lost")
                time.sleep(POLL_SECONDS)

    def _take_part(self) -> None:
        """Write this node's record and read node 0's state until the end. Raises an error if the connection fails."""
        # TCPStore does not say why it cannot connect.
        socket.create_connection((self._host, self._port), timeout=ANSWER_SECONDS).close()
        store = dist.TCPStore(self._host, self._port, is_master=False, timeout=timedelta(seconds=self._timeout))
        name = secrets.token_hex(8)
        for beat in itertools.count():
            state = _decode(State, store.get("state"))
            if state is None:
                raise ValueError("another program answers there")
            if state.members and name not in state.members:
                if state.phase != "running":
                    raise ValueError("another run is ending there")
                self._state = State("ended", cause=Cause(
                    "user", f"--rank {self._record.node}: the run at --dist-url tcp://{self._host}:{self._port} has "
                            "started without this node; was the number given to two nodes?", self._record.node))
                return
            left = state.phase == "ended"
            store.set(f"node/{name}", _encode(dataclasses.replace(self._record, beat=beat, left=left)))
            if beat == 0:
                store.append("arrivals", f"{name},")  # type: ignore[attr-defined]  # torch's stubs lack it
            self._heard, self._state = time.monotonic(), state
            if left or self._closing:
                return
            time.sleep(POLL_SECONDS)
