"""Processes: planned before they start, started, joined into one group, and stopped together; collectives with gradients.

One process per GPU. A process group is always made, a group of one as well, so that the training code has one path.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils.dist.context import DistContext
from utils.errors import UserError
from utils.launch.fingerprint import program_fingerprint
from utils.launch.multinode import Cause, Coordinator, NodeLink, first_cause, show
from utils.launch.plan import ProcessPlan
from utils.signals import EXIT_SAVED, STOP_SIGNALS, StopRequest, end_with_parent, handle, restore

# After a rank has failed, for the others to fail by themselves, before they are killed: one of them may know the cause.
_GRACE_SECONDS = 1.0
_SIOCGIFADDR = 0x8915  # of netdevice(7): an interface's IPv4 address


# ---------------------------------------------------------------------------------------------------------------------
# Starting and stopping


def launch(work: Callable[..., int | None], plan: ProcessPlan, *args: Any) -> int:
    """Run `work(context, *args)` in every process of this node, within a process group of all nodes; return its exit status.

    `work` returns 0 or None, or utils.preemption.EXIT_SAVED, the same on all ranks. If a process fails, those of all nodes
    are stopped, the cause alone is shown, last, and this process exits: 2 for a user's mistake, 128 + signal for a signal
    that came before training, else 1.
    """
    if plan.launcher != "spawn":
        if plan.launcher == "torchrun":
            end_with_parent(os.getppid())
        try:
            return _run(int(os.environ["LOCAL_RANK"]) if plan.launcher == "torchrun" else 0, work, plan, plan.port, args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)  # not sys.exit: see _child
        finally:
            _end_loaders()  # Python's exit would wait for them
    # The messages of C++ threads that lose their peer would bury the one error that matters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    store = _host_store(plan) if plan.node_rank == 0 else None  # lives as long as this function
    coordinator = link = None
    if plan.nodes == 1:
        store_port = store.port
    else:
        facts = {"--world-size": plan.nodes, "number of processes (GPUs, or --nproc-per-node)": plan.processes_per_node,
                 "program (hash of its files)": program_fingerprint(), "torch": torch.__version__,
                 "--dist-backend": plan.backend}
        if plan.node_rank == 0:
            coordinator = Coordinator(port=plan.port, nodes=plan.nodes, facts=facts, store_port=store.port, timeout=plan.timeout)
        link = NodeLink(host=plan.host, port=plan.port, node=plan.node_rank, nodes=plan.nodes, facts=facts, timeout=plan.timeout)
    try:
        if link is not None:
            store_port = link.meet()
        return _supervise(work, plan, store_port, args, link)
    finally:
        if coordinator is not None:
            coordinator.close()


def _host_store(plan: ProcessPlan) -> dist.TCPStore:
    """The store in which this node's and the others' ranks make their group. It must outlive them: so it is the parent's."""
    port = plan.port if plan.nodes == 1 else 0  # with several nodes they meet at plan.port, and hear of this one there
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(f"--dist-url {plan.url}: cannot listen there ({str(error).splitlines()[0]}); another run may be using "
                        "the port: give a free one") from None
    if plan.nodes == 1:
        try:
            socket.create_connection((plan.host, store.port), timeout=min(10.0, plan.timeout)).close()
        except OSError as error:
            raise UserError(f"--dist-url {plan.url}: this machine cannot reach itself there ({error.strerror or error}); with one "
                            "node give tcp://127.0.0.1:<free port>") from None
    return store


def _supervise(work: Callable[..., int | None], plan: ProcessPlan, store_port: int, args: tuple, link: NodeLink | None) -> int:
    """Start the ranks of this node and stay until they have ended, by themselves or by what this function does to them."""
    reports = tempfile.mkdtemp(prefix="arcface-errors-")
    processes = _start(work, plan, store_port, args, reports)
    request, ended = StopRequest(), {}
    at_once = False

    def forward(number: int, frame: object) -> None:
        nonlocal at_once
        first = request.signal is None
        at_once |= request.note(number)
        running = [process.pid for process in processes if process.is_alive()]
        for pid in running if first or at_once else ():
            os.kill(pid, signal.SIGKILL if at_once else number)
        if at_once and not running:  # only other nodes are waited for
            os._exit(128 + number)

    before = handle(forward)
    try:
        while len(ended) < len(processes) and not any(map(_is_failure, ended.values())) and not (link and link.alarm):
            _collect(processes, ended, timeout=0.5 if link else None)
        # The others fail by themselves now, most of them, and what they report may be the cause.
        deadline = time.monotonic() + _GRACE_SECONDS
        while len(ended) < len(processes) and time.monotonic() < deadline:
            _collect(processes, ended, timeout=deadline - time.monotonic())
        for process in processes:
            process.kill()
            process.join()
        cause = _cause(processes, ended, plan, reports, request, at_once)
        if link is not None:
            cause = link.report(cause)
    finally:
        shutil.rmtree(reports, ignore_errors=True)
        # A signal that is repeated must not end this process in the little time that is left.
        handle(signal.SIG_IGN) if request.signal is not None else restore(before)
    if cause is not None:
        show(cause, plan.node_rank, plan.nodes)
        sys.exit(cause.exit_status)
    return max(ended.values())


def _is_failure(exit_code: int) -> bool:
    return exit_code not in (0, EXIT_SAVED, *(128 + number for number in STOP_SIGNALS))


def _collect(processes: list, ended: dict[int, int], timeout: float | None) -> None:
    """Wait until processes end, and note the exit codes of those that have ended by themselves."""
    running = {process.sentinel: local_rank for local_rank, process in enumerate(processes) if local_rank not in ended}
    for sentinel in connection.wait(list(running), timeout=timeout):
        process = processes[running[sentinel]]
        process.join()
        ended[running[sentinel]] = process.exitcode


def _start(work: Callable[..., int | None], plan: ProcessPlan, store_port: int, args: tuple, reports: str) -> list:
    """The processes of this node's ranks. Python would answer a Ctrl-C during their imports by a traceback: it waits (_child)."""
    spawning = mp.get_context("spawn")
    processes = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing's helper, which is not to be ended by SIGUSR1 either
        signal.pthread_sigmask(signal.SIG_SETMASK, mask | {signal.SIGINT})
        for local_rank in range(plan.processes_per_node):
            process = spawning.Process(target=_child, args=(local_rank, os.getpid(), work, plan, store_port, args, reports))
            process.start()
            processes.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return processes


def _child(
    local_rank: int, parent: int, work: Callable[..., int | None], plan: ProcessPlan, store_port: int, args: tuple, reports: str
) -> None:
    end_with_parent(parent)
    handle(signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        status = _run(local_rank, work, plan, store_port, args)
    except BaseException as error:
        report = {
            "kind": "user" if isinstance(error, UserError) else "lost" if _lost_connection(error) else "error",
            # The moment of failure tells the cause from the failures that follow from it: peers that lose their connection.
            "time": time.time(),
            "message": str(error) if isinstance(error, UserError) else traceback.format_exception_only(error)[-1].splitlines()[0],
            "traceback": traceback.format_exc(),
        }
        path = os.path.join(reports, str(local_rank))
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(report, file)
        os.replace(path + ".part", path)
        _end_loaders()
        # Not sys.exit: an orderly exit may wait for ever for a collective that the others never join.
        os._exit(1)
    _end_loaders()
    sys.exit(status)


def _end_loaders() -> None:
    loaders = multiprocessing.active_children()
    if loaders:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's own answer is an error, which would hide the one there is
    for loader in loaders:
        loader.kill()  # they ignore SIGTERM


def _lost_connection(error: BaseException) -> bool:
    """Whether a rank failed because it misses another one: of NCCL, of a store, or (a plain RuntimeError) of gloo."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and (
        "gloo" in str(error) or "Connection closed by peer" in str(error))


def _cause(
    processes: list, ended: dict[int, int], plan: ProcessPlan, reports: str, request: StopRequest, at_once: bool
) -> Cause | None:
    """Why ranks of this node, all of which have ended, did so by themselves (`ended`: their exit codes); None: well, or not."""
    if at_once:
        return Cause("stopped", "stopped at once by a second Ctrl-C; the last checkpoint is as it was", plan.node_rank,
                     signal=request.signal)
    several = plan.nodes > 1
    causes = []
    for local_rank, code in ended.items():
        rank, process = plan.node_rank * plan.processes_per_node + local_rank, processes[local_rank].pid
        where = f"rank {rank} on node {plan.node_rank} ({socket.gethostname()}, process {process})" if several \
            else f"rank {rank} (process {process})"
        path = os.path.join(reports, str(local_rank))
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                report = json.load(file)
            if report["kind"] != "user":
                report["message"] = f"{where} failed: {report['message']}"
            causes.append(Cause(node=plan.node_rank, **report))
        elif request.signal is not None and code == -request.signal:
            causes.append(Cause("stopped", f"stopped by {request.signal.name}" + (f" on node {plan.node_rank}" if several else "")
                                + " before training began", plan.node_rank, signal=request.signal))
        elif _is_failure(code):
            # It was killed or crashed without a word. SIGABRT is how NCCL answers another rank's failure.
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            hint = " (out of memory? see dmesg)" if name == "SIGKILL" else ""
            causes.append(Cause("lost" if name == "SIGABRT" else "crash", f"{where} was ended by {name}{hint}", plan.node_rank))
    return first_cause(causes)


def _run(local_rank: int, work: Callable[..., int | None], plan: ProcessPlan, store_port: int, args: tuple) -> int:
    context = _join_group(local_rank, plan, store_port)
    status = work(context, *args)
    handle(signal.SIG_IGN)  # what is left is the orderly end
    # Only after success: after a failure the others may never come, and tearing down would wait for them.
    dist.barrier()
    dist.destroy_process_group()
    return status or 0


def _join_group(local_rank: int, plan: ProcessPlan, store_port: int) -> DistContext:
    """Collective. Set up this process (device, threads) and make the process group."""
    rank = plan.node_rank * plan.processes_per_node + local_rank
    if plan.device_type == "cuda":
        device = torch.device("cuda", plan.gpu if plan.gpu is not None else local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // plan.processes_per_node))
    timeout = timedelta(seconds=plan.timeout)
    common = dict(backend=plan.backend, world_size=plan.world_size, rank=rank, timeout=timeout,
                  device_id=device if plan.backend == "nccl" else None)
    if "GLOO_SOCKET_IFNAME" not in os.environ and plan.world_size > 1:
        interface = _interface_towards(plan.host)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        if plan.launcher == "torchrun":
            store, _, _ = next(dist.rendezvous("env://", rank, plan.world_size, timeout=timeout))
            # torchrun's store may outlive the ranks, and then holds the addresses of those before a restart.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            dist.init_process_group(store=dist.PrefixStore(f"attempt-{attempt}", store), **common)
        elif plan.world_size == 1:
            dist.init_process_group(store=dist.HashStore(), **common)  # a group of one needs no port
        else:
            # With one node the store is on this machine, whatever else may answer at the address.
            host = "127.0.0.1" if plan.nodes == 1 else plan.host
            store = dist.TCPStore(host, store_port, is_master=False, timeout=timeout)
            dist.init_process_group(store=dist.PrefixStore("ranks", store), **common)
    except RuntimeError as error:  # DistError of stores and NCCL, and a plain one of gloo
        raise UserError(f"--dist-url {plan.url}: rank {rank} cannot connect to the others ({str(error).splitlines()[0]}); do the "
                        "nodes reach each other at any port? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network "
                        "interface to use") from error
    return DistContext(rank=rank, world_size=plan.world_size, processes_per_node=plan.processes_per_node, device=device)


def _interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches `host` over IPv4, or has its address; None: cannot be told.

    gloo by itself takes the interface of the machine's own name, which often is that of 127.0.0.1: no other node reaches it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    request = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:  # has no address
                    continue
                if socket.inet_ntoa(request[20:24]) == mine:
                    return name
    except OSError:
        pass
    return None
