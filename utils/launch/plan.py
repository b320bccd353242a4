"""Which processes a run consists of. The parent decides this before it starts any of them."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch

from utils.dist.context import DIST_TIMEOUT, MatmulFlag, check_gpus, choose_device, choose_matmul
from utils.errors import UserError
from utils.flags import flag, flags_of

SECTION = "processes and devices"
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# With which launchers tell how many processes (of one per node, or of one per GPU) they start.
LAUNCHER_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class NodeFlags(MatmulFlag):
    """The flags that decide the processes and devices of one node."""

    multiprocessing_distributed: bool = flag("--multiprocessing-distributed", default=False, section=SECTION,
                                             help="start one process per GPU of this node")
    nproc_per_node: int | None = flag(
        "--nproc-per-node", metavar="N", at_least=1, default_text="the visible GPUs, or 1", section=SECTION,
        help="with --multiprocessing-distributed: processes of this node, on the CPU too")
    device: str = flag("--device", default="auto", choices=("auto", "cuda", "cpu"), section=SECTION,
                       help="auto: GPUs if there are any; an error if there is one that PyTorch cannot use")
    local_rank: int | None = flag(
        "--local-rank", "--local_rank", metavar="N", at_least=0, per_node=True, section=SECTION,
        help="torch.distributed.launch adds this flag; the environment variable LOCAL_RANK says the same")


@dataclass(frozen=True)
class ProcessFlags(NodeFlags):
    """The flags that decide all processes of a run and their devices."""

    world_size: int = flag("--world-size", default=1, metavar="N", per_node=True, section=SECTION,
                           help="number of nodes; -1 with --dist-url env:// reads WORLD_SIZE")
    rank: int = flag("--rank", default=0, metavar="R", per_node=True, section=SECTION,
                     help="number of this node, from 0; -1 with --dist-url env:// reads RANK")
    dist_url: str = flag(
        "--dist-url", default="tcp://127.0.0.1:8000", metavar="URL", per_node=True, section=SECTION,
        help="where the processes meet: tcp://<address of node 0>:<free port>, or env://; with one node, port 0 is any "
             "free port")
    dist_backend: str | None = flag("--dist-backend", choices=("nccl", "gloo"), section=SECTION,
                                    default_text="nccl on GPUs, gloo on the CPU", help="backend of torch.distributed")
    dist_timeout: float = flag(
        "--dist-timeout", default=DIST_TIMEOUT, metavar="SECONDS", at_least=1, at_most=10**7, section=SECTION,
        help="how long to wait for other nodes at the start, and for other ranks in a collective; a save may take "
             "longer")
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
    matmul: str | None = None  # "tf32" or "ieee" on GPUs

    @property
    def url(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def local_rank(self) -> int:
        """This process's rank on its node; 0 in a parent of ranks."""
        return int(os.environ["LOCAL_RANK"]) if self.launcher == "torchrun" else 0

    @property
    def device(self) -> torch.device:
        """The device of `local_rank`."""
        return self.device_of(self.local_rank)

    def device_of(self, local_rank: int) -> torch.device:
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", local_rank if self.gpu is None else self.gpu)


def plan_processes(flags: ProcessFlags) -> ProcessPlan:
    """Decide launcher, processes, device and backend. Raises UserError for flags that conflict with each other or with
    this machine."""
    _check(flags)
    try:
        tempfile.gettempdir()  # loading processes and torch need one, but only long after the start
    except FileNotFoundError as error:
        raise UserError(f"{error.strerror}: free space there, or name a directory in the environment variable TMPDIR"
                        ) from None
    device_type = choose_device(flags.device, flags.gpu).type
    backend = flags.dist_backend or ("nccl" if device_type == "cuda" else "gloo")
    if backend == "nccl" and device_type == "cpu":
        raise UserError("--dist-backend nccl: needs GPUs, and this run uses the CPU; choose gloo")
    if backend == "gloo" and device_type == "cuda":
        raise UserError("--dist-backend gloo: lacks collectives on GPUs that a run needs; drop it, or use --device cpu")
    gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    if _started_by_torchrun():
        launcher, host, port = "torchrun", os.environ["MASTER_ADDR"], _environment_number("MASTER_PORT")
        processes, world_size = _environment_number("LOCAL_WORLD_SIZE"), _environment_number("WORLD_SIZE")
        if world_size % processes:
            raise UserError(f"torchrun started {world_size} processes, {processes} of them on this node: "
                            "all nodes need the same number")
        nodes, node_rank = world_size // processes, _environment_number("RANK") // processes
    else:
        from_environment = flags.dist_url == "env://"
        nodes = _environment_number("WORLD_SIZE") if flags.world_size == -1 and from_environment else flags.world_size
        node_rank = _environment_number("RANK") if flags.rank == -1 and from_environment else flags.rank
        if not 0 <= node_rank < nodes:
            raise UserError(f"--rank {node_rank} with --world-size {nodes}: give at least one node, and the number "
                            f"of this node from 0 to {max(nodes, 1) - 1}")
        processes = (flags.nproc_per_node or max(gpus, 1)) if flags.multiprocessing_distributed else 1
        # With several nodes even a single process has a parent, because the parents watch each other.
        launcher = "spawn" if flags.multiprocessing_distributed or nodes > 1 else "single"
        host, port = _rendezvous(flags.dist_url, nodes) if nodes * processes > 1 else ("127.0.0.1", 0)
    if gpus and processes > gpus:
        raise UserError(f"--nproc-per-node {processes}: only {gpus} GPUs are visible; give at most {gpus}")
    plan = ProcessPlan(launcher, nodes, node_rank, processes, device_type, flags.gpu, backend, host, port,
                       timeout=flags.dist_timeout, matmul=choose_matmul(flags.matmul, device_type))
    if gpus:
        ranks = range(processes) if launcher == "spawn" else [plan.local_rank]  # torchrun's ask about their own GPUs
        check_gpus(plan.device_of(rank).index for rank in ranks)
    return plan


def plan_node(flags: NodeFlags) -> ProcessPlan:
    """The plan of a program that runs on this node alone; its processes meet at any free port. Raises UserError."""
    return plan_processes(ProcessFlags(
        multiprocessing_distributed=flags.multiprocessing_distributed, nproc_per_node=flags.nproc_per_node,
        device=flags.device, local_rank=flags.local_rank, matmul=flags.matmul, dist_url="tcp://127.0.0.1:0"))


def warn_of_unused_environment(plan: ProcessPlan) -> None:
    """Print a warning if a launcher's variables ask for other processes than those of the plan, which ignores them."""
    expected = dict.fromkeys(LAUNCHER_VARIABLES, (1, plan.nodes, plan.world_size)) | {"RANK": (0, plan.node_rank)}
    unused = [f"{name}={os.environ[name]}" for name, values in expected.items()
              if os.environ.get(name, "").isdigit() and int(os.environ[name]) not in values]
    if unused and plan.launcher != "torchrun":
        print(f"warning: the environment has {', '.join(unused)}, which this run ignores: it has {plan.nodes} nodes x "
              f"{plan.processes_per_node} processes; to use more, start it with torchrun or give --world-size and "
              "--rank", file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process prints for its node before the process group exists. torchrun starts several processes."""
    return not _started_by_torchrun() or os.environ["LOCAL_RANK"] == "0"


def _started_by_torchrun() -> bool:
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def _check(flags: ProcessFlags) -> None:
    """Raise UserError for process flags that conflict with each other, or with torchrun.

    Under torchrun --multiprocessing-distributed is allowed and changes nothing.
    """
    for conflict, message in (
        (flags.nproc_per_node is not None and not flags.multiprocessing_distributed,
         f"--nproc-per-node {flags.nproc_per_node}: has no effect without --multiprocessing-distributed; add it"),
        (flags.gpu is not None and (flags.multiprocessing_distributed or flags.device == "cpu"),
         f"--gpu {flags.gpu}: is for a single process on a GPU, without --multiprocessing-distributed (where the "
         "environment variable CUDA_VISIBLE_DEVICES chooses GPUs) and --device cpu"),
        (flags.dist_url != "env://" and not flags.dist_url.startswith("tcp://"),
         f"--dist-url {flags.dist_url}: give tcp://<address of node 0>:<free port>, or env://"),
    ):
        if conflict:
            raise UserError(message)
    if flags.local_rank is not None and not _started_by_torchrun():
        missing = ", ".join(name for name in TORCHRUN_VARIABLES if name not in os.environ)
        raise UserError(f"--local-rank {flags.local_rank}: is for torch.distributed.launch, which also sets {missing} "
                        "in the environment; drop the flag, or start with this launcher")
    if flags.local_rank is not None and flags.local_rank != _environment_number("LOCAL_RANK"):
        raise UserError(f"--local-rank {flags.local_rank}: the launcher says LOCAL_RANK={os.environ['LOCAL_RANK']}; "
                        "drop the flag")
    for name, neutral in {"nproc_per_node": (None,), "world_size": (1, -1), "rank": (0, -1), "gpu": (None,)}.items():
        value = getattr(flags, name)
        if _started_by_torchrun() and value not in neutral:
            raise UserError(f"{flags_of(ProcessFlags)[name].describe(value)}: torchrun decides the processes of this "
                            "run; drop the flag, or drop torchrun")


def _environment(name: str) -> str:
    if name not in os.environ:
        raise UserError(f"--dist-url env://: the environment variable {name} is not set")
    return os.environ[name]


def _environment_number(name: str) -> int:
    if not _environment(name).isdigit():
        raise UserError(f"the environment variable {name} is {os.environ[name]!r}, not a number")
    return int(os.environ[name])


def _rendezvous(url: str, nodes: int) -> tuple[str, int]:
    """(host, port) of --dist-url. A single node may use port 0, any free one. Raises UserError."""
    if url == "env://":
        return _environment("MASTER_ADDR"), _environment_number("MASTER_PORT")
    try:
        host, port = urlsplit(url).hostname, urlsplit(url).port
    except ValueError:
        host, port = None, None
    if not host or port is None or port == 0 and nodes > 1:
        raise UserError(f"--dist-url {url}: give tcp://<address of node 0>:<free port>, such as tcp://127.0.0.1:8000")
    return host, port
