"""Tests that need a GPU. scripts/gpu_check.sh runs them with ARCFACE_TEST_CUDA=1; otherwise they are skipped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.commands import run
from helpers.margins import random_case, true_gradients

from losses.fused import margin_softmax
from models.classifier import initial_centers
from utils.dist.sharding import ClassShard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and ARCFACE_TEST_CUDA=1")

SHORT = ["-a", "mobilefacenet", "-b", 8, "--num-classes", 50, "--max-steps", 3, "-p", 1]
SETTINGS = dict(group=None, scale=64.0, margin=0.5, easy_margin=True)


@pytest.mark.parametrize("seed", range(20))
def test_float64_equals_the_truth(seed):
    case = random_case(np.random.default_rng(seed))
    loss, embedding_grad, centers_grad, slope = true_gradients(case)
    embedding = case["embedding"].cuda().requires_grad_()
    centers = case["centers"].cuda().requires_grad_()
    got, _ = margin_softmax(
        embedding, case["label"].cuda(), centers, shard=ClassShard(len(centers), 0, 1), group=None, scale=case["scale"],
        margin=case["margin"], easy_margin=case["easy"], chunk=case["chunk"], memory_mib=case["memory_mib"],
    )
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-10)
    for result, true in ((embedding.grad, embedding_grad), (centers.grad, centers_grad)):
        assert (result.cpu() - true).norm() <= 1e-10 * true.norm() + 1e-15 * case["scale"] * slope


def large_case(classes: int = 50_000, rows: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    centers = torch.randn(classes, 512, device="cuda", generator=generator)
    label = torch.randint(classes, (rows,), device="cuda", generator=generator)
    noise = torch.randn(rows, 512, device="cuda", generator=generator)
    return F.normalize(F.normalize(centers[label]) + 0.06 * noise), label, centers


@pytest.mark.parametrize("memory_mib", [0, 20, 1e6])
@pytest.mark.parametrize(("operands", "tolerance"), [(None, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_operand_types_are_near_float64(operands, tolerance, memory_mib):
    embedding, label, centers = large_case()
    results = {}
    for dtype, kind in ((torch.float64, None), (torch.float32, operands)):
        x, w = embedding.to(dtype, copy=True).requires_grad_(), centers.to(dtype, copy=True).requires_grad_()
        loss, _ = margin_softmax(x, label, w, shard=ClassShard(len(w), 0, 1), operands=kind, memory_mib=memory_mib, **SETTINGS)
        loss.backward()
        results[dtype] = loss.detach(), x.grad, w.grad
    for result, true in zip(results[torch.float32], results[torch.float64]):
        assert result.dtype == torch.float32 and (result - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("operands", [None, torch.bfloat16])
def test_a_step_does_not_wait_for_the_gpu(operands, update):
    embedding, label, centers = large_case()
    weight = torch.nn.Parameter(centers)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9) if update else None

    def step() -> None:
        loss, _ = margin_softmax(embedding.clone().requires_grad_(), label, weight, shard=ClassShard(len(weight), 0, 1),
                                 operands=operands, memory_mib=20, update=optimizer, **SETTINGS)
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_initial_centers_do_not_depend_on_the_device():
    shard = ClassShard(20_000, 0, 1)
    assert torch.equal(initial_centers(shard, 64, 1, "cuda").cpu(), initial_centers(shard, 64, 1))


@pytest.mark.parametrize("flags", [
    [], ["--enable-model-parallel"], ["--enable-model-parallel", "--fuse-classifier-update", "--channels-last"],
    ["--enable-model-parallel", "--enable-amp-mode"],
    ["--enable-model-parallel", "--enable-amp-mode", "--amp-dtype", "fp16"],
    ["--enable-model-parallel", "--enable-zero-optim"], ["--enable-model-parallel", "--sync-bn"],
    ["--enable-model-parallel", "--enable-amp-mode", "--compile", "--channels-last"],
], ids=lambda flags: " ".join(flags) or "base")
def test_training_resuming_and_validating(faces, tmp_path, flags):
    command = ["main.py", faces, *SHORT, *flags, "--output", tmp_path,
               "--multiprocessing-distributed", "--nproc-per-node", 1]
    assert "nccl" in run(*command, "--seed", 3)
    resume = ["--resume", tmp_path / "checkpoint.pth.tar"]
    run(*command, *resume, "--max-steps", 5)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5] and all(line["loss"] == line["loss"] for line in steps)
    pairs = ["--imgs-root", faces / "lfw/imgs", "--pair-list", faces / "lfw/pair.list"]
    assert "Accuracy" in run("valid.py", *pairs, *resume)
