"""How the nodes of a run meet and watch one another: whatever ends one node ends all of them, with one known cause.

Every node has one parent process, which starts the node's ranks. Node 0's parent hosts a TCPStore at --dist-url. The
parents meet there, and the ranks form their process group there. The parents' keys; all values are signed JSON:

    node/<node>  written by a node every POLL_SECONDS (Record): its changing time is the heartbeat
    refusal      written by a node that cannot take part: why. Before the start it ends the run
    facts        written by node 0: name -> value, which must be the same on all nodes
    state        written by node 0 (State): who is missing, whether to start or to stop, and how the run ended

While the network is cut a store call blocks, whatever its timeout. So a thread makes the calls, and the main thread
reads what the thread found and watches the clock. What others write without the secret of the run (see secret.py) is
ignored.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from utils.errors import UserError
from utils.launch.secret import VARIABLE, SignedStore, read_secret

POLL_SECONDS = 0.2
SILENCE_SECONDS = 20.0  # a network that stalls for a moment must not end a run of days
ANSWER_SECONDS = 5.0  # after a failure, when the other nodes notice within moments, or never
ABSENT_SECONDS = 2.0  # before the start: a node that is silent for this long has ended, and may be started again
WAITING_SECONDS = 10.0  # before a node prints which nodes it waits for

# Of several causes the first kind in this order is the root cause. "gone": a node that died or fell silent.
# "lost": a rank whose connection to another rank broke.
KINDS = ("stopped", "crash", "user", "error", "gone", "lost")


class Cause(NamedTuple):
    """Why a run ended early."""

    kind: str  # one of KINDS
    message: str  # with several nodes it names the node
    node: int
    time: float = 0.0  # of two causes of one kind the earlier one is the root cause
    traceback: str = ""
    signal: int = 0  # of "stopped"

    @property
    def exit_status(self) -> int:
        return {"stopped": 128 + self.signal, "user": 2}.get(self.kind, 1)


def first_cause(causes: Iterable[Cause | None]) -> Cause | None:
    """The root cause. None if there are no causes."""
    return min(filter(None, causes), key=lambda cause: (KINDS.index(cause.kind), cause.time), default=None)


class Record(NamedTuple):
    """What a node publishes."""

    place: str  # host and process
    time: float
    reported: bool = False  # its ranks have ended
    left: bool = False  # it has read how the run ended
    cause: Cause | None = None  # why its ranks ended, unless they succeeded or were stopped because another node failed


class State(NamedTuple):
    """What node 0 publishes."""

    phase: str  # "waiting", "running", "stopping" (a node failed) or "ended"; before node 0 was reached "connecting"
    missing: str = ""  # the nodes that have not come
    cause: Cause | None = None  # of "ended"; None is success


def _read(kind: Any, store: SignedStore, key: str) -> Any:
    """The Record or State that the key holds, or None. Without a secret anyone can write other things there."""
    try:
        value = kind(*store.get(key))
        cause = Cause(*value.cause) if value.cause else None
    except TypeError:  # None, or not these fields
        return None
    known = cause is None or cause.kind in KINDS and isinstance(cause.message, str)
    return value._replace(cause=cause) if known else None


class _Clock:
    """Seconds in which this process has run.

    While a job is suspended (SIGSTOP, as `scontrol suspend` sends it) no sign of life arrives, and afterwards that says
    nothing about the other nodes. So an interval between two readings counts as a second at most.
    """

    def __init__(self) -> None:
        self._lock, self._last, self._seconds = threading.Lock(), time.monotonic(), 0.0

    def __call__(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, 1.0)
            self._last = now
            return self._seconds


def _gone(node: int, place: str, silence: float) -> Cause:
    return Cause("gone", f"node {node} ({place}) is gone: no sign of life for {silence:.0f} s; was it killed, is the "
                         "network cut, or the machine down?", node)


class Coordinator:
    """What node 0 decides: it waits for the nodes, then for what ends the run. One thread alone uses it and `store`."""

    def __init__(self, store: SignedStore, nodes: int, facts: dict[str, Any], timeout: float) -> None:
        self._store, self._nodes, self._timeout = store, nodes, timeout
        self._clock = _Clock()
        self._records: dict[int, Record] = {}
        self._heard = [-math.inf] * nodes
        self._facts = facts
        self._decide(State("waiting"))
        self._publish()

    def _decide(self, state: State) -> None:
        self._state, self._since = state, self._clock()

    def _publish(self) -> None:
        self._store.set("facts", self._facts)
        self._store.set("state", self._state)

    def step(self) -> bool:
        """Read what the nodes wrote, and publish what follows. True when all nodes have read how the run ended."""
        now = self._clock()
        for node in range(self._nodes):
            record = _read(Record, self._store, f"node/{node}")
            if record is not None and record != self._records.get(node):
                self._records[node], self._heard[node] = record, now
        missing = [node for node, heard in enumerate(self._heard) if now - heard > ABSENT_SECONDS]
        if self._state.phase == "waiting":
            self._wait_for_nodes(missing, self._store.get("refusal"))
        elif self._state.phase != "ended":
            self._watch_nodes(now)
        self._publish()  # also what has not changed: a stranger may have overwritten it
        return self._state.phase == "ended" and (
            all(record.left or node in missing for node, record in self._records.items())
            or now - self._since > ANSWER_SECONDS)

    def _wait_for_nodes(self, missing: list[int], refusal: str | None) -> None:
        names = missing and f"node{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {self._nodes}"
        if missing and not refusal and self._clock() > self._timeout:
            refusal = (f"{names} did not come within {self._timeout:g} s (--dist-timeout): start every node with this "
                       "--dist-url and its own --rank")
        if refusal:
            self._decide(State("ended", cause=Cause("user", refusal, 0)))
        else:
            self._decide(State("waiting", names) if names else State("running"))

    def _watch_nodes(self, now: float) -> None:
        stopping = self._state.phase == "stopping"
        causes: list[Cause | None] = []
        for node, record in self._records.items():
            silence = now - self._heard[node]
            if record.reported:
                causes.append(record.cause)
            elif silence > (ANSWER_SECONDS if stopping else SILENCE_SECONDS):
                causes.append(_gone(node, record.place, silence))
            elif stopping and now - self._since > SILENCE_SECONDS:
                causes.append(Cause("gone", f"node {node} ({record.place}) could not end its ranks", node))
        if len(causes) == self._nodes:
            self._decide(State("ended", cause=first_cause(causes)))
        elif any(causes) and not stopping:
            self._decide(State("stopping"))


class NodeLink:
    """A parent's link to the other parents: `meet`, start the ranks, watch `alarm`, `report` in the end, and `close`.

    `address` is that of node 0's store, `facts` (name -> value) must be the same on all nodes, `timeout` is in seconds.
    On node 0 `store` is the store itself; nothing else may use this object. `secret`: by default ARCFACE_SECRET.
    """

    def __init__(self, address: tuple[str, int], *, node: int, nodes: int, facts: dict[str, Any], timeout: float,
                 store: dist.TCPStore | None = None, secret: bytes | None = None) -> None:
        self._address, self._nodes, self._timeout = address, nodes, timeout
        self._secret = read_secret() if secret is None else secret
        self._coordinator = store and Coordinator(SignedStore(store, self._secret), nodes, facts, timeout)
        self._node, self._facts = node, facts
        self._record = Record(f"{socket.gethostname()}, process {os.getpid()}", time.time())
        self._state = State("connecting")
        self._clock = _Clock()
        self._begin = self._heard = self._clock()
        self._failure = "no answer"  # why node 0 is out of reach
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def meet(self) -> None:
        """Wait until all nodes have come. Raises UserError."""
        announced = False
        while self._state.phase not in ("running", "stopping"):
            time.sleep(POLL_SECONDS / 4)
            state, now = self._state, self._clock()
            if state.cause is not None:
                raise UserError(state.cause.message)
            if state.missing and not announced and now - self._begin > WAITING_SECONDS:
                announced = True
                print(f"waiting for {state.missing}, up to {self._timeout:g} s (--dist-timeout)", flush=True)
            if now - self._heard > (self._timeout if state.phase == "connecting" else SILENCE_SECONDS):
                raise UserError(
                    f"--dist-url tcp://{self._address[0]}:{self._address[1]}: node {self._node} did not reach node 0 "
                    f"there within {now - self._heard:.0f} s (--dist-timeout; {self._failure}): is node 0 started, is "
                    "that its address, is the port open?")

    @property
    def alarm(self) -> bool:
        """Whether another node has failed, so that this node must stop its ranks."""
        return self._state.phase == "stopping" or self._end() is not None

    def report(self, cause: Cause | None) -> Cause | None:
        """Publish why this node's ranks ended (Record.cause), wait for the others, and return what ended the run."""
        self._record = self._record._replace(reported=True, cause=cause)
        while self._state.phase != "ended" and self._end() is None:
            time.sleep(POLL_SECONDS / 4)
        return first_cause([cause, self._end()])

    def close(self) -> None:
        """End the thread. On node 0 wait until the other nodes have read how the run ended, but not for long."""
        self._closing = self._coordinator is None or self._state.phase != "ended"
        self._thread.join(2 * POLL_SECONDS if self._closing else 2 * ANSWER_SECONDS)  # a store call may block it

    def _end(self) -> Cause | None:
        """What ended the run, as far as this node knows."""
        state, silence = self._state, self._clock() - self._heard
        if state.phase == "lost":
            return Cause("gone", f"node 0 ({self._address[0]}) is gone: its process has ended", 0)
        if state.phase != "ended" and silence > SILENCE_SECONDS:
            return _gone(0, self._address[0], silence)
        return state.cause

    def _run(self) -> None:
        while self._state.phase in ("connecting", "waiting") and not self._closing:
            try:
                self._take_part()
            except (OSError, RuntimeError, TypeError, ValueError) as error:
                self._failure = getattr(error, "strerror", None) or str(error).splitlines()[0]
                # Before the start node 0 may be started again.
                self._state = State("connecting" if self._state.phase in ("connecting", "waiting") else "lost")
                time.sleep(POLL_SECONDS)

    def _take_part(self) -> None:
        """Write this node's record and read node 0's state until the end. Raises an error if the connection fails."""
        socket.create_connection(self._address, timeout=ANSWER_SECONDS).close()  # TCPStore would not say why it fails
        store = SignedStore(dist.TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=self._timeout)),
                            self._secret)
        begin = self._clock()
        while not (facts := store.get("facts")) or not (state := _read(State, store, "state")):
            if self._clock() - begin > SILENCE_SECONDS:
                self._state = State("ended", cause=Cause(
                    "user", f"--dist-url tcp://{self._address[0]}:{self._address[1]}: node {self._node} finds no run "
                            f"with its {VARIABLE} there; is that the address of node 0? Give all nodes the same "
                            f"{VARIABLE}, or none", self._node))
                return
            time.sleep(POLL_SECONDS)
            if self._coordinator:
                self._coordinator.step()
        if state.phase not in ("waiting", "running"):
            raise ValueError("another run is ending there")
        if refusal := self._find_refusal(store, facts, state.phase):
            store.set("refusal", refusal)
            self._state = State("ended", cause=Cause("user", refusal, self._node))
            return
        while True:
            finished = self._coordinator.step() if self._coordinator else True
            state = _read(State, store, "state")
            left = state is not None and state.phase == "ended"
            store.set(f"node/{self._node}", self._record._replace(time=time.time(), left=left))
            if state is not None:  # else a stranger has overwritten it, and node 0 writes it again
                self._heard, self._state = self._clock(), state
            if left and finished or self._closing:
                return
            time.sleep(POLL_SECONDS)

    def _find_refusal(self, store: SignedStore, facts: dict[str, Any], phase: str) -> str | None:
        """Publish this node's first record, and return why it cannot take part."""
        for name, value in facts.items():
            if self._facts.get(name) != value:
                return (f"{name} is {self._facts.get(name)} on node {self._node} ({self._record.place}) and {value} on "
                        "node 0: start all nodes with the same flags and the same program")
        key = f"node/{self._node}"
        other = store.claim(key, self._record)
        if other is None or other == list(self._record):
            return None
        if phase == "waiting":  # the other one may have ended, and this one takes its place
            time.sleep(ABSENT_SECONDS)
            if store.get(key) == other:
                return None
        return (f"--rank {self._node} was given to two nodes ({Record(*other).place}; {self._record.place}): "
                f"number the nodes from 0 to {self._nodes - 1}, and give every run a port of its own")
