"""Whole training steps on a fake GPU (helpers/fake_gpu.py): devices, waits, launches and collectives.

FakeTensorMode raises an error for a tensor on the wrong device. The host may wait for the GPU only where a case below
says so. Launches, bytes and collectives have upper limits: what they were when this was written. Lower them when the
code gets better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import fake_gpu
from torch.utils import backend_registration

from losses.class_major import _why_no_triton
from losses.margins import MARGINS
from utils.operators import COPY_TO_HOST, Counts

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is visible"),
    pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                       reason="this torch cannot be told of another accelerator"),
    pytest.mark.skipif(_why_no_triton(torch.device("cuda")) is not None,
                       reason="the limits are those of Triton's kernels"),
]

SHARDED = ["--enable-model-parallel"]
BF16 = ["--enable-amp-mode", "--amp-dtype", "bf16"]
FP16 = ["--enable-amp-mode", "--amp-dtype", "fp16"]

# Small copies from pageable memory, which do not wait: the decisions of the augmentation, the keys of the images.
SMALL_COPIES = 2

# Collectives of a step with 8 GPUs. DistributedDataParallel averages one bucket of a tiny backbone, and another one of
# replicated centers. Sharded classes gather labels and embeddings, sum cosines and partial sums, and scatter the
# gradient.
REPLICATED = {"allreduce_": 2}
PARALLEL = {"allreduce_": 3, "_allgather_base_": 2, "_reduce_scatter_base_": 1}


def with_more(collectives: dict[str, int], **more: int) -> dict[str, int]:
    return dict(Counter(collectives) + Counter(more))


# name: (flags, limit of launches, limit of collectives, waits that are allowed)
STEPS: dict[str, tuple[list[str], int, dict[str, int], dict[str, int]]] = {
    **{name: ([*SHARDED, "--loss", name], 265, PARALLEL, {}) for name in MARGINS},
    # Each row's largest logit is found first.
    "curricularface": ([*SHARDED, "--loss", "curricularface"], 280, {**PARALLEL, "allreduce_": 4}, {}),
    "base": ([], 215, REPLICATED, {}),
    "base, AdaFace": (["--loss", "adaface"], 230, with_more(REPLICATED, _allgather_base_=2), {}),
    "sub-centers, filter": ([*SHARDED, "--sub-centers", "3", "--inter-class-filter", "0.4"], 245, PARALLEL, {}),
    "ZeRO": ([*SHARDED, "--enable-zero-optim"], 220, with_more(PARALLEL, _allgather_base_=1), {}),
    "bf16": ([*SHARDED, *BF16], 235, PARALLEL, {}),
    "fp16": ([*SHARDED, *FP16], 260, with_more(PARALLEL, allreduce_=1), {}),
    "fp16, skip, ZeRO": ([*SHARDED, *FP16, "--on-nonfinite", "skip", "--enable-zero-optim"], 285,
                         with_more(PARALLEL, allreduce_=2, _allgather_base_=1), {}),
    "fused update, skip": ([*SHARDED, "--fuse-classifier-update", "--on-nonfinite", "skip"], 235,
                           with_more(PARALLEL, allreduce_=1), {}),
    "sampling": ([*SHARDED, "--sample-rate", "0.1"], 275, PARALLEL, {}),
    "sampling, fused update": ([*SHARDED, "--sample-rate", "0.1", "--fuse-classifier-update"], 278, PARALLEL, {}),
    "accumulation": ([*SHARDED, "--accumulation-steps", "2"], 415,
                     with_more(PARALLEL, _allgather_base_=2, _reduce_scatter_base_=1, allreduce_=2), {}),
    "sync-bn": ([*SHARDED, "--sync-bn"], 235, with_more(PARALLEL, _allgather_base_=2, allreduce_=2), {}),
    "skip, clip, EMA": ([*SHARDED, "--on-nonfinite", "skip", "--clip-grad-norm", "1", "--ema", "0.999"], 280,
                        with_more(PARALLEL, allreduce_=1), {}),
    "AdamW, fused update": ([*SHARDED, "--optimizer", "adamw", "--fuse-classifier-update"], 225, PARALLEL, {}),
    "freeze, clip centers": ([*SHARDED, "--freeze", "backbone", "--init-from", "unused", "--clip-grad-norm", "1",
                              "--clip-centers"], 205, {"_allgather_base_": 2, "allreduce_": 3}, {}),
    "strong, channels-last": ([*SHARDED, "--augment", "strong", "--channels-last"], 345, PARALLEL, {}),
    "standard": ([*SHARDED, "--augment", "standard"], 220, PARALLEL, {}),
}


@pytest.fixture(scope="module")
def on_fake_gpu() -> Iterator[Callable[..., Any]]:
    """`on_fake_gpu(function, ...)`: the result of a function of helpers/fake_gpu.py, in a process with a fake GPU."""
    with fake_gpu.in_own_process() as process:

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result, error = process.submit(fake_gpu.attempt, function, *args, **kwargs).result()
            assert not error, error
            return result

        yield run


def assert_within(counts: Counts, launches: int, collectives: dict[str, int], waits: dict[str, int],
                  host_values: int = 32 * 128) -> None:
    assert counts.waits <= Counter(waits), f"the host waits for the GPU: {counts.waits}, at {counts.where}"
    assert counts.collectives <= Counter(collectives), counts.collectives
    assert counts.launches.total() <= launches, (counts.launches.total(), counts.launches.most_common(20))
    # On the host, a step draws a few numbers for each image of the 128.
    assert all(values <= host_values for values in counts.host_values.values()), counts.host_values


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step(on_fake_gpu, name):
    flags, launches, collectives, waits = STEPS[name]
    counts, _ = on_fake_gpu(fake_gpu.count_training, flags)
    assert_within(counts, launches, collectives, waits)
    decisions = 6 if "strong" in flags else 0
    assert counts.small_copies <= (SMALL_COPIES + decisions) * (2 if "--accumulation-steps" in flags else 1)


def test_zero_has_one_collective_whatever_the_ranks(on_fake_gpu):
    counts, _ = on_fake_gpu(fake_gpu.count_training, [*SHARDED, "--enable-zero-optim"], world_size=64, rank=63)
    assert_within(counts, 220, with_more(PARALLEL, _allgather_base_=1), {})


def test_a_shard_without_classes(on_fake_gpu):
    counts, _ = on_fake_gpu(fake_gpu.count_training, SHARDED, num_classes=9, rank=7)
    assert_within(counts, 195, PARALLEL, {})


@pytest.mark.slow
def test_an_iresnet_step(on_fake_gpu):
    flags = [*SHARDED, *BF16, "-a", "iresnet50"]
    counts, _ = on_fake_gpu(fake_gpu.count_training, flags, num_classes=85_744, tiny=False, steps=1)
    assert_within(counts, 1150, with_more(PARALLEL, allreduce_=5), {})
    forward_and_backward = 3 * 128 * 12.6e9  # of 128 images; IResNet-50 takes 6.3 G multiplications and additions each
    assert counts.flops["convolution"] + counts.flops["convolution_backward"] == pytest.approx(
        forward_and_backward, rel=0.05)


@pytest.mark.slow
def test_a_mobilefacenet_step(on_fake_gpu):
    flags = [*SHARDED, *BF16, "-a", "mobilefacenet", "--checkpoint-activations", "--channels-last"]
    counts, _ = on_fake_gpu(fake_gpu.count_training, flags, tiny=False, steps=1)
    assert_within(counts, 1390, with_more(PARALLEL, allreduce_=1), {})


@pytest.mark.parametrize("zero", [False, True])
def test_saving(on_fake_gpu, zero):
    """Up to the thread that writes. The copies into pinned memory are waited for once, which is no operator.

    Copies to the host: the losses of the pending steps and whether weights are finite. Two values of the scaler are
    read. With ZeRO the state of the other ranks arrives, and is put together on the host with that of rank 0.
    """
    flags = [*SHARDED, *FP16, "--ema", "0.9", "--loss", "adaface", *(["--enable-zero-optim"] if zero else [])]
    _, counts = on_fake_gpu(fake_gpu.count_training, flags, then="save")
    received = 7 * zero
    assert_within(counts, 130, {"_allgather_base_": 2, "_allgather_base_ (host)": 2, "recv_": received},
                  {COPY_TO_HOST: 3 + 8 * zero, "_local_scalar_dense": 2}, host_values=110_592 if zero else 32 * 128)


def test_evaluating(on_fake_gpu):
    """Of all batches and ranks the embeddings are copied to the host once, in the end."""
    _, counts = on_fake_gpu(fake_gpu.count_training, SHARDED, then="evaluate")
    assert counts.waits <= Counter({COPY_TO_HOST: 1}), (counts.waits, counts.where)
    assert counts.collectives <= Counter({"_allgather_base_": 1, "allreduce_": 1}), counts.collectives
    assert counts.launches.total() <= 95


def at_a_million(small: Counter[str], large: Counter[str], classes: int) -> float:
    """The total for 1,000,000 classes, of the counts at `classes` and at twice as many."""
    return small.total() + (large.total() - small.total()) * (1_000_000 - classes) / classes


@pytest.mark.parametrize(("form", "saved_probs_mib", "launches", "gib"), [
    ("eager", 1e6, 1020, 64), ("eager", 0, 1330, 82), ("triton", 1e6, 300, 21.3), ("triton", 0, 330, 22.3)])
def test_the_classifier_at_a_million_classes(on_fake_gpu, form, saved_probs_mib, launches, gib):
    """Two chunks of classes and four of them show what a chunk takes."""
    classes = 65_536
    small, large = (on_fake_gpu(fake_gpu.count_classifier, count, saved_probs_mib=saved_probs_mib, form=form)
                    for count in (classes, 2 * classes))
    assert not small.waits and not large.waits
    assert at_a_million(small.launches, large.launches, classes) <= launches
    assert at_a_million(small.bytes, large.bytes, classes) / 2**30 <= gib
    products = 3 if saved_probs_mib else 4
    teraflops = products * 2 * 1024 * 1e6 * 512 / 1e12
    assert at_a_million(small.flops, large.flops, classes) / 1e12 == pytest.approx(teraflops, rel=0.01)


def test_a_pass_for_the_largest_logits_at_a_million_classes(on_fake_gpu):
    """CurricularFace, whose scale is too large for one shift, still takes the kernels."""
    classes = 65_536
    small, large = (on_fake_gpu(fake_gpu.count_classifier, count, form="triton", loss="curricularface")
                    for count in (classes, 2 * classes))
    assert at_a_million(small.launches, large.launches, classes) <= 385
    assert at_a_million(small.bytes, large.bytes, classes) / 2**30 <= 31


def test_faults_are_seen(on_fake_gpu):
    """What each operator is taken for."""
    found = on_fake_gpu(fake_gpu.count_examples)
    assert {name for name, counts in found.items() if counts is not None and counts.waits} == {
        "item", "tolist", "mask", "copy to the host", "pageable copy", "large pageable copy", "new tensor",
        "index on the host", "blocking pinned copy"}
    assert found["small copy"].small_copies == 1
    assert found["pinned copy"].launches == {"_to_copy": 1}
    assert found["mm"].flops == {"mm": 2 * 4 * 8 * 16} and found["mm"].bytes == {"mm": 4 * (4 * 8 + 8 * 16 + 4 * 16)}
    assert found["view"].launches == {} and found["foreach"].launches == {"_foreach_add_": 2}
    assert found["device mismatch"] is None and found["all-reduce"].collectives == {"allreduce_": 1}
    assert found["all-reduce"].collective_bytes == {"allreduce_": 4 * 8 * 4}
