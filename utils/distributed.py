"""Processes: planned before they start, started, joined into one group, and stopped together; collectives with gradients.

One process per GPU. A process group is always made, a group of one as well, so that the training code has one path.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError
from utils.options import Options

# torch 2.14 renamed these two and warns of the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

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
    init_method: str

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
    single = nodes * processes == 1
    if not single:
        _check_rendezvous(options.dist_url, node_rank)
    return ProcessPlan(
        launcher="spawn" if options.multiprocessing_distributed else "single",
        nodes=nodes, node_rank=node_rank, processes_per_node=processes,
        device_type=device_type, gpu=options.gpu, backend=backend, init_method=options.dist_url,
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
        device_type=device_type, gpu=None, backend=backend, init_method="env://",
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


def _check_rendezvous(url: str, node_rank: int) -> None:
    """The address must be complete, and on node 0, which listens there, the port must be free."""
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
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"--dist-url {url}: cannot listen on port {port} ({error.strerror}); another run may be using "
                            f"it: give a free port, such as tcp://{host}:{port + 1}") from None


def is_first_process() -> bool:
    """True in the one process of a node that speaks before the group exists (torchrun starts several)."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 if _started_by_torchrun() else True


# ---------------------------------------------------------------------------------------------------------------------
# Starting and stopping


def launch(work: Callable[..., None], plan: ProcessPlan, *args: Any) -> None:
    """Run `work(worker, *args)` in every process of this node, within a process group of all nodes.

    If one fails, all are stopped, its error alone is shown, last, and this process exits: 2 for a user's mistake, else 1.
    """
    if plan.launcher != "spawn":
        try:
            _run(int(os.environ["LOCAL_RANK"]) if plan.launcher == "torchrun" else 0, work, plan, args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(2)  # not sys.exit: see _child
        return
    # The messages of C++ threads that lose their peer would bury the one error that matters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    reports = tempfile.mkdtemp(prefix="arcface-errors-")
    try:
        context = mp.spawn(_child, args=(work, plan, args, reports), nprocs=plan.processes_per_node, join=False)
        try:
            while not context.join():
                pass
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            _exit_with_first_error(context.processes, plan, reports)
        except KeyboardInterrupt:
            for process in context.processes:
                process.join(timeout=5)
                process.kill()
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
    finally:
        shutil.rmtree(reports, ignore_errors=True)


def _child(local_rank: int, work: Callable[..., None], plan: ProcessPlan, args: tuple, reports: str) -> None:
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        _run(local_rank, work, plan, args)
    except BaseException as error:
        # The moment of failure tells the cause from the failures that follow from it: peers that lose their connection.
        report = {
            "time": time.time(),
            "rank": plan.node_rank * plan.processes_per_node + local_rank,
            "user": isinstance(error, UserError),
            "interrupted": isinstance(error, KeyboardInterrupt),
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
        path = os.path.join(reports, str(local_rank))
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(report, file)
        os.replace(path + ".part", path)
        for loader_worker in multiprocessing.active_children():
            loader_worker.terminate()
        # Not sys.exit: an orderly exit may wait for ever for a collective that the others never join.
        os._exit(1)


def _exit_with_parent(parent: int) -> None:
    """Do not outlive the parent: the signal that torch asks for is ignored in a job started with `nohup ... &`."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _exit_with_first_error(processes: list, plan: ProcessPlan, reports: str) -> NoReturn:
    """All processes have ended, at least one of them badly: tell the cause, and nothing that followed from it."""
    found = []
    for name in os.listdir(reports):
        if not name.endswith(".part"):
            with open(os.path.join(reports, name), encoding="utf-8") as file:
                found.append(json.load(file))
    first = min(found, key=lambda report: report["time"], default=None)
    if first and first["interrupted"]:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if first and first["user"]:
        print(f"error: {first['message']}", file=sys.stderr)
        sys.exit(2)
    # A process that was killed or crashed left no report, and those of the others say that they lost it. SIGTERM is
    # ours, and SIGABRT is how NCCL answers another rank's failure.
    crashes = (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS)
    for local_rank, process in enumerate(processes):
        if process.exitcode in crashes or not found and process.exitcode not in (0, -signal.SIGTERM):
            rank = plan.node_rank * plan.processes_per_node + local_rank
            name = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit status {process.exitcode}"
            hint = " (out of memory? see dmesg)" if name == "SIGKILL" else ""
            print(f"error: rank {rank} (process {process.pid}) was ended by {name}{hint}; "
                  "all ranks of this node were stopped", file=sys.stderr)
            sys.exit(1)
    if first is None:
        print("error: the ranks of this node were ended by SIGTERM", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    print(f"{first['traceback']}error: rank {first['rank']} of {plan.world_size} failed as shown above; "
          "all ranks of this node were stopped", file=sys.stderr)
    sys.exit(1)


def _run(local_rank: int, work: Callable[..., None], plan: ProcessPlan, args: tuple) -> None:
    worker = _join_group(local_rank, plan)
    work(worker, *args)
    # Only after success: after a failure the others may never come, and tearing down would wait for them.
    dist.barrier()
    dist.destroy_process_group()


def _join_group(local_rank: int, plan: ProcessPlan) -> Worker:
    """Collective. Set up this process (device, threads) and make the process group."""
    rank = plan.node_rank * plan.processes_per_node + local_rank
    if plan.device_type == "cuda":
        device = torch.device("cuda", plan.gpu if plan.gpu is not None else local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // plan.processes_per_node))
    common = dict(backend=plan.backend, world_size=plan.world_size, rank=rank,
                  device_id=device if plan.backend == "nccl" else None)
    try:
        if plan.world_size == 1 and plan.launcher != "torchrun":
            dist.init_process_group(store=dist.HashStore(), **common)  # a group of one needs no port
        else:
            dist.init_process_group(init_method=plan.init_method, **common)
    except dist.DistError as error:
        raise UserError(f"--dist-url {plan.init_method}: rank {rank} cannot meet the others there; is the address that of "
                        f"node 0, and were all {plan.nodes} nodes started? ({str(error).splitlines()[0]})") from error
    return Worker(rank=rank, world_size=plan.world_size, processes_per_node=plan.processes_per_node, device=device)


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
    differing = torch.tensor(len(mine), device=worker.device)
    dist.all_reduce(differing)
    if mine:
        name, value = next(iter(mine.items()))
        raise UserError(f"{name} is {value} on rank {worker.rank} and {of_rank_0[0].get(name)} on rank 0: "
                        "give every node the same flags and the same data")
    if differing:
        raise UserError("another node has other flags or other data than rank 0; see its output")


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
    model.module.forward = lambda: torch.stack([parameter.sum() for parameter in averaged]).sum()
    try:
        model().backward()  # the buckets are laid out at the beginning of the next forward pass, whatever that is
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
