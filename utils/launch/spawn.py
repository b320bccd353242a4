"""The parent of a node's ranks: starts a process per rank, watches them and the other nodes, and stops them together.

A process group is always made, also for a single process, so that the training code has one path.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import signal
import socket
import sys
import time
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.errors import UserError
from utils.launch.cause import Cause, first_cause, show
from utils.launch.fingerprint import program_fingerprint
from utils.launch.multinode import NodeLink
from utils.launch.plan import ProcessPlan
from utils.launch.rank import Work, run_child, run_here
from utils.signals import EXIT_SAVED, STOP_SIGNALS, StopRequest, handle, restore

# After a rank has failed, the others fail within moments, and one of them may know the cause. Then they are killed.
_GRACE_SECONDS = 1.0
_ALARM_SECONDS = 0.2  # how often the parent looks for failures of other nodes


@dataclasses.dataclass
class _Rank:
    process: BaseProcess
    report: connection.Connection  # what it says of its failure
    exit_code: int | None = None  # None if it was killed by this parent

    @property
    def failed(self) -> bool:
        return self.exit_code not in (None, 0, EXIT_SAVED, *(128 + number for number in STOP_SIGNALS))


def launch(work: Work, plan: ProcessPlan, *args: Any) -> int:
    """Run `work(context, *args)` in every process of this node, in a process group of all nodes. Returns its status.

    `work` returns 0, None, or utils.signals.EXIT_SAVED, the same on all ranks. If a rank fails, all ranks of all nodes
    are stopped, every node prints the cause as its last words, and this process exits: with 2 for a user's mistake, 128
    + signal for a signal before training, else 1.
    """
    if plan.launcher != "spawn":
        return run_here(work, plan, args)
    # C++ threads that lose their peer print warnings, which would bury the cause.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    store = _host_store(plan) if plan.node_rank == 0 else None
    if plan.nodes == 1:
        assert store is not None
        return _end(_supervise(work, dataclasses.replace(plan, host=store.host, port=store.port), args, None), plan)
    facts = {
        "--world-size": plan.nodes, "number of processes (GPUs, or --nproc-per-node)": plan.processes_per_node,
        "program (hash of its files)": program_fingerprint(), "torch": torch.__version__,
        "--dist-backend": plan.backend,
    }
    link = NodeLink((plan.host, plan.port), node=plan.node_rank, nodes=plan.nodes, facts=facts, timeout=plan.timeout,
                    store=store)
    try:
        link.meet()
        outcome = _supervise(work, plan, args, link)
    finally:
        link.close()
    return _end(outcome, plan)


def _end(outcome: int | Cause, plan: ProcessPlan) -> int:
    """Return the exit status of success. After a failure print the cause and exit."""
    if isinstance(outcome, int):
        return outcome
    show(outcome, plan.node_rank, plan.nodes)
    sys.stdout.flush()
    os._exit(outcome.exit_status)  # not sys.exit: Python takes seconds to tear down torch


def _host_store(plan: ProcessPlan) -> dist.TCPStore:
    """The store in which the nodes and the ranks meet, which listens at the address of --dist-url. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(plan.host, plan.port, type=socket.SOCK_STREAM)[0]
        host, dual = str(address[0]), False
        # Many machines resolve their own name to the loopback, where other nodes cannot reach them.
        if plan.nodes > 1 and host != plan.host and ipaddress.ip_address(host).is_loopback:
            host, dual = "", socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server((host, plan.port), family=family, backlog=1024, dualstack_ipv6=dual)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(
            f"--dist-url {plan.url}: cannot listen on port {plan.port} there ({reason}); give "
            + ("an address of node 0 that the other nodes reach" if plan.nodes > 1 else "tcp://127.0.0.1")
            + " and a free port") from None
    port = listener.getsockname()[1]
    return dist.TCPStore(host or "localhost", port, is_master=True, wait_for_workers=False,
                         master_listen_fd=listener.detach())


def _supervise(work: Work, plan: ProcessPlan, args: tuple[Any, ...], link: NodeLink | None) -> int | Cause:
    """Start this node's ranks, and wait until all exit or are killed. Returns the exit status, or why they failed."""
    ranks = _start(work, plan, args)
    request, at_once = StopRequest(), False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal at_once
        first = request.signal is None
        at_once |= request.note(number)
        running = [rank.process for rank in ranks if rank.process.is_alive()]
        for process in running if first or at_once else ():
            assert process.pid is not None  # it was started
            os.kill(process.pid, signal.SIGKILL if at_once else number)
        if at_once and not running:  # this process only waits for other nodes
            os._exit(128 + number)

    handlers = handle(forward)
    try:
        while any(rank.exit_code is None for rank in ranks) and not any(rank.failed for rank in ranks):
            if link is not None and link.alarm:
                break
            _wait(ranks, timeout=_ALARM_SECONDS if link is not None else None)
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(rank.exit_code is None for rank in ranks) and time.monotonic() < deadline:
            _wait(ranks, timeout=deadline - time.monotonic())
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
        cause = _find_cause(ranks, plan, request, at_once)
        if link is not None:
            cause = link.report(cause)
    finally:
        # A repeated signal must not end this process in the little time that is left.
        handle(signal.SIG_IGN) if request.signal is not None else restore(handlers)
    return cause or max(rank.exit_code or 0 for rank in ranks)


def _start(work: Work, plan: ProcessPlan, args: tuple[Any, ...]) -> list[_Rank]:
    """Start the processes of this node's ranks."""
    spawning = mp.get_context("spawn")
    ranks = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing's helper inherits the mask: no stop signal may end it
        # A rank that is interrupted during its imports would print a traceback. It unblocks SIGINT in run_child.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask | {signal.SIGINT})
        for local_rank in range(plan.processes_per_node):
            reader, writer = spawning.Pipe(duplex=False)
            process = spawning.Process(target=run_child, args=(local_rank, work, plan, args, os.getpid(), writer))
            process.start()
            writer.close()
            ranks.append(_Rank(process, reader))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return ranks


def _wait(ranks: list[_Rank], timeout: float | None) -> None:
    """Wait until a rank exits, and note its exit code."""
    running = [rank for rank in ranks if rank.exit_code is None]
    ready = connection.wait([rank.process.sentinel for rank in running], timeout=timeout)
    for rank in running:
        if rank.process.sentinel in ready:
            rank.process.join()
            rank.exit_code = rank.process.exitcode


def _find_cause(ranks: list[_Rank], plan: ProcessPlan, request: StopRequest, at_once: bool) -> Cause | None:
    """Why a rank of this node failed, after all have ended. None if none failed before this parent killed it."""
    node = plan.node_rank
    if at_once:
        return Cause("stopped", "stopped at once by a second Ctrl-C; the last checkpoint is unchanged", node,
                     signal=signal.SIGINT)
    causes = []
    for local_rank, rank in enumerate(ranks):
        if not rank.failed or rank.exit_code is None:
            continue
        place = f"on node {node} ({socket.gethostname()}, process {rank.process.pid})" if plan.nodes > 1 \
            else f"(process {rank.process.pid})"
        name = f"rank {node * plan.processes_per_node + local_rank} {place}"
        report = _read_report(rank)
        if report is not None:
            if report["kind"] != "user":
                report["message"] = f"{name} failed: {report['message']}"
            causes.append(Cause(node=node, **report))
        elif request.signal is not None and rank.exit_code == -request.signal:
            where = f" on node {node}" if plan.nodes > 1 else ""
            causes.append(Cause("stopped", f"stopped by {request.signal.name}{where} before training began", node,
                                signal=request.signal))
        else:
            how = signal.Signals(-rank.exit_code).name if rank.exit_code < 0 else f"exit status {rank.exit_code}"
            hint = " (out of memory? see dmesg)" if how == "SIGKILL" else ""
            # NCCL answers the failure of another rank with SIGABRT.
            causes.append(Cause("lost" if how == "SIGABRT" else "crash", f"{name} was ended by {how}{hint}", node))
    return first_cause(causes)


def _read_report(rank: _Rank) -> dict[str, Any] | None:
    """What a rank said of its failure. None if it could not."""
    try:
        return json.loads(rank.report.recv_bytes()) if rank.report.poll() else None
    except (EOFError, OSError):
        return None
