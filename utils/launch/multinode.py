"""How the nodes of a run meet and watch one another: whatever ends one node ends all of them, with one known cause.

Every node has one parent process, which starts the node's ranks. Node 0's parent hosts a TCPStore at --dist-url. The
parents meet there, and the ranks form their process group there. The parents' keys, with JSON values:

    node/<id>    written by a node every POLL_SECONDS (Record): its changing counter is the heartbeat
    arrivals     the ids of the nodes, each followed by a comma
    state        written by node 0 (State): who is missing, whether to start or to stop, and how the run ended

While the network is cut a store call blocks, whatever its timeout. So a thread makes the calls, and the main thread
reads what the thread found and watches the clock.
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
    """What node 0 decides: it waits for the nodes, then for what ends the run. One thread alone uses it and `store`."""

    def __init__(self, store: dist.Store, *, nodes: int, facts: dict[str, Any], timeout: float) -> None:
        self._store, self._nodes, self._facts = store, nodes, facts
        self._deadline = time.monotonic() + timeout
        self._too_late = f"within {timeout:g} s (--dist-timeout)"
        self._failed_at: float | None = None
        self._members: list[str] = []
        self._records: dict[str, Record] = {}
        self._heard: dict[str, float] = {}
        store.set("arrivals", "")
        self._publish("waiting")

    def _publish(self, phase: str, *, missing: list[int] | None = None, cause: Cause | None = None) -> None:
        self._store.set("state", _encode(State(phase, missing or [], self._members, cause)))
        self._phase, self._since = phase, time.monotonic()

    def step(self) -> bool:
        """Read what the nodes wrote, and publish what follows. True when all nodes have read how the run ended."""
        names = self._members or self._store.get("arrivals").decode().split(",")[:-1]
        now = time.monotonic()
        for name, text in zip(names, self._store.multi_get([f"node/{name}" for name in names])):
            record = _decode(Record, text)
            if record is not None and record != self._records.get(name):
                self._records[name], self._heard[name] = record, now
        alive = {name: record for name, record in self._records.items() if now - self._heard[name] < ABSENT_SECONDS}
        if self._phase == "waiting":
            self._wait_for_nodes(alive)
        elif self._phase != "ended":
            self._watch_nodes()
        return self._phase == "ended" and (
            all(record.left for record in alive.values()) or now - self._since > ANSWER_SECONDS)

    def _wait_for_nodes(self, alive: dict[str, Record]) -> None:
        missing = sorted(set(range(self._nodes)) - {record.node for record in alive.values()})
        refusal = self._refuse(list(alive.values()))
        if refusal is None and missing and time.monotonic() > self._deadline:
            refusal = Cause("user", f"{_name_nodes(missing, self._nodes)} did not come {self._too_late}: start every "
                                    "node with this --dist-url and its own --rank", missing[0])
        if refusal is not None:
            self._publish("ended", cause=refusal)
        elif missing:
            self._publish("waiting", missing=missing)
        else:
            self._members, self._records = list(alive), alive
            self._publish("running")

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
                return Cause("user", f"--rank {record.node} was given to two nodes, {other.host} (process "
                                     f"{other.process}) and {record.host} (process {record.process}): number the nodes "
                                     f"from 0 to {self._nodes - 1}", record.node)
        return None

    def _watch_nodes(self) -> None:
        now, failed_at = time.monotonic(), self._failed_at
        causes, unfinished = [], False
        for name, record in self._records.items():
            silence = now - self._heard[name]
            if record.reported:
                causes += [record.cause] if record.cause else []
            elif silence > (SILENCE_SECONDS if failed_at is None else ANSWER_SECONDS):
                causes.append(Cause("gone", f"{record} is gone: {_silent(silence)}", record.node))
            elif failed_at is not None and now - failed_at > SILENCE_SECONDS:
                causes.append(Cause("gone", f"{record} could not end its ranks", record.node))
            else:
                unfinished = True
        if not unfinished:
            self._publish("ended", cause=first_cause(causes))
        elif causes and failed_at is None:
            self._failed_at = now
            self._publish("stopping")


class NodeLink:
    """A parent's link to the other parents: `meet`, start the ranks, watch `alarm`, `report` in the end, and `close`.

    Args:
        address: host and port of node 0's store.
        node: the number of this node, of `nodes`.
        facts: name -> value, which must be the same on all nodes.
        timeout: seconds to wait for the other nodes.
        store: on node 0 the store itself; nothing else may use this object.
    """

    def __init__(
        self, address: tuple[str, int], *, node: int, nodes: int, facts: dict[str, Any], timeout: float,
        store: dist.TCPStore | None = None,
    ) -> None:
        self._address, self._nodes, self._timeout = address, nodes, timeout
        self._coordinator = store and Coordinator(store, nodes=nodes, facts=facts, timeout=timeout)
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
                    f"{self._url}: node {self._record.node} did not reach node 0 there within {now - self._heard:.0f} s"
                    f" (--dist-timeout; {self._failure}): is node 0 started, is that its address, is the port open?")

    @property
    def alarm(self) -> bool:
        """Whether another node has failed, so that this node must stop its ranks."""
        return self._state.phase == "stopping" or self._end() is not None

    def report(self, cause: Cause | None) -> Cause | None:
        """Publish how this node's ranks ended, wait for the other nodes, and return what ended the run, or None.

        `cause` is None if the ranks succeeded, or were stopped because of `alarm`.
        """
        self._record = dataclasses.replace(self._record, reported=True, cause=cause)
        while self._state.phase != "ended" and self._end() is None:
            time.sleep(POLL_SECONDS / 4)
        return first_cause([known for known in (cause, self._end()) if known is not None])

    def close(self) -> None:
        """End the thread. On node 0 wait until the other nodes have read how the run ended, but not for long."""
        self._closing = self._coordinator is None or self._state.phase != "ended"
        self._thread.join(2 * POLL_SECONDS if self._closing else 2 * ANSWER_SECONDS)  # a store call may block it

    @property
    def _url(self) -> str:
        return f"--dist-url tcp://{self._address[0]}:{self._address[1]}"

    def _end(self) -> Cause | None:
        """What ended the run, as far as this node knows."""
        state, silence = self._state, time.monotonic() - self._heard
        if state.phase == "ended":
            return state.cause
        if state.phase == "lost" or silence > SILENCE_SECONDS:
            why = "its process has ended" if state.phase == "lost" else _silent(silence)
            return Cause("gone", f"node 0 ({self._address[0]}) is gone: {why}", 0)
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
        socket.create_connection(self._address, timeout=ANSWER_SECONDS).close()  # TCPStore would not say why it fails
        store = dist.TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=self._timeout))
        name = secrets.token_hex(8)
        for beat in itertools.count():
            finished = self._coordinator.step() if self._coordinator else True
            state = _decode(State, store.get("state"))
            if state is None:
                raise ValueError("another program answers there")
            if state.members and name not in state.members:
                if state.phase != "running":
                    raise ValueError("another run is ending there")
                self._state = State("ended", cause=Cause(
                    "user", f"--rank {self._record.node}: the run at {self._url} has started without this node; was "
                            "the number given to two nodes?", self._record.node))
                return
            left = state.phase == "ended"
            store.set(f"node/{name}", _encode(dataclasses.replace(self._record, beat=beat, left=left)))
            if beat == 0:
                store.append("arrivals", f"{name},")  # type: ignore[attr-defined]  # torch's stubs lack it
            self._heard, self._state = time.monotonic(), state
            if left and finished or self._closing:
                return
            time.sleep(POLL_SECONDS)
