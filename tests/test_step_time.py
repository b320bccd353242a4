"""The counts and the arithmetic of the predicted time of a step. No test measures time."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys

import pytest
import torch
from torch import nn

from models import build_backbone
from scripts import plan
from utils.errors import UserError, exit_on_user_error
from utils.planner import RunSettings
from utils.rates import ARITHMETIC, DEVICES, LAUNCHES, MEMORY, OTHER, PRODUCT, Operator, Rates, Shares, gpu_rates
from utils.step_time import BackboneWork, Work, _recording, count_backbone, count_classifier, predict_step, time_of

H100 = gpu_rates(DEVICES["h100"], Shares())
RUN = RunSettings(classes=1_000_000, batch_size=1024, world_size=8, total_bytes=80 * 2**30, cache_bytes=50 * 2**20)
BACKBONE = BackboneWork(*(Work([Operator(OTHER, False, 0, 10**9, 1)]) for _ in range(3)), trained=(10**8,))


def flops(work: Work) -> int:
    return sum(operator.flops * count for operator, count in work.items())


def launches(work: Work) -> int:
    return sum(operator.launches * count for operator, count in work.items())


def moved(work: Work) -> int:
    return sum(operator.bytes * count for operator, count in work.items())


@functools.cache
def walk(**changes) -> Work:
    return count_classifier(dataclasses.replace(RUN, **changes))[0]


def test_iresnet50_has_its_published_arithmetic():
    """insightface's table: 6.3 billion multiplications and additions for an image."""
    work = count_backbone(lambda: build_backbone("iresnet50", 512), 2, device_type="cuda", autocast_dtype=None)
    assert flops(work.forward) / 2 / 2 == pytest.approx(6.31e9, rel=0.01)
    # Two gradients of as much work as the forward pass. The images have none.
    assert flops(work.backward) == pytest.approx(2 * flops(work.forward), rel=0.01)
    assert sum(work.trained) == 4 * 43_590_336  # the last BatchNorm's weight is fixed
    # SGD reads weight, gradient and momentum and writes the first and the last (torch's kernel also the gradient).
    assert 5 * sum(work.trained) <= moved(work.update) <= 6 * sum(work.trained)


def test_depthwise_convolutions_count_each_channel_once():
    def layers(count: int) -> nn.Sequential:
        return nn.Sequential(*[nn.Conv2d(3 * 2**i, 6 * 2**i, 3, padding=1, groups=3 * 2**i) for i in range(count)])

    one, two = (count_backbone(functools.partial(layers, count), 2, device_type="cpu", autocast_dtype=None)
                for count in (1, 2))
    first = 2 * 9 * 2 * 6 * 112 * 112
    assert flops(one.forward) == flops(one.backward) == first  # no gradient of the images
    assert flops(two.forward) == 3 * first and flops(two.backward) == first + 2 * 2 * first


def test_bytes_of_a_copy():
    with _recording("cuda") as recorder:
        source, target = torch.empty(1000), torch.empty(1000)
        target.copy_(source)
    assert recorder.work == {Operator(OTHER, False, 0, 8000, 1): 1}


@pytest.mark.parametrize("changes", [
    {}, {"matmul_dtype": torch.bfloat16}, {"sub_centers": 3}, {"fused_update": True}, {"world_size": 3},
    {"classes": 1000}, {"device_type": "cpu", "class_major": False, "classes": 100_000, "cache_bytes": 8 * 2**20}])
def test_arithmetic_of_the_walk(changes):
    """6 N R d operations if all probabilities are saved, else 8 N R d, whatever the last chunk's size."""
    run = dataclasses.replace(RUN, **changes)
    rows = -(-run.batch_size // run.world_size) * run.world_size
    one = 2 * rows * -(-run.classes // run.world_size) * run.sub_centers * 512
    assert flops(walk(**changes, classifier_memory_mib=10**6)) == 3 * one
    assert flops(walk(**changes, classifier_memory_mib=0)) == 4 * one


def test_a_walk_that_saves_a_part_is_between():
    none, some, everything = (flops(walk(classifier_memory_mib=mib)) for mib in (0, 250, 10**6))
    assert everything < some < none


def test_chunks_that_are_not_walked_count_like_those_that_are(monkeypatch):
    """A small chunk gives four of them: a walk of all is the truth."""
    from utils import step_time

    small = dataclasses.replace(RUN, classes=4 * 8 * 512 - 700, cache_bytes=512 * 2 * (1024 + 512) * 4)
    counted, _ = count_classifier(small)
    whole = step_time._count_walk(small, "sgd", "fused", 1024, 0, 512, -(-small.classes // 8), 2**50)
    # The tables of all chunks, (chunks, N), are the only operators whose size depends on the number of chunks.
    assert flops(counted) == flops(whole)
    assert launches(counted) == launches(whole)
    assert moved(counted) == pytest.approx(moved(whole), rel=1e-3)


def test_sampled_classes_and_their_update():
    used = 125_000 // 10 + 1024
    counted, update = count_classifier(dataclasses.replace(RUN, sample_rate=0.1))
    assert flops(counted) == 6 * 1024 * used * 512
    assert 5 * used * 2048 < moved(update) < 40 * used * 2048
    _, none = count_classifier(dataclasses.replace(RUN, sample_rate=0.1, fused_update=True))
    assert not none


def test_an_operator_takes_as_long_as_its_slowest_part():
    rates = Rates(flops={PRODUCT: 10.0}, low_flops={PRODUCT: 40.0}, bandwidth={OTHER: 2.0}, launch=1.0,
                  cached_bandwidth=4.0, cache_bytes=8)
    for operator, seconds, bound in (
        (Operator(PRODUCT, False, 100, 12, 1), 10, ARITHMETIC), (Operator(PRODUCT, True, 100, 12, 1), 6, MEMORY),
        (Operator(OTHER, False, 0, 8, 1), 2, MEMORY), (Operator(OTHER, False, 0, 8, 3), 3, LAUNCHES),
    ):
        assert time_of(Work({operator: 5}), rates) == ("", 5 * seconds, bound)


def test_collectives():
    rates = Rates({}, {}, {OTHER: 1.0}, 0.0, node=8, node_bandwidth=400.0, network_bandwidth=10.0, node_latency=1.0,
                  network_latency=2.0)
    assert rates.collective(800, 1) == 0
    assert rates.collective(800, 8) == 3 + 700 / 400
    assert rates.collective(800, 8, passes=2) == 2 * rates.collective(800, 8)
    assert rates.collective(6400, 64) == 3 + 3 * 2 + 6300 / 80  # eight adapters of a node send at once
    assert rates.collective(800, 16) > rates.collective(800, 8)


def test_time_grows_with_classes_and_falls_with_gpus():
    def seconds(classes: int, world_size: int) -> float:
        run = dataclasses.replace(RUN, classes=classes, world_size=world_size, matmul_dtype=torch.bfloat16,
                                  classifier_memory_mib=0)  # any other memory would save a different share
        return sum(part.seconds for part in predict_step(BACKBONE, run, H100))

    by_classes = [seconds(classes, 8) for classes in (10_000, 1_000_000, 10_000_000, 100_000_000)]
    by_gpus = [seconds(100_000_000, world_size) for world_size in (8, 64, 512)]
    assert by_classes == sorted(by_classes) and by_gpus == sorted(by_gpus, reverse=True)
    assert by_classes[-1] / by_classes[-2] == pytest.approx(10, rel=0.1)


def test_replicated_classes_and_zero_have_more_to_send():
    def part(name: str, **changes) -> float:
        run = dataclasses.replace(RUN, classes=100_000, **changes)
        return next((found.seconds for found in predict_step(BACKBONE, run, H100) if name in found.name), math.nan)

    assert part("average", model_parallel=False) > part("average")
    assert math.isnan(part("embeddings", model_parallel=False)) and part("embeddings") > 0
    assert math.isnan(part("ZeRO")) and part("ZeRO", zero=True) > 0
    many: dict = dict(world_size=512, batch_size=65536)  # the walk gathers the rows' sums of all ranks
    assert part("embeddings", class_major=False, **many) > 2 * part("embeddings", **many)


def test_command(monkeypatch, capsys):
    def answer(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan", "--classes", "100000", "--processes", "16", "-a", "mobilefacenet",
                                          "--precision", "bf16", *flags])
        exit_on_user_error(plan.main)
        return capsys.readouterr().out

    assert "time of a step" not in answer()
    output = answer("--device", "h100", "--images", "1000000")
    for line in ("on 16 GPUs of 79.18 GiB", "time of a step on H100 SXM, predicted",
                 r"backbone, forward +\S+ ms +\d+%  \w+",
                 "classifier .*(launches|memory|arithmetic)", "optimizer .* ms", "embeddings to all GPUs .* network",
                 "gradients' average.* network", r"sum +\S+ ms  = [\d,]+ images/s per GPU, [\d,]+ in total",
                 r"epoch +\S+ h   of 1,000,000 images", "product 692.3", r"memory 2,898 GB/s; a launch 5 us",
                 "Classifier by ", "no GPU was measured", "Left out: loading of data"):
        assert re.search(line, output), line
    output = answer("--device", "b200", "--tflops", "1000", "--bandwidth", "5000", "--launch-us", "2", "--nvlink",
                    "700", "--network", "45", "--gpus-per-node", "16")
    for text in ("product 1,000.0", "memory 5,000 GB/s; a launch 2 us; nodes of 16: NVLink 700 GB/s",
                 "network 45 GB/s"):
        assert text in output


@pytest.mark.parametrize("flags, words", [
    ("--device cpu --world-size 2", "--device cpu with"), ("--measure", "--measure: times"),
    ("--device h100 --measure", "--measure: times"), ("--images 5", "--images without --device"),
    ("--tflops 5", "--tflops: describes a GPU"), ("--device cpu --network 5", "--network: describes a GPU"),
    ("--device v100", "--device v100"),
])
def test_options(flags, words):
    with pytest.raises(UserError, match=words):
        plan.parse_options(["--classes", "9", *flags.split()])
