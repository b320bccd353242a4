"""The parent of a node's ranks: starts a process per rank, watches them and the other nodes, and stops them together.

A process group is always made, also for a single process, so that the training code has one path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import json
import math
import os
import resource
import signal
import socket
import sys
import time
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.errors import UserError, printable
from utils.launch.fingerprint import program_fingerprint
from utils.launch.multinode import Cause, NodeLink, first_cause
from utils.launch.plan import ProcessPlan
from utils.launch.rank import Work, run_child, run_here
from utils.launch.secret import draw_secret
from utils.signals import EXIT_SAVED, STOP_SIGNALS, StopRequest, describe_death, handle

# After a rank has failed, the others fail within moments, and one of them may know the cause. Then they are killed.
_GRACE_SECONDS = 1.0
_POLL_SECONDS = 0.2  # how often the parent looks for failures of other nodes
_SUCCESS = (0, EXIT_SAVED, *(128 + number for number in STOP_SIGNALS))


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
    if plan.nodes == 1:
        draw_secret()
    store = _host_store(plan) if plan.node_rank == 0 else None
    if store is not None and plan.nodes == 1:
        outcome = _supervise(work, dataclasses.replace(plan, host=store.host, port=store.port), args, None)
    else:
        facts = {
            "--world-size": plan.nodes, "number of processes (GPUs, or --nproc-per-node)": plan.processes_per_node,
            "program (hash of its files)": program_fingerprint(), "torch": torch.__version__,
            "--dist-backend": plan.backend,
        }
        link = NodeLink((plan.host, plan.port), node=plan.node_rank, nodes=plan.nodes, facts=facts,
                        timeout=plan.timeout, store=store)
        with contextlib.closing(link):
            link.meet()
            outcome = _supervise(work, plan, args, link)
    if isinstance(outcome, int):
        return outcome
    sys.stdout.flush()
    if outcome.node == plan.node_rank:
        print(outcome.traceback, end="", file=sys.stderr)
    before, after = {"stopped": ("", ""), "user": ("error: ", "")}.get(
        outcome.kind, ("error: ", "; all ranks were stopped"))
    print(f"{before}{printable(outcome.message)}{after}", file=sys.stderr, flush=True)
    os._exit(outcome.exit_status)  # not sys.exit: Python takes seconds to tear down torch


def _host_store(plan: ProcessPlan) -> dist.TCPStore:
    """The store in which the nodes and the ranks meet, which listens at the address of --dist-url. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(plan.host, plan.port, type=socket.SOCK_STREAM)[0]
        host = str(address[0])
        # Many machines resolve their own name to the loopback, where other nodes cannot reach them.
        if plan.nodes > 1 and host != plan.host and ipaddress.ip_address(host).is_loopback:
            family, host = socket.AF_INET, ""  # all IPv4 addresses
        try:
            listener = socket.create_server((host, plan.port), family=family, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or plan.nodes == 1:
                raise
            # Not an address of this machine, but perhaps one that leads to it, as behind NAT.
            listener = socket.create_server(("", plan.port), backlog=1024)
            host = ""
    except OSError as error:
        remedy = {
            errno.EACCES: "ports below 1024 are for root; give another one, such as 8000",
            errno.EADDRINUSE: "another program uses it, perhaps another run; give another port"
                              + (", or 0 for any free one" if plan.nodes == 1 else ", the same on all nodes"),
        }.get(error.errno or 0, "give an address of node 0 that the other nodes reach, and a free port")
        raise UserError(f"--dist-url {plan.url}: cannot listen on port {plan.port} there ({error.strerror}); {remedy}"
                        ) from None
    # Idle connections of strangers must not use up the descriptors, of which a process often has 1,024 unless it asks.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return dist.TCPStore(host or "localhost", listener.getsockname()[1], is_master=True, wait_for_workers=False,
                         master_listen_fd=listener.detach())


def _supervise(work: Work, plan: ProcessPlan, args: tuple[Any, ...], link: NodeLink | None) -> int | Cause:
    """Start this node's ranks, and wait until all exit or are killed. Returns the exit status, or why they failed."""
    saved, saved_writer = mp.get_context("spawn").Pipe(duplex=False)  # `saved` is readable once nothing is left to save
    processes, reports = _start(work, plan, args, saved_writer)
    request = StopRequest()

    def running() -> list[BaseProcess]:
        return [process for process in processes if process.exitcode is None]

    def forward(number: int, frame: FrameType | None) -> None:
        targets = running()
        if targets and saved.poll():
            return
        first = request.signal is None
        request.note(number)
        for process in targets if first or request.at_once else ():
            assert process.pid is not None  # it was started
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL if request.at_once else number)
        if request.at_once and not targets:  # this process only waits for other nodes
            os._exit(128 + number)

    handlers = handle(forward)
    try:
        deadline = math.inf
        while (waiting := running()) and (now := time.monotonic()) < deadline:
            failed = any(process.exitcode not in (None, *_SUCCESS) for process in processes)
            if deadline == math.inf and (failed or link is not None and link.alarm):
                deadline = now + _GRACE_SECONDS
            connection.wait([process.sentinel for process in waiting], timeout=min(_POLL_SECONDS, deadline - now))
        codes = [process.exitcode or 0 for process in processes]  # those that are killed now have not failed
        for process in processes:
            process.kill()
            process.join()
        cause = first_cause(
            _explain(code, report, f"rank {plan.node_rank * plan.processes_per_node + local_rank} on node "
                     f"{plan.node_rank} ({socket.gethostname()}, process {processes[local_rank].pid})", plan, request)
            for local_rank, (code, report) in enumerate(zip(codes, reports)) if code not in _SUCCESS)
        if link is not None:
            cause = link.report(cause)
    finally:
        # A signal must not end this process in the little time that is left, when the status is decided.
        decided = request.signal is not None or saved.poll()
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_IGN if decided else handler)
    return cause or max(codes)


class _Task:
    """What a rank is given: Work, plan and arguments. It arrives as bytes, which the rank unpickles when it can report
    an error of that, such as an index that has changed meanwhile."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        return bytes, (bytes(ForkingPickler.dumps(self._parts)),)


def _start(work: Work, plan: ProcessPlan, args: tuple[Any, ...], saved: Connection
           ) -> tuple[list[BaseProcess], list[Connection]]:
    """Start the processes of this node's ranks. Returns them, and the pipes through which they say why they failed."""
    spawning = mp.get_context("spawn")
    processes: list[BaseProcess] = []
    reports: list[Connection] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing's helper inherits the mask: no stop signal may end it
        # A rank that is interrupted during its imports would print a traceback. It unblocks SIGINT in run_child.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask | {signal.SIGINT})
        for local_rank in range(plan.processes_per_node):
            reader, writer = spawning.Pipe(duplex=False)
            process = spawning.Process(target=run_child,
                                       args=(local_rank, _Task(work, plan, args), os.getpid(), writer, saved))
            process.start()
            writer.close()
            processes.append(process)
            reports.append(reader)
    except OSError as error:  # no memory, or too many processes
        raise UserError(f"--nproc-per-node: process {len(processes) + 1} of {plan.processes_per_node} of this node "
                        f"cannot be started ({error.strerror}); start fewer, or raise the limit (ulimit -u)") from None
    finally:
        if len(processes) < plan.processes_per_node:
            for started in processes:
                started.kill()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return processes, reports


def _explain(code: int, report: Connection, rank: str, plan: ProcessPlan, request: StopRequest) -> Cause:
    """Why a rank of this node failed with the exit code `code`."""
    node = plan.node_rank
    if request.at_once:
        return Cause("stopped", "stopped at once by a second Ctrl-C; the last checkpoint is unchanged", node,
                     signal=signal.SIGINT)
    with contextlib.suppress(EOFError, OSError):  # nothing was said
        if report.poll():
            said = Cause(node=node, **json.loads(report.recv_bytes()))
            subject = f"{rank} failed: " if said.kind != "user" else f"node {node}: " if plan.nodes > 1 else ""
            return said._replace(message=subject + said.message)
    if request.signal is not None and code == -request.signal:
        return Cause("stopped", f"stopped by {request.signal.name} on node {node} before training began", node,
                     signal=request.signal)
    how = describe_death(-code) if code < 0 else f"exit status {code}"
    # NCCL answers the failure of another rank with SIGABRT.
    return Cause("lost" if how == "SIGABRT" else "crash", f"{rank} was ended by {how}", node)
