"""The choice of the device, what is asked of GPUs before work starts, and how they multiply float32."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
import sysconfig

import pytest
import torch

import main
import valid
from data.folder import FaceFolder
from losses.class_major import choose_form
from scripts import bench_classifier, bench_step, embed
from utils.dist import context
from utils.dist.context import MATMUL, DistContext, check_gpus, choose_device, choose_matmul, describe_gpu, set_matmul
from utils.errors import UserError
from utils.launch import rank, spawn
from utils.launch.plan import ProcessFlags, plan_processes
from utils.options import parse_options
from utils.preflight import check_fused_update, check_memory, run_table
from utils.training.scaler import amp_dtype

# What PyTorch is built for: its wheels for CUDA 12.6, and for CUDA 13 on Linux.
CUDA_12 = [f"sm_{version}" for version in (50, 60, 70, 75, 80, 86, 90)]
CUDA_13 = [f"sm_{version}" for version in (75, 80, 86, 90, 100, 120)]
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
            "MASTER_PORT": "29500"}


class Properties:
    total_memory, L2_cache_size = 80 * 2**30, 50 * 2**20


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(N, capability, architectures)`: PyTorch sees N GPUs. Returns the list of calls that name or set a GPU."""
    calls: list[tuple[str, int | None]] = []

    def see(count: int, capability: tuple[int, int] = (9, 0), architectures: list[str] = CUDA_13) -> list:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
        answers = {"get_device_capability": capability, "get_device_name": "Tesla", "set_device": None,
                   "get_device_properties": Properties, "current_device": 0, "is_bf16_supported": True,
                   "synchronize": None, "manual_seed": None, "empty_cache": None, "memory_allocated": 0}

        def answering(name: str):
            def answer(device=None, **others):
                calls.append((name, None if device is None else torch.device("cuda", device).index
                              if isinstance(device, int) else device.index))
                return answers[name]
            return answer

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        for name in answers:
            monkeypatch.setattr(torch.cuda, name, answering(name))
        return calls

    see(0)
    return see


@pytest.mark.parametrize(("lacks", "words"), [
    ("nothing", ""), ("Triton", "not installed"), ("compiler", "neither gcc nor clang"), ("headers", "python3-dev"),
    ("generation", "8.0"),
])
def test_triton_is_chosen_where_it_can_run(gpus, monkeypatch, tmp_path, lacks, words):
    gpus(1, (7, 5) if lacks == "generation" else (8, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if lacks == "Triton" else object())
    monkeypatch.setattr(shutil, "which", lambda name: None if lacks == "compiler" else name)
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    if lacks != "headers":
        (tmp_path / "Python.h").touch()
    assert choose_form("fused", "cuda") == ("triton" if lacks == "nothing" else "eager")
    if lacks == "nothing":
        assert choose_form("triton", "cuda") == "triton"
        return
    with pytest.raises(UserError, match=f"--classifier triton: .*{words}.*, or choose eager"):
        choose_form("triton", "cuda")


@pytest.fixture
def backends():
    """`backends()`: whether matrix products and convolutions may use TF32. The state comes back afterwards."""
    def read() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = read()
    yield read
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_choose_device(gpus):
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda: .*no GPU"):
        choose_device("cuda")
    with pytest.raises(UserError, match="--gpu 0: .*no GPU"):
        choose_device("auto", gpu=0)
    gpus(2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("auto", gpu=1) == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--gpu 2: .*0 to 1"):
        choose_device("cuda", gpu=2)


def fail_to_start(text: str):
    def init() -> None:
        raise RuntimeError(text)
    return init


@pytest.mark.parametrize(("version", "error", "reason"), [
    (None, "", f"PyTorch {torch.__version__} is built without CUDA"),
    ("13.0", "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
             "downloading a new\nversion from the URL: http://www.nvidia.com",
     "The NVIDIA driver on your system is too old (found version 11040)"),
    ("13.0", "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before? Error 802: system "
             "not yet initialized", "Error 802: system not yet initialized"),
])
def test_a_gpu_that_pytorch_cannot_use_is_no_run_on_the_cpu(gpus, monkeypatch, tmp_path, version, error, reason):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(context, "_NVIDIA_DEVICES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.setattr(torch.cuda, "init", fail_to_start(error))
    for hidden in ("", "-1", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device("auto") == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for visible in (None, "0", "GPU-5a1b"):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(UserError) as raised:
            choose_device("auto")
        for words in ("--device auto: ", str(tmp_path / "nvidia0"), f"({reason})", "--device cpu"):
            assert words in str(raised.value)
        assert "\n" not in str(raised.value)
    assert choose_device("cpu") == torch.device("cpu")
    (tmp_path / "nvidia0").unlink()
    (tmp_path / "nvidiactl").touch()
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("capability", "architectures", "runs"), [
    ((7, 0), CUDA_13, False), ((7, 0), CUDA_12, True), ((6, 1), CUDA_12, True), ((3, 7), CUDA_12, False),
    ((8, 9), CUDA_13, True), ((8, 0), ["sm_86"], False), ((12, 1), CUDA_13, True), ((10, 0), CUDA_12, False),
    ((10, 0), [*CUDA_12, "compute_90"], True), ((8, 9), ["compute_90"], False), ((13, 0), CUDA_13, False),
    ((13, 0), [*CUDA_13, "compute_120"], True), ((9, 0), ["sm_90a"], True), ((10, 3), ["sm_100a"], False),
    ((10, 3), ["sm_100f"], True), ((9, 4), ["gfx942"], True), ((9, 0), [], True),
])
def test_gpus_without_kernels(gpus, capability, architectures, runs):
    gpus(2, capability, architectures)
    if runs:
        check_gpus([0, 1])
        return
    with pytest.raises(UserError) as raised:
        check_gpus([1])
    for words in ("GPU 1 (Tesla", f"{capability[0]}.{capability[1]}", architectures[-1], "--device cpu"):
        assert words in str(raised.value)


@pytest.mark.parametrize(("flags", "asked"), [
    ({}, [0]), ({"gpu": 2}, [2]), ({"multiprocessing_distributed": True, "nproc_per_node": 2}, [0, 1]),
    ({"multiprocessing_distributed": True}, [0, 1, 2]),
    ({"gpu": 2, "world_size": 2, "dist_url": "tcp://10.0.0.1:8000"}, [2]),
])
def test_each_gpu_that_is_used_is_checked(gpus, flags, asked):
    calls = gpus(3)
    plan_processes(ProcessFlags(**flags))
    assert calls == [("get_device_capability", index) for index in asked]
    gpus(3, (3, 7))
    with pytest.raises(UserError, match=f"GPU {asked[0]} .Tesla"):
        plan_processes(ProcessFlags(**flags))


def test_the_allocator_can_expand_its_segments_unless_the_user_chose(gpus, monkeypatch):
    gpus(1)
    del os.environ["PYTORCH_ALLOC_CONF"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    choose_device("auto")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    choose_device("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    choose_device("auto")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"
    choose_device("auto")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:False"


def test_a_rank_sets_its_gpu_before_anything_else_is_asked_of_cuda(gpus, monkeypatch):
    """Else every rank would hold a context, several hundred MiB, on GPU 0."""
    calls = gpus(2)
    plan = plan_processes(ProcessFlags(multiprocessing_distributed=True))
    calls.clear()
    seen = []
    monkeypatch.setattr(rank.dist, "init_process_group", lambda *args, **settings: seen.append(settings["device_id"]))
    monkeypatch.setattr(rank, "_connect", lambda *args: None)
    monkeypatch.setattr(rank, "_interface_towards", lambda host: None)
    assert rank._join_group(1, plan).device == torch.device("cuda", 1)
    assert calls[0] == ("set_device", 1) and ("set_device", 0) not in calls and seen == [torch.device("cuda", 1)]


def test_torchruns_processes_ask_about_their_own_gpus(gpus, monkeypatch, faces):
    calls = gpus(2)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    options = parse_options([str(faces), "-a", "mobilefacenet", "--enable-amp-mode", "--fuse-classifier-update",
                             "--enable-model-parallel"])
    plan = plan_processes(options)
    check_fused_update(options, plan)
    check_memory(options, plan)
    run_table(options, plan, FaceFolder(str(faces / "train")), [])
    assert len(calls) > 3 and {index for _, index in calls} == {1}


def test_bf16_is_for_gpus_that_have_it(gpus):
    for capability, dtype in {(7, 5): torch.float16, (8, 0): torch.bfloat16, (12, 0): torch.bfloat16}.items():
        gpus(1, capability)
        for choice in (None, "auto"):
            assert amp_dtype(choice, torch.device("cuda", 0)) == dtype
    assert amp_dtype("fp16", torch.device("cpu")) == torch.float16
    assert amp_dtype(None, torch.device("cpu")) == amp_dtype("bf16", torch.device("cuda", 0)) == torch.bfloat16


def test_set_matmul(backends):
    for choice in ("tf32", "ieee", "tf32"):
        set_matmul(choice)
        assert backends() == (choice == "tf32",) * 2
        # torch.compile reads the state under all of its names: none may raise an error.
        assert torch.get_float32_matmul_precision() == ("high" if choice == "tf32" else "highest")
        assert torch.backends.cuda.matmul.fp32_precision == choice
    set_matmul(None)
    assert backends() == (True, True)


def test_choose_matmul():
    assert [choose_matmul(choice, "cuda") for choice in (None, "tf32", "ieee")] == ["tf32", "tf32", "ieee"]
    assert choose_matmul(None, "cpu") is None
    for choice in ("tf32", "ieee"):
        with pytest.raises(UserError, match=f"--matmul {choice}: .*on the CPU; drop it"):
            choose_matmul(choice, "cpu")


class Reached(Exception):
    """Raised where a program would begin to compute."""


def reach(*args: object, **settings: object) -> None:
    raise Reached


@pytest.mark.parametrize("flags", [[], ["--matmul", "tf32"], ["--matmul", "ieee"]], ids=" ".join)
def test_every_program_multiplies_as_its_flag_says(gpus, backends, monkeypatch, faces, tmp_path, flags):
    def run(program, *argv: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = expected != "tf32", expected != "tf32"
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, argv), *flags])
        with pytest.raises(Reached):
            program.main()
        assert backends() == (expected == "tf32",) * 2, program.__name__

    gpus(2)
    expected = (flags or ["tf32"])[-1]
    pairs = ["--imgs-root", faces / "lfw" / "imgs", "--pair-list", faces / "lfw" / "pair.list"]
    weights = tmp_path / "weights.pth"
    weights.touch()
    monkeypatch.setattr(rank.dist, "init_process_group", reach)
    monkeypatch.setattr(rank, "_connect", lambda *args: None)
    monkeypatch.setattr(spawn, "run_here", lambda work, plan, args: rank._join_group(plan.local_rank, plan))
    run(main, faces, "-a", "mobilefacenet", "-b", 4, "-j", 0, "--output", tmp_path)
    run(bench_classifier, "--classes", 10, "--batch", 2)
    run(bench_step, "--classes", 10, "--batch", 2)
    monkeypatch.setattr(valid, "evaluate", reach)
    run(valid, *pairs, "--untrained", "-a", "mobilefacenet")
    monkeypatch.setattr(main, "evaluate_set", reach)
    monkeypatch.setattr(main, "open_weights", lambda *args, **settings: Weights)
    run(main, "--evaluate", *pairs, "--resume", weights)
    monkeypatch.setattr(embed, "open_weights", reach)
    run(embed, "--resume", weights, "--output", tmp_path / "e.npy", faces / "lfw" / "imgs")


def test_a_benchmark_compares_in_float32_and_measures_as_its_flag_says(backends, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_classifier, "init_model_parallel", lambda world_size: None)
    monkeypatch.setattr(bench_classifier, "check_agreement", lambda *args: seen.append(backends()))
    monkeypatch.setattr(bench_classifier, "Inputs", reach)
    options = bench_classifier.parse_options(["--classes", "10", "--batch", "2", "--device", "cpu"])
    for matmul in MATMUL:
        with pytest.raises(Reached):
            bench_classifier.run(DistContext(0, 1, 1, torch.device("cpu")), dataclasses.replace(options, matmul=matmul))
        assert (seen.pop(), backends()) == ((False, False), (matmul == "tf32",) * 2)


def test_reports_name_the_products_that_are_set(gpus, backends):
    gpus(1)
    for matmul in MATMUL:
        set_matmul(matmul)
        assert describe_gpu(torch.device("cuda", 0)) == f"Tesla, {matmul} products"


class Weights:
    backbone = mean_face = None

    @staticmethod
    def describe(path: str) -> str:
        return path
