"""Which processes a run consists of, decided before any of them starts."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch

from utils.errors import UserError
from utils.options import DIST_TIMEOUT, Options

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
