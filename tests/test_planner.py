"""The predicted memory against what a forward pass, the classifier and a training run really allocate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import tempfile

import pytest
import torch
import torch.nn.functional as F
from helpers.planning import BACKBONE, GIB, MIB, RUN, kept_for_backward, predict

from losses.class_major import margin_softmax_class_major
from losses.fused import _chunk_size, automatic_memory_bytes, chunk_classes, margin_softmax
from losses.margins import ArcFace
from models import build_backbone
from models.classifier import automatic_memory_mib
from scripts import bench_step, plan
from utils.dist.context import DistContext
from utils.errors import UserError, exit_on_user_error
from utils.planner import largest, measure_backbone, predict_memory
from utils.training.optim import RowSGD, make_state


@pytest.mark.parametrize("arch", ["mobilefacenet", "iresnet18"])
def test_activations_equal_those_of_a_real_forward_pass(arch):
    predicted = measure_backbone(lambda: build_backbone(arch, 512), device_type="cpu", autocast_dtype=None)
    backbone, images = build_backbone(arch, 512).train(), torch.rand(3, 3, 112, 112)
    own = [images, *backbone.parameters(), *backbone.buffers()]
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept_for_backward(lambda: backbone(images), own))
    assert predicted.activations + 3 * predicted.activations_per_image == pytest.approx(measured, rel=0.01)
    assert sum(predicted.trained) == sum(p.nbytes for p in backbone.parameters() if p.requires_grad)
    assert sum(predicted.trained) + predicted.fixed == sum(tensor.nbytes for tensor in own[1:])


def test_activations_under_autocast_are_about_half():
    measured = {
        dtype: measure_backbone(lambda: build_backbone("iresnet18", 512), device_type="cuda", autocast_dtype=dtype)
        for dtype in (None, torch.bfloat16)
    }
    full, low = measured[None], measured[torch.bfloat16]
    assert 0.45 < low.activations_per_image / full.activations_per_image < 0.6
    assert full.activations < MIB  # statistics of BatchNorm
    # The weights in bf16, without those of the last linear layer.
    assert low.activations == pytest.approx((sum(low.trained) - max(low.trained)) / 2, rel=0.05)
    assert not torch.is_autocast_enabled("cuda")


def test_parts_by_arithmetic():
    centers = 12_500 * 512 * 4
    chunk = 8 * MIB // (2 * (256 + 512) * 4) // 256 * 256
    block = 256 * (chunk + 16)
    parts = predict()
    assert parts == {
        "backbone weights": 1550, "backbone gradients": 1000, "DDP buckets": 1500, "backbone momentum": 1500,
        "images": 32 * 3 * 112 * 112 * 5, "activations": 70 + 32 * 10_000,
        "class centers": centers, "class centers' gradient": centers, "class centers' momentum": centers,
        "saved probabilities": 0,
        "chunk buffers": block * 4 + chunk * 512 * 4 + -(-12_500 // chunk) * 256 * 12 + 12_500 * 4,
        "embeddings": 256 * 512 * 12 + 4 * 32 * 512 * 4,
        "optimizer, beyond activations": 0,
        "CUDA, cuDNN, NCCL": 0,
    }
    fused = predict(fused_update=True)
    assert fused["class centers' gradient"] == 0 and fused["class centers' momentum"] == centers
    assert predict(device_type="cuda")["CUDA, cuDNN, NCCL"] > GIB


def test_parts_of_sampled_classes_by_arithmetic():
    chunk = 8 * MIB // (2 * (256 + 512) * 4) // 256 * 256
    used, buffers = 2500 + 256, 256 * (chunk + 16) * 4 + 2 * chunk * 512 * 4  # a chunk's gradient and gathered rows
    parts = predict(sample_rate=0.2)
    assert parts["class centers"] == parts["class centers' momentum"] == 12_500 * 512 * 4
    assert parts["class centers' gradient"] == used * 512 * 4
    assert 1250 < chunk < 2500 and parts["chunk buffers"] == buffers + 3 * 256 * 12 + used * 12
    # The optimizer adds up the gradients of equal rows in as much memory again.
    freed = sum(parts[name] for name in ("images", "activations", "saved probabilities", "chunk buffers", "embeddings"))
    assert parts["optimizer, beyond activations"] == max(0, used * 512 * 4 - freed)
    accumulated = predict(sample_rate=0.2, micro_batches=3)
    assert accumulated["class centers' gradient"] == (2 * 2500 + 3 * 256) * 512 * 4
    joined, held = (2500 + 3 * 256) * 512 * 4, parts["chunk buffers"] + parts["saved probabilities"]
    assert accumulated["sum of gradients, beyond buffers"] == max(0, joined - held)
    assert predict(sample_rate=0.2, fused_update=True)["class centers' gradient"] == 0
    alone = predict(sample_rate=0.2, model_parallel=False, world_size=1)
    assert alone["class centers"] == 100_000 * 512 * 4 and alone["DDP buckets"] == 1500


def test_replicated_classes_go_through_ddp_and_zero():
    centers = 100_000 * 512 * 4
    parts = predict(model_parallel=False)
    assert parts["class centers"] == centers and parts["DDP buckets"] == 1500 + centers
    # a copy of all gradients for the weight decay, when the backward pass has let go of what it read
    passing = sum(parts[name] for name in ("images", "activations", "chunk buffers", "embeddings"))
    assert parts["optimizer, beyond activations"] == 1500 + centers - passing > 0
    zero = predict(model_parallel=False, zero=True)
    assert zero["class centers' momentum"] == centers // 8 and zero["backbone momentum"] == 188  # an eighth
    assert zero["optimizer, beyond activations"] == 1500 + centers + -(-(1500 + centers) // 8) - passing  # all weights
    assert predict(zero=True, world_size=2)["backbone momentum"] == 750
    assert predict(zero=True, world_size=1, model_parallel=False) == predict(world_size=1, model_parallel=False)
    two = predict(optimizer_states=2, ema=True)
    assert (two["backbone moments"], two["class centers' moments"]) == (3000, 2 * two["class centers"])
    assert two["backbone average"] == 1550 and "backbone momentum" not in two


@pytest.mark.parametrize("operands, value_bytes", [(None, 4), (torch.bfloat16, 2), (torch.float16, 4)])
@pytest.mark.parametrize("memory_mib", [0, 0.1, 1000])
def test_kept_probabilities_are_those_of_the_classifier(operands, value_bytes, memory_mib):
    rows, classes = 8, 4000
    embedding = F.normalize(torch.randn(rows, 512)).requires_grad_()
    centers, label = torch.randn(classes, 512, requires_grad=True), torch.arange(rows)
    tensors = kept_for_backward(
        lambda: margin_softmax(embedding, label, centers, ArcFace(), scale=64.0, group=None, saved_probs_mib=memory_mib,
                               matmul_dtype=operands),
        [embedding, centers],
    )
    kept = sum(tensor.nbytes for tensor in tensors if tensor.ndim == 3)  # (chunks, N, K)
    assert kept == predict(classes=classes, batch_size=rows, world_size=1, matmul_dtype=operands,
                           classifier_memory_mib=memory_mib)["saved probabilities"]
    assert (kept > 0) == (memory_mib > 0) and kept % value_bytes == 0


@pytest.mark.parametrize("rows", [8, 128, 4096, 100_000])
def test_chunks_are_those_of_the_classifier(rows):
    assert chunk_classes(rows, 512, 8 * MIB) == _chunk_size(torch.empty(rows, 512, device="cpu"))


@pytest.mark.parametrize("fused_update", [False, True])
def test_automatic_memory_is_that_of_the_trainer(fused_update):
    centers = torch.empty(1000, 512)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert automatic_memory_bytes(centers.nbytes, total, fused_update) == pytest.approx(
        automatic_memory_mib(centers, 1, fused_update) * MIB, abs=1
    )


def peak_allocations(rank: int, world_size: int, flags: list[str], sample_rate: float, micro_batches: int) -> int:
    """The most bytes that PyTorch has allocated at once in two steps of main.py's own training, from their trace."""
    options, training = bench_step.parse_options(flags)
    training = dataclasses.replace(training, sample_rate=sample_rate, accumulation_steps=micro_batches)
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    images, labels = bench_step.draw_batch(context, options)
    return peak_of(lambda: bench_step.OurTraining(context, training, images, labels).run(2))


def peak_of(work) -> int:
    """The most bytes that PyTorch has allocated at once in work(), beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as directory:
        profiler.export_chrome_trace(f"{directory}/trace.json")
        with open(f"{directory}/trace.json", encoding="utf-8") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events))


@pytest.mark.parametrize("fused_update", [False, True])
@pytest.mark.parametrize("memory_mib", [0, 1000])
@pytest.mark.parametrize("form", [margin_softmax, margin_softmax_class_major])
def test_buffers_equal_the_allocations_of_the_classifier(form, memory_mib, fused_update):
    rows, size, classes = 256, 32, 28_600
    embedding = F.normalize(torch.randn(rows, size)).requires_grad_()
    centers, label = torch.nn.Parameter(torch.randn(classes, size)), torch.arange(rows)
    optimizer = RowSGD(centers, skip_nonfinite=False, lr=0.1, momentum=0.9)
    make_state(optimizer)

    def step() -> None:
        loss, _ = form(embedding, label, centers, ArcFace(), scale=64.0, group=None, saved_probs_mib=memory_mib,
                       update=optimizer.update_rows if fused_update else None)
        loss.backward()

    parts = predict(classes=classes, batch_size=rows, world_size=1, embedding_size=size, fused_update=fused_update,
                    classifier_memory_mib=memory_mib, class_major=form is margin_softmax_class_major)
    buffers, gradient = parts["saved probabilities"] + parts["chunk buffers"], parts["class centers' gradient"]
    # Without the fused update the peak may be that of the forward pass, when there is no gradient.
    assert 0.93 * buffers <= peak_of(step) <= 1.08 * (buffers + gradient)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "flags", "sample_rate", "micro_batches"), [
    (1, [], 1.0, 1), (1, ["--fuse-classifier-update"], 1.0, 1), (2, [], 1.0, 1),
    (2, ["--fuse-classifier-update"], 1.0, 1), (2, [], 0.3, 1), (2, [], 0.7, 2), (2, [], 0.7, 4)])
def test_prediction_equals_the_allocations_of_a_training_run(pools, world_size, flags, sample_rate, micro_batches):
    classes, batch = 20_000, 8
    measured = max(pools(world_size).run(
        peak_allocations, ["-a", "mobilefacenet", "--classes", str(classes), "--batch", str(batch), "--world-size",
                           str(world_size), "--device", "cpu", *flags], sample_rate, micro_batches,
    ))
    backbone = measure_backbone(lambda: build_backbone("mobilefacenet", 512), device_type="cpu", autocast_dtype=None)
    parts = predict_memory(backbone, dataclasses.replace(
        RUN, classes=classes, batch_size=batch, world_size=world_size, fused_update=bool(flags),
        sample_rate=sample_rate, micro_batches=micro_batches, classifier_memory_mib=None,
    ))
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)


def test_largest():
    assert largest(lambda number: number <= 1234, 3) == 1234
    assert largest(lambda number: number <= 3, 3) == 3
    assert largest(lambda number: False, 3) == 0


def test_command(monkeypatch, capsys):
    monkeypatch.setattr(plan, "measure_backbone", lambda build, **settings: BACKBONE)
    common = ["plan", "--batch-size", "64", "--memory-gib", "16", "--classifier-memory-mib", "0"]

    def answer(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [*common, *flags])
        exit_on_user_error(plan.main)
        return capsys.readouterr().out

    # 8 bytes a value of 4 million centers: 15.3 GiB, and what CUDA takes. 12 bytes: 23 GiB.
    output = answer("--classes", "3000000", "--fuse-classifier-update")
    assert "of a GPU: fits" in output and "fewest GPUs that 3,000,000 classes fit on with this batch: 1" in output
    assert "class centers' gradient" not in output
    output = answer("--classes", "3000000")
    assert "does not fit" in output and "fewest GPUs that 3,000,000 classes fit on with this batch: 2" in output
    most = int(output.partition("most classes that fit on 1 GPUs: ")[2].splitlines()[0].replace(",", ""))
    assert "of a GPU: fits" in answer("--classes", str(most))
    assert "does not fit" in answer("--classes", str(most + 2000))

    monkeypatch.setattr(plan, "print_time", lambda *args: None)
    output = answer("--classes", "3000000", "--device", "cpu")
    assert "64 images in one process of 16 GiB" in output and "% of the memory: does not fit" in output
    assert "most classes that fit in one process: " in output and "GPU" not in output


@pytest.mark.parametrize("flags, words", [
    ("--classes 1", "--classes 1"),
    ("--classes 9 --batch-size 9 --world-size 2", "--batch-size 9: must divide"),
    ("--classes 9 --fuse-classifier-update --precision fp16", "does not support"),
    ("--classes 9 --fuse-classifier-update --world-size 2 --no-enable-model-parallel", "--no-enable-model-parallel"),
    ("--classes 9 --sample-rate 0.3 --world-size 2 --no-enable-model-parallel", "--sample-rate 0.3 with"),
    ("--classes 9 -a resnet", "--arch resnet"),
    ("--classes 9 --memory-gib nan", "--memory-gib nan"),
    ("--classes 9 --memory-gib 0", "--memory-gib 0"),
    ("--batch-size 4", "--classes"),
])
def test_options(flags, words):
    with pytest.raises(UserError, match=words):
        plan.parse_options(flags.split())


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.parse_options(["--classes", "9"]).classes = 10
