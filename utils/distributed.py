"""Processes: planned before they start, started, joined into one group, and stopped together; collectives with gradients.

One process per GPU. A process group is always made, a group of one as well, so that the training code has one path.
"""

from __future__ import annotations

import fcntl
import hashlib
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
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError
from utils.nodes import Cause, Coordinator, NodeLink, first_cause, program_fingerprint, show
from utils.options import DIST_TIMEOUT, Options
from utils.preemption import EXIT_SAVED, STOP_SIGNALS, StopRequest, end_with_parent, handle, restore

# torch 2.14 renamed these two and warns of the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# After a rank has failed, for the others to fail by themselves, before they are killed: one of them may know the cause.
_GRACE_SECONDS = 1.0
_SIOCGIFADDR = 0x8915  # of netdevice(7): an interface's IPv4 address


@dataclass(frozen=True)
class ProcessPlan:
    """Which processes the run consists of. Made in the parent, the same on every node but for `node_rank`."""

    launcher: str  # "spawn", "torchrun" or "single"
    nodes: int
    node_rank: int
    processes_per_node: int
    device_type: str  # "cuda" or "cpu"
    gpu: int | None  # the GPU of a single process
    backend: str
    host: str  # where the processes meet, on node 0
    port: int  # with one node 0 may stand for any free port
    timeout: float = DIST_TIMEOUT  # seconds to wait for other processes, at the start and in a collective

    @property
    def url(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass(frozen=True)
class Worker:
    """This process among all: rank of world_size (W), and its device."""

    rank: int
    world_size: int
    processes_per_node: int
    device: torch.device

    @property
    def nodes(self) -> int:
        return self.world_size // self.processes_per_node

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0


# ---------------------------------------------------------------------------------------------------------------------
# Before the processes start


def plan_processes(options: Options) -> ProcessPlan:
    """Decide launcher, processes, device and backend. Raises UserError for what this machine cannot do."""
    device_type = _device_type(options)
    backend = options.dist_backend or ("nccl" if device_type == "cuda" else "gloo")
    if backend == "nccl" and device_type == "cpu":
        raise UserError("--dist-backend nccl: works on GPUs only, and this run is on the CPU; use gloo")
    if _started_by_torchrun():
        return _plan_torchrun(options, device_type, backend)

    nodes, node_rank = options.world_size, options.rank
    if options.dist_url == "env://":
        nodes = _environment_number("WORLD_SIZE", "--world-size -1") if nodes == -1 else nodes
        node_rank = _environment_number("RANK", "--rank -1") if node_rank == -1 else node_rank
        if not 0 <= node_rank < nodes:
            raise UserError(f"RANK is {node_rank} with WORLD_SIZE {nodes}: nodes are numbered from 0 to {nodes - 1}")
    processes = 1
    if options.multiprocessing_distributed:
        gpus = torch.cuda.device_count() if device_type == "cuda" else 0
        processes = options.nproc_per_node or max(gpus, 1)
        if device_type == "cuda" and processes > gpus:
            raise UserError(f"--nproc-per-node {processes}: only {gpus} GPUs are visible; give at most {gpus}")
    host, port = _rendezvous(options.dist_url, node_rank) if nodes * processes > 1 else ("127.0.0.1", 0)
    return ProcessPlan(
        # Also one process a node has a parent, for the nodes to watch one another.
        launcher="spawn" if options.multiprocessing_distributed or nodes > 1 else "single",
        nodes=nodes, node_rank=node_rank, processes_per_node=processes,
        device_type=device_type, gpu=options.gpu, backend=backend, host=host, port=port, timeout=options.dist_timeout,
    )


def _device_type(options: Options) -> str:
    wants_gpu = options.device == "cuda" or options.gpu is not None
    if options.device == "cpu" or not (torch.cuda.is_available() or wants_gpu):
        return "cpu"
    if not torch.cuda.is_available():
        flag = "--device cuda" if options.device == "cuda" else f"--gpu {options.gpu}"
        raise UserError(f"{flag}: PyTorch sees no GPU on this machine; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    if options.gpu is not None and options.gpu >= torch.cuda.device_count():
        raise UserError(f"--gpu {options.gpu}: the visible GPUs are 0 to {torch.cuda.device_count() - 1}")
    return "cuda"


def _started_by_torchrun() -> bool:
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def _plan_torchrun(options: Options, device_type: str, backend: str) -> ProcessPlan:
    """torchrun has started the processes already: its variables say all, --multiprocessing-distributed adds nothing."""
    for flag, given in (
        (f"--nproc-per-node {options.nproc_per_node}", options.nproc_per_node is not None),
        (f"--world-size {options.world_size}", options.world_size not in (1, -1)),
        (f"--rank {options.rank}", options.rank not in (0, -1)),
        (f"--gpu {options.gpu}", options.gpu is not None),
    ):
        if given:
            raise UserError(f"{flag}: torchrun decides the processes of this run; drop the flag, or start without torchrun")
    processes, world_size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if world_size % processes:
        raise UserError(f"torchrun started {world_size} processes, {processes} of them on this node: all nodes need as many")
    if device_type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"torchrun --nproc-per-node {processes}: only {torch.cuda.device_count()} GPUs are visible")
    return ProcessPlan(
        launcher="torchrun",
        nodes=world_size // processes, node_rank=int(os.environ["RANK"]) // processes, processes_per_node=processes,
        device_type=device_type, gpu=None, backend=backend,
        host=os.environ["MASTER_ADDR"], port=_environment_number("MASTER_PORT", "torchrun"), timeout=options.dist_timeout,
    )


def _environment(name: str, flag: str) -> str:
    if name not in os.environ:
        raise UserError(f"{flag} with --dist-url env://: the environment variable {name} is not set")
    return os.environ[name]


def _environment_number(name: str, flag: str) -> int:
    text = _environment(name, flag)
    if not text.isdigit():
        raise UserError(f"{flag} with --dist-url env://: the environment variable {name} is {text!r}, not a number")
    return int(text)


def _rendezvous(url: str, node_rank: int) -> tuple[str, int]:
    """(host, port) of --dist-url. It must be complete, and on node 0, which listens there, the port must be free."""
    if url == "env://":
        host, port = _environment("MASTER_ADDR", "--dist-url"), _environment_number("MASTER_PORT", "--dist-url")
    else:
        try:
            host, port = urlsplit(url).hostname, urlsplit(url).port
        except ValueError:
            host, port = None, None
        if not host or not port:
            raise UserError(f"--dist-url {url}: give tcp://<address of node 0>:<free port>, such as tcp://127.0.0.1:8000")
    if node_rank != 0:
        return host, port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"--dist-url {url}: cannot listen on port {port} ({error.strerror}); another run may be using "
                            f"it: give a free port, such as tcp://{host}:{port + 1}") from None
    return host, port


def is_first_process() -> bool:
    """True in the one process of a node that speaks before the group exists (torchrun starts several)."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 if _started_by_torchrun() else True


# ---------------------------------------------------------------------------------------------------------------------
# Starting and stopping


def launch(work: Callable[..., int | None], plan: ProcessPlan, *args: Any) -> int:
    """Run `work(worker, *args)` in every process of this node, within a process group of all nodes; return its exit status.

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
    context = mp.get_context("spawn")
    processes = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # multiprocessing's helper, which is not to be ended by SIGUSR1 either
        signal.pthread_sigmask(signal.SIG_SETMASK, mask | {signal.SIGINT})
        for local_rank in range(plan.processes_per_node):
            process = context.Process(target=_child, args=(local_rank, os.getpid(), work, plan, store_port, args, reports))
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
    worker = _join_group(local_rank, plan, store_port)
    status = work(worker, *args)
    handle(signal.SIG_IGN)  # what is left is the orderly end
    # Only after success: after a failure the others may never come, and tearing down would wait for them.
    dist.barrier()
    dist.destroy_process_group()
    return status or 0


def _join_group(local_rank: int, plan: ProcessPlan, store_port: int) -> Worker:
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
    return Worker(rank=rank, world_size=plan.world_size, processes_per_node=plan.processes_per_node, device=device)


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


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Collective over the group. The sum over its ranks, as a new tensor without a graph; `group` None: this process alone."""
    if group is None:
        return tensor
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Collective over the group. (n, ...) of every rank -> (n * W, ...) in rank order, without a graph."""
    gathered = rows.new_empty(rows.shape[0] * dist.get_world_size(group), *rows.shape[1:])
    _all_gather(gathered, rows.detach().contiguous(), group=group)
    return gathered


class GatherRows(torch.autograd.Function):
    """Collective over the group, both ways. `GatherRows.apply(rows (n, d), group) -> (n * W, d)` in rank order.

    Backward sums the ranks' parts of the gradient and gives each rank that of its own rows, times W: the rows come from
    a backbone under DistributedDataParallel, which averages gradients over the W ranks, where the gradient of a loss that is
    already the mean over all rows is their sum. Without the factor the backbone would learn W times too slowly.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_rows(rows, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        world_size = dist.get_world_size(ctx.group)
        mine = grad.new_empty(grad.shape[0] // world_size, *grad.shape[1:])
        _reduce_scatter(mine, grad.contiguous(), group=ctx.group)
        return mine * world_size, None


def broadcast_integer(value: int, device: torch.device) -> int:
    """Collective. Rank 0's value, below 2**63, on every rank."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=0)
    return int(tensor)


def require_same_on_all_ranks(worker: Worker, facts: dict[str, object]) -> None:
    """Collective. Raise UserError, naming the first difference, unless every rank gives the facts that rank 0 gives.

    Nodes that differ in them would train something else than they were asked to, without a word, or wait for ever.
    """
    of_rank_0 = [facts]
    dist.broadcast_object_list(of_rank_0, src=0, device=worker.device)
    mine = {name: value for name, value in facts.items() if value != of_rank_0[0].get(name)}
    # The first rank that differs tells all.
    differing = torch.tensor(worker.rank if mine else worker.world_size, device=worker.device)
    dist.all_reduce(differing, op=dist.ReduceOp.MIN)
    if differing < worker.world_size:
        difference = [next(iter(mine.items()), None)]
        dist.broadcast_object_list(difference, src=int(differing), device=worker.device)
        name, value = difference[0]
        raise UserError(f"{name} is {value} on rank {int(differing)} and {of_rank_0[0].get(name)} on rank 0: "
                        "give every node the same flags and the same data")


def fix_gradient_buckets(model: DistributedDataParallel) -> None:
    """Collective. Let DistributedDataParallel decide now, as in every run, where in its buckets a gradient lies.

    It does so once, after its first backward pass, by the order in which the gradients came. Where a number lies in a bucket is
    the order in which three or more ranks add it up: the first step of a resumed run would differ from the same step of the
    run that went on. So the first backward pass is one that costs nothing, of a sum of all parameters, whose gradients come
    last parameter first, as they do in training. Its gradients are thrown away.
    """
    averaged = [
        parameter for name, parameter in model.module.named_parameters()
        if parameter.requires_grad and name not in model.parameters_to_ignore
    ]
    model.module.forward = lambda anchor: torch.stack([parameter.sum() for parameter in averaged]).sum() + anchor
    try:
        # With GPUs DistributedDataParallel takes it for granted that there is an input.
        model(averaged[0].new_zeros(())).backward()  # the buckets are laid out at the beginning of the next forward pass, whatever that is
    finally:
        del model.module.forward  # the class's own is there again
    for parameter in averaged:
        parameter.grad = None


def seed_random_numbers(seed: int, micro_batch: int, worker: Worker) -> None:
    """Make what torch draws next a function of the run's seed, the micro-batch (counted over all steps) and the rank.

    The backbones draw nothing; one that does (dropout, say) sees the same in a resumed run, and there is no state to save.
    """
    digest = hashlib.blake2b(f"{seed} {micro_batch} {worker.rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1  # torch takes 63 bits
    torch.default_generator.manual_seed(value)
    if worker.device.type == "cuda":
        torch.cuda.manual_seed(value)


class AllReduceSum(torch.autograd.Function):
    """Collective over all ranks, both ways: the sum of the ranks' tensors, for a loss that is the sum of all ranks'."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor, dist.group.WORLD)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad, dist.group.WORLD)
