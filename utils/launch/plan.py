"""Which processes a run consists of. The parent decides this before it starts any of them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch

from utils.errors import UserError
from utils.flags import flag

SECTION = "processes and devices"
DIST_TIMEOUT = 1800.0
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class NodeFlags:
    """The flags that decide the processes and devices of one node."""

    multiprocessing_distributed: bool = flag("--multiprocessing-distributed", default=False, section=SECTION,
                                             help="start one process per GPU of this node")
    nproc_per_node: int | None = flag(
        "--nproc-per-node", metavar="N", at_least=1, default_text="the visible GPUs, or 1", section=SECTION,
        help="with --multiprocessing-distributed: processes of this node, on the CPU too")
    device: str = flag("--device", default="auto", choices=("auto", "cuda", "cpu"), section=SECTION,
                       help="auto: GPUs if there are any")


@dataclass(frozen=True)
class ProcessFlags(NodeFlags):
    """The flags that decide all processes of a run and their devices."""

    world_size: int = flag("--world-size", default=1, metavar="N", per_node=True, section=SECTION,
                           help="number of nodes; -1 with --dist-url env:// reads WORLD_SIZE")
    rank: int = flag("--rank", default=0, metavar="R", per_node=True, section=SECTION,
                     help="number of this node, from 0; -1 with --dist-url env:// reads RANK")
    dist_url: str = flag("--dist-url", default="tcp://127.0.0.1:8000", metavar="URL", per_node=True, section=SECTION,
                         help="where the processes meet: tcp://<address of node 0>:<free port>, or env://; with one node, "
                              "port 0 is any free port")
    dist_backend: str | None = flag("--dist-backend", choices=("nccl", "gloo"), section=SECTION,
                                    default_text="nccl on GPUs, gloo on the CPU", help="backend of torch.distributed")
    dist_timeout: float = flag(
        "--dist-timeout", default=DIST_TIMEOUT, metavar="SECONDS", at_least=1, at_most=10**7, section=SECTION,
        help="how long to wait for other nodes at the start, and for other ranks in a collective, including the time "
             "that rank 0 takes to save")
    gpu: int | None = flag("--gpu", metavar="ID", at_least=0, per_node=True, section=SECTION,
                           help="the GPU of a single process")


@dataclass(frozen=True)
class ProcessPlan:
    """The processes of a run. All nodes have the same plan, except for `node_rank`."""

    launcher: str  # "spawn", "torchrun" or "single"
    nodes: int
    node_rank: int
    processes_per_node: int
    device_type: str  # "cuda" or "cpu"
    gpu: int | None  # the GPU of a single process
    backend: str
    host: str  # where the processes meet, on node 0
    port: int  # with one node, 0 means any free port
    timeout: float = DIST_TIMEOUT  # seconds to wait for other processes, at the start and in a collective

    @property
    def url(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


def plan_processes(flags: ProcessFlags) -> ProcessPlan:
    """Decide launcher, processes, device and backend. Raises UserError for flags that conflict with each other or with
    this machine."""
    _check(flags)
    device_type = choose_device_type(flags.device, flags.gpu)
    backend = flags.dist_backend or ("nccl" if device_type == "cuda" else "gloo")
    if backend == "nccl" and device_type == "cpu":
        raise UserError("--dist-backend nccl: needs GPUs, and this run uses the CPU; choose gloo")
    if _started_by_torchrun():
        return _plan_torchrun(flags, device_type, backend)

    nodes, node_rank = flags.world_size, flags.rank
    if flags.dist_url == "env://":
        nodes = _environment_number("WORLD_SIZE", "--world-size -1") if nodes == -1 else nodes
        node_rank = _environment_number("RANK", "--rank -1") if node_rank == -1 else node_rank
        if not 0 <= node_rank < nodes:
            raise UserError(f"RANK is {node_rank} with WORLD_SIZE {nodes}: nodes are numbered from 0 to {nodes - 1}")
    processes = 1
    if flags.multiprocessing_distributed:
        gpus = torch.cuda.device_count() if device_type == "cuda" else 0
        processes = flags.nproc_per_node or max(gpus, 1)
        if device_type == "cuda" and processes > gpus:
            raise UserError(f"--nproc-per-node {processes}: only {gpus} GPUs are visible; give at most {gpus}")
    host, port = _rendezvous(flags.dist_url, nodes, node_rank) if nodes * processes > 1 else ("127.0.0.1", 0)
    return ProcessPlan(
        # With several nodes even a single process has a parent, because the parents watch each other.
        launcher="spawn" if flags.multiprocessing_distributed or nodes > 1 else "single",
        nodes=nodes, node_rank=node_rank, processes_per_node=processes,
        device_type=device_type, gpu=flags.gpu, backend=backend, host=host, port=port, timeout=flags.dist_timeout,
    )


def plan_node(flags: NodeFlags) -> ProcessPlan:
    """The plan of a program that runs on this node alone; its processes meet at any free port. Raises UserError."""
    return plan_processes(ProcessFlags(
        multiprocessing_distributed=flags.multiprocessing_distributed, nproc_per_node=flags.nproc_per_node,
        device=flags.device, dist_url="tcp://127.0.0.1:0",
    ))


def choose_device_type(device: str, gpu: int | None = None) -> str:
    """"cuda" or "cpu" for --device auto|cuda|cpu and --gpu. Raises UserError for a GPU that PyTorch does not see."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or device == "auto" and gpu is None and not gpus:
        return "cpu"
    if not gpus:
        given = "--device cuda" if device == "cuda" else f"--gpu {gpu}"
        raise UserError(f"{given}: PyTorch sees no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu")
    if gpu is not None and gpu >= gpus:
        raise UserError(f"--gpu {gpu}: the visible GPUs are 0 to {gpus - 1}")
    return "cuda"


def is_first_process() -> bool:
    """Whether this process prints for its node before the process group exists. torchrun starts several processes."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 if _started_by_torchrun() else True


def _check(flags: ProcessFlags) -> None:
    """Raise UserError for process flags that conflict with each other."""
    nodes, from_environment = flags.world_size, flags.dist_url == "env://"
    for conflict, message in (
        (flags.nproc_per_node is not None and not flags.multiprocessing_distributed,
         f"--nproc-per-node {flags.nproc_per_node}: has no effect without --multiprocessing-distributed; add it"),
        (flags.gpu is not None and flags.multiprocessing_distributed,
         f"--gpu {flags.gpu}: is for a single process; with --multiprocessing-distributed choose GPUs with the "
         "environment variable CUDA_VISIBLE_DEVICES"),
        (flags.gpu is not None and flags.device == "cpu", f"--gpu {flags.gpu} with --device cpu: drop one of them"),
        (nodes < 1 and not (nodes == -1 and from_environment),
         f"--world-size {nodes}: give the number of nodes, at least 1"),
        (nodes != -1 and not 0 <= flags.rank < nodes and not (flags.rank == -1 and from_environment),
         f"--rank {flags.rank}: nodes are numbered from 0 to --world-size - 1 = {nodes - 1}"),
        (not from_environment and not flags.dist_url.startswith("tcp://"),
         f"--dist-url {flags.dist_url}: give tcp://<address of node 0>:<free port>, or env://"),
    ):
        if conflict:
            raise UserError(message)


def _started_by_torchrun() -> bool:
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def _plan_torchrun(flags: ProcessFlags, device_type: str, backend: str) -> ProcessPlan:
    """The plan from torchrun's variables. --multiprocessing-distributed is allowed and changes nothing."""
    for given, text in (
        (flags.nproc_per_node is not None, f"--nproc-per-node {flags.nproc_per_node}"),
        (flags.world_size not in (1, -1), f"--world-size {flags.world_size}"),
        (flags.rank not in (0, -1), f"--rank {flags.rank}"),
        (flags.gpu is not None, f"--gpu {flags.gpu}"),
    ):
        if given:
            raise UserError(f"{text}: torchrun decides the processes of this run; drop the flag, or drop torchrun")
    processes, world_size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if world_size % processes:
        raise UserError(f"torchrun started {world_size} processes, {processes} of them on this node: "
                        "all nodes need the same number")
    if device_type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"torchrun --nproc-per-node {processes}: only {torch.cuda.device_count()} GPUs are visible")
    return ProcessPlan(
        launcher="torchrun",
        nodes=world_size // processes, node_rank=int(os.environ["RANK"]) // processes, processes_per_node=processes,
        device_type=device_type, gpu=None, backend=backend,
        host=os.environ["MASTER_ADDR"], port=_environment_number("MASTER_PORT", "torchrun"), timeout=flags.dist_timeout,
    )


def _environment(name: str, given: str) -> str:
    if name not in os.environ:
        raise UserError(f"{given} with --dist-url env://: the environment variable {name} is not set")
    return os.environ[name]


def _environment_number(name: str, given: str) -> int:
    text = _environment(name, given)
    if not text.isdigit():
        raise UserError(f"{given} with --dist-url env://: the environment variable {name} is {text!r}, not a number")
    return int(text)


def _rendezvous(url: str, nodes: int, node_rank: int) -> tuple[str, int]:
    """(host, port) of --dist-url. Node 0 listens there, so its port must be free; a single node may use port 0, any
    free one. Raises UserError."""
    host: str | None
    port: int | None
    if url == "env://":
        host, port = _environment("MASTER_ADDR", "--dist-url"), _environment_number("MASTER_PORT", "--dist-url")
    else:
        try:
            host, port = urlsplit(url).hostname, urlsplit(url).port
        except ValueError:
            host, port = None, None
        if not host or port is None or port == 0 and nodes > 1:
            raise UserError(f"--dist-url {url}: give tcp://<address of node 0>:<free port>, such as tcp://127.0.0.1:8000")
    if node_rank != 0:
        return host, port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"--dist-url {url}: cannot listen on port {port} ({error.strerror}); another run may use "
                            f"it: give a free port, such as tcp://{host}:{port + 1}") from None
    return host, port
