"""The plan of processes: from flags, from env:// and from torchrun's variables."""

from __future__ import annotations

import pytest
import torch

from utils.errors import UserError
from utils.launch.plan import (
    LAUNCHER_VARIABLES,
    NodeFlags,
    ProcessFlags,
    is_first_process,
    plan_node,
    plan_processes,
    warn_of_unused_environment,
)

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500"}
CPU = {"device": "cpu"}


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(N)`: PyTorch sees N GPUs."""
    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # else plan_processes would set it

    see(0)
    return see


def test_one_process(gpus):
    plan = plan_processes(ProcessFlags())
    assert (plan.launcher, plan.world_size, plan.device_type, plan.backend) == ("single", 1, "cpu", "gloo")
    assert (plan.port, plan.timeout) == (0, 1800)


def test_one_process_per_gpu(gpus):
    gpus(4)
    plan = plan_processes(ProcessFlags(multiprocessing_distributed=True))
    assert (plan.launcher, plan.processes_per_node, plan.device_type, plan.backend) == ("spawn", 4, "cuda", "nccl")
    assert plan_processes(ProcessFlags(gpu=3)).gpu == 3


def test_one_node_meets_at_any_free_port(gpus):
    gpus(2)
    plan = plan_node(NodeFlags(multiprocessing_distributed=True))
    assert (plan.launcher, plan.processes_per_node, plan.nodes, plan.port) == ("spawn", 2, 1, 0)
    plan = plan_node(NodeFlags(multiprocessing_distributed=True, nproc_per_node=3, device="cpu"))
    assert (plan.processes_per_node, plan.backend) == (3, "gloo")


def test_several_nodes(gpus):
    flags: dict = dict(multiprocessing_distributed=True, nproc_per_node=2, world_size=3, rank=1, dist_url="tcp://10.0.0.1:8000")
    plan = plan_processes(ProcessFlags(**flags, **CPU))
    assert (plan.nodes, plan.node_rank, plan.world_size, plan.url) == (3, 1, 6, "tcp://10.0.0.1:8000")
    # Even one process per node is started by a parent.
    assert plan_processes(ProcessFlags(world_size=2, rank=1, dist_url="tcp://10.0.0.1:8000")).launcher == "spawn"


def test_environment(gpus, monkeypatch):
    flags = ProcessFlags(world_size=-1, rank=-1, dist_url="env://")
    with pytest.raises(UserError, match="WORLD_SIZE is not set"):
        plan_processes(flags)
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT is 'x'"):
        plan_processes(flags)
    monkeypatch.setenv("MASTER_PORT", "8000")
    plan = plan_processes(flags)
    assert (plan.nodes, plan.node_rank, plan.host, plan.port) == (4, 2, "10.0.0.1", 8000)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError, match="--rank 4 with --world-size 4: .* from 0 to 3"):
        plan_processes(flags)


def test_torchrun(gpus, monkeypatch):
    assert is_first_process()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    plan = plan_processes(ProcessFlags(multiprocessing_distributed=True))
    assert (plan.launcher, plan.nodes, plan.node_rank, plan.processes_per_node) == ("torchrun", 2, 1, 4)
    assert (plan.host, plan.port) == ("10.0.0.1", 29500)
    assert not is_first_process()
    for flags, word in (
        (dict(world_size=2), "--world-size 2"),
        (dict(world_size=2, rank=1), "--world-size 2"),
        (dict(multiprocessing_distributed=True, nproc_per_node=2), "--nproc-per-node 2"),
    ):
        with pytest.raises(UserError, match=f"{word}: torchrun decides"):
            plan_processes(ProcessFlags(**flags))
    gpus(2)
    with pytest.raises(UserError, match="only 2 GPUs"):
        plan_processes(ProcessFlags())
    gpus(0)
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(UserError, match="started 9 processes, 4 of them on this node"):
        plan_processes(ProcessFlags())


def test_the_local_rank_of_torch_distributed_launch(gpus, monkeypatch):
    with pytest.raises(UserError, match="--local-rank 0: .*torch.distributed.launch.*LOCAL_RANK.*drop the flag"):
        plan_processes(ProcessFlags(local_rank=0))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert plan_processes(ProcessFlags(local_rank=1)) == plan_processes(ProcessFlags())
    with pytest.raises(UserError, match="--local-rank 0: .*LOCAL_RANK=1"):
        plan_processes(ProcessFlags(local_rank=0))


@pytest.mark.parametrize(("variables", "warns"), [
    ({"WORLD_SIZE": "8", "RANK": "3"}, "WORLD_SIZE=8, RANK=3"),
    ({"RANK": "1"}, "RANK=1"),
    ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4"),
    ({"SLURM_NTASKS": "2"}, ""),  # scripts/slurm.sh: a task per node
    ({"SLURM_NTASKS": "6"}, ""),  # a task per process
    ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "10.0.0.1"}, ""),
    (TORCHRUN, ""),
])
def test_variables_of_launchers_that_are_not_used(gpus, monkeypatch, capsys, variables, warns):
    for name in (*LAUNCHER_VARIABLES, "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    flags = ProcessFlags() if variables == TORCHRUN else ProcessFlags(
        multiprocessing_distributed=True, nproc_per_node=3, world_size=2, dist_url="tcp://10.0.0.1:80", device="cpu")
    warn_of_unused_environment(plan_processes(flags))
    warning = capsys.readouterr().err
    assert warns in warning and warning.count("\n") == bool(warns)


@pytest.mark.parametrize(("flags", "words"), [
    (dict(nproc_per_node=2), "--nproc-per-node 2: .*--multiprocessing-distributed"),
    (dict(gpu=0, multiprocessing_distributed=True), "--gpu 0: .*CUDA_VISIBLE_DEVICES"),
    (dict(gpu=0, device="cpu"), "--gpu 0: .*--device cpu"),
    (dict(world_size=2, rank=2), "--rank 2 with --world-size 2: .* from 0 to 1"),
    (dict(world_size=0), "--world-size 0"),
    (dict(world_size=-1), "--world-size -1"),
    (dict(world_size=2, rank=-1), "--rank -1"),
    (dict(dist_url="localhost:80"), "--dist-url localhost:80: .*tcp://"),
    (dict(dist_url="tcp://host", world_size=2), "--dist-url tcp://host: .*port"),
    (dict(dist_url="tcp://host:0", world_size=2), "--dist-url tcp://host:0: .*port"),
    (dict(device="cuda"), "--device cuda: PyTorch sees no GPU"),
    (dict(gpu=0), "--gpu 0: PyTorch sees no GPU"),
    (dict(dist_backend="nccl"), "--dist-backend nccl"),
])
def test_flags_that_cannot_work(gpus, flags, words):
    with pytest.raises(UserError, match=words):
        plan_processes(ProcessFlags(**flags))


def test_gpus_that_are_not_there(gpus):
    gpus(2)
    with pytest.raises(UserError, match="--gpu 2: the visible GPUs are 0 to 1"):
        plan_processes(ProcessFlags(gpu=2))
    with pytest.raises(UserError, match="--nproc-per-node 3: only 2 GPUs"):
        plan_processes(ProcessFlags(multiprocessing_distributed=True, nproc_per_node=3))


def test_gloo_is_for_the_cpu(gpus, monkeypatch):
    gpus(2)
    for name, value in TORCHRUN.items():
        with pytest.raises(UserError, match="--dist-backend gloo: .*GPUs.*--device cpu"):
            plan_processes(ProcessFlags(dist_backend="gloo"))  # at last started by torchrun
        monkeypatch.setenv(name, value)
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    assert plan_processes(ProcessFlags(dist_backend="gloo", **CPU)).backend == "gloo"


def test_products_are_those_of_the_device(gpus):
    with pytest.raises(UserError, match="--matmul ieee: .*CPU"):
        plan_processes(ProcessFlags(matmul="ieee"))
    assert plan_node(NodeFlags(**CPU)).matmul is None
    gpus(1)
    assert plan_processes(ProcessFlags()).matmul == "tf32"
    assert plan_node(NodeFlags(matmul="ieee")).matmul == "ieee"
