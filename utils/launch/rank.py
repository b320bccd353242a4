"""What runs in the process of a rank: join the process group, work, and tell the parent why it failed."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from utils.dist.context import DistContext, set_matmul
from utils.errors import UserError, escape_output, guard_output, printable
from utils.launch.plan import ProcessPlan
from utils.launch.secret import private_keys, read_secret
from utils.memory import keep_freed_memory
from utils.signals import end_notices, end_with_parent, handle

Work = Callable[..., "int | None"]  # what a rank does: `work(context, *args)` returns its exit status, or None for 0

_SIOCGIFADDR = 0x8915  # netdevice(7): an interface's IPv4 address
_TRACEBACK_CHARACTERS = 8000  # a pipe takes 64 KiB at once, and the parent reads it after the end
_MESSAGE_CHARACTERS = 2000


def run_here(work: Work, plan: ProcessPlan, args: tuple[Any, ...]) -> int:
    """Run the one rank of this process: a run of one process, or one that torchrun started."""
    if plan.launcher == "torchrun":
        end_with_parent(os.getppid())
    with contextlib.suppress(ValueError, OSError):  # stderr is no file
        faulthandler.enable(all_threads=False)  # nobody else explains a SIGBUS, of a mapped file that was truncated
    try:
        return _run(plan.local_rank, work, plan, args)
    except Exception as error:
        if isinstance(error, UserError):
            print(f"error: {printable(error)}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        _kill_loaders()
        os._exit(2 if isinstance(error, UserError) else 1)  # see run_child
    finally:
        _kill_loaders()


def run_child(local_rank: int, task: bytes, parent: int, report: Connection, saved: Connection) -> NoReturn:
    """Run a rank that the process `parent` has spawned. A failure is sent to `report` as JSON: fields of Cause.

    task: the pickle of (work, plan, args). saved: gets a byte when nothing is left to save.
    """
    end_with_parent(parent)
    guard_output()
    escape_output()
    handle(signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_notices.append(lambda: saved.send_bytes(b"saved"))
    try:
        work, plan, args = pickle.loads(task)
        status = _run(local_rank, work, plan, args)
    except BaseException as error:
        report.send_bytes(_describe_failure(error))
        _kill_loaders()
        # Not sys.exit: an orderly exit may wait for ever in a collective that the other ranks never join.
        os._exit(1)
    _kill_loaders()
    sys.exit(status)


def _describe_failure(error: BaseException) -> bytes:
    """JSON. The parent reads it when this process has ended, so it must fit into a pipe's 64 KiB."""
    # The connection to another rank or to the store broke. gloo raises a plain RuntimeError.
    lost = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and re.search(
        "gloo|Connection closed by peer", str(error))
    message = traceback.format_exception_only(error)[-1].splitlines()[0][:_MESSAGE_CHARACTERS]
    if lost and (waited := re.search(r"Timed out waiting (\d+)ms", message)):  # gloo adds a path of its code
        message = (f"another rank did not answer within {int(waited[1]) / 1000:g} s (see --dist-timeout); was its "
                   "process stopped, or does it wait for a disk?")
    failure = {"kind": "user", "message": str(error)[:_MESSAGE_CHARACTERS]} if isinstance(error, UserError) else {
        "kind": "lost" if lost else "error",
        "message": message,
        "traceback": "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:],
    }
    text = json.dumps({**failure, "time": time.time()}, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


def _kill_loaders() -> None:
    """Kill the data loading processes, which ignore SIGTERM: Python's exit would wait for them."""
    if loaders := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises an error that would hide the first
        for loader in loaders:
            loader.kill()


def _run(local_rank: int, work: Work, plan: ProcessPlan, args: tuple[Any, ...]) -> int:
    context = _join_group(local_rank, plan)
    status = work(context, *args)
    handle(signal.SIG_IGN)  # only the orderly end is left
    # Only after success: after a failure the other ranks may never come, and this would wait for them.
    dist.barrier()
    dist.destroy_process_group()
    return status or 0


def _join_group(local_rank: int, plan: ProcessPlan) -> DistContext:
    """Collective. Set up this process (device, threads) and make the process group. Raises UserError."""
    rank = plan.node_rank * plan.processes_per_node + local_rank
    device = plan.device_of(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before all other calls of CUDA: they would take memory of GPU 0
        set_matmul(plan.matmul)
    else:
        keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // plan.processes_per_node))
    if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:
        # ZeroRedundancyOptimizer sends its state as a pickle. Now torch runs no code of it.
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    if plan.world_size > 1 and (interface := _interface_towards(plan.host)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        dist.init_process_group(
            plan.backend, store=_connect(rank, plan), world_size=plan.world_size, rank=rank,
            timeout=timedelta(seconds=plan.timeout), device_id=device if plan.backend == "nccl" else None)
    except RuntimeError as error:  # DistError from stores and NCCL, a plain one from gloo
        raise UserError(
            f"--dist-url {plan.url}: rank {rank} cannot connect to the others ({str(error).splitlines()[0]}); do the "
            "nodes reach each other at any port? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network interface"
        ) from error
    return DistContext(rank, plan.world_size, plan.processes_per_node, device)


def _connect(rank: int, plan: ProcessPlan) -> dist.Store:
    """The store in which the ranks form their group."""
    if plan.launcher == "torchrun":
        store, _, _ = next(dist.rendezvous("env://", rank, plan.world_size, timeout=timedelta(seconds=plan.timeout)))
        # torchrun's store may outlive the ranks: after a restart it still holds the addresses of the first attempt.
        return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if plan.world_size == 1:
        return dist.HashStore()
    store = dist.TCPStore(plan.host, plan.port, is_master=False, timeout=timedelta(seconds=plan.timeout))
    return private_keys("ranks", store, read_secret())


def _interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches `host` over IPv4. None if unknown.

    gloo's default is the interface of the machine's own name, which is often the loopback: other nodes cannot reach it.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # without an address
                request = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(request[20:24]) == probe.getsockname()[0]:
                    return name
    return None
