"""The benchmarks at sizes that only show that they run. Their figures mean nothing here."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import sys
from unittest import mock

import pytest
import torch
from helpers.commands import run
from helpers.tiny import TinyBackbone

from data.augment import AUGMENTS
from scripts import bench_classifier, bench_data, bench_step
from scripts.measure import MIB, PeakMemory, check_csv, percentiles
from utils import build
from utils.dist.context import DistContext
from utils.errors import UserError, exit_on_user_error

CPU = torch.device("cpu")


def test_classifier_command(tmp_path):
    flags = ["--classes", 1001, "--batch", 8, "--world-size", 2, "--steps", 2, "--update", "--device", "cpu"]
    table = tmp_path / "new" / "rows.csv"
    result = json.loads(run("scripts/bench_classifier.py", *flags, "--json", "--csv", table))
    assert {"classes", "batch", "world_size", "gemm_floor_s", "weight_mib", "impl"} <= result.keys()
    assert (result["classes"], result["batch"], result["world_size"]) == (1001, 8, 2)
    assert result["weight_mib"] == pytest.approx(501 * 512 * 4 / MIB)
    assert result["gemm_floor_s"] > 0 and result["checked_classes"] == 1001
    assert list(result["impl"]) == ["fused", "torchshard"]
    for figures in result["impl"].values():
        assert 0 < figures["p20_s"] <= figures["p50_s"] <= figures["p80_s"]
        assert 0 <= figures["extra_mib"] < 200
    rows = list(csv.DictReader(table.open()))
    assert [row["impl"] for row in rows] == ["fused", "torchshard"]
    assert float(rows[0]["over_floor"]) == pytest.approx(result["impl"]["fused"]["p50_s"] / result["gemm_floor_s"])
    assert float(rows[1]["speedup_to_torchshard"]) == 1


@pytest.mark.slow
def test_step_command(tmp_path):
    """`test_both_ways_of_training_take_turns` covers the measuring itself with a tiny backbone."""
    flags = ["-a", "mobilefacenet", "--classes", 20, "--batch", 2, "--steps", 1, "--block", 1, "--device", "cpu"]
    table = tmp_path / "rows.csv"
    result = json.loads(run("scripts/bench_step.py", *flags, "--json", "--csv", table))
    assert {"arch", "classes", "batch", "world_size", "precision", "impl"} <= result.keys()
    assert list(result["impl"]) == ["ours", "published"]
    for figures in result["impl"].values():
        assert 0 < figures["p20_images_s"] <= figures["p50_images_s"] <= figures["p80_images_s"]
        assert 50 < figures["peak_mib"] < 2000  # two images' activations are 70 MiB
        assert 0 < figures["first_loss"] < 100
    assert [row["impl"] for row in csv.DictReader(table.open())] == ["ours", "published"]


@pytest.mark.parametrize("script", [bench_classifier, bench_step])
def test_a_wrong_implementation_is_one_line(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", ["bench", "--classes", "10", "--batch", "4", "--impl", "fused,ours,theirs"])
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(script.main)
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: --impl fused,ours,theirs: ")


@pytest.mark.parametrize("flags, words", [
    ("--classes 1 --batch 4", "--classes 1"),
    ("--classes 9 --batch 5 --world-size 2", "--batch 5: must divide"),
    ("--classes 4 --batch 3 --world-size 3", "--classes 4: leaves"),
    ("--classes 9 --batch 4 --operands bf16", "--operands bf16"),
    ("--classes 9 --batch 4 --impl fused,fused", "twice"),
])
def test_classifier_options(flags, words):
    with pytest.raises(UserError, match=words):
        bench_classifier.parse_options([*flags.split(), "--device", "cpu"])


@pytest.mark.parametrize("flags, words", [
    ("--classes 9 --batch 2 --world-size 2", "two images"),
    ("--classes 9 --batch 4 --fuse-classifier-update --precision fp16", "no such mode"),
    ("--classes 9 --batch 4 --fuse-classifier-update --classifier torchshard", "--fuse-classifier-update with"),
    ("--classes 9 --batch 4 -a resnet", "resnet"),
])
def test_step_options(flags, words):
    with pytest.raises(UserError, match=words):
        bench_step.parse_options([*flags.split(), "--device", "cpu"])


def test_step_flags_reach_the_trainer():
    _, training = bench_step.parse_options(
        "--classes 9 --batch 4 --world-size 2 --precision bf16 --channels-last --fuse-classifier-update --device cpu".split()
    )
    assert training.enable_amp_mode and training.amp_dtype == "bf16" and training.nproc_per_node == 2
    assert training.channels_last and training.fuse_classifier_update and not training.compile


def classifier_in_this_process(rank: int, world_size: int, flags: str, attribute: str, replacement: str) -> str:
    """What bench_classifier's `measure` prints, or its error, with an attribute replaced by a function of this file."""
    options = bench_classifier.parse_options([*flags.split(), "--device", "cpu", "--json"])
    printed = io.StringIO()
    replaced = mock.patch.object(bench_classifier, attribute, globals()[replacement])
    with replaced, contextlib.redirect_stdout(printed):
        try:
            bench_classifier.measure(DistContext(rank, world_size, world_size, CPU), options)
        except UserError as error:
            return f"error: {error}"
    return printed.getvalue()


def slightly_wrong(embedding, target, centers, margin, **settings):
    settings = {name: settings[name] for name in ("scale", "group", "norm")}
    loss, num_closer = bench_classifier.margin_softmax_torchshard(embedding, target, centers, margin, **settings)
    return loss + 1e-3 * (embedding - embedding.detach()).sum(), num_closer


def never_fits(name, *others):
    return name == "torchshard"


def test_nothing_is_measured_where_the_results_differ(pools):
    (message,) = pools(1).run(
        classifier_in_this_process, "--classes 300 --batch 4 --steps 1", "margin_softmax", slightly_wrong.__name__
    )
    assert message.startswith("error: --impl fused: its gradient of the embeddings differs from torchshard's by ")


def test_what_does_not_fit_is_reported_and_the_others_are_measured(pools):
    (printed,) = pools(1).run(
        classifier_in_this_process, "--classes 300 --batch 4 --steps 1", "will_not_fit", never_fits.__name__
    )
    impl = json.loads(printed)["impl"]
    assert impl["torchshard"]["error"] == "out of memory" and impl["torchshard"]["p50_s"] is None
    assert impl["fused"]["p50_s"] > 0


def step_in_this_process(rank: int, world_size: int, table: str) -> str:
    """What bench_step's `measure` prints, with a tiny backbone."""
    options, training = bench_step.parse_options([
        "--classes", "30", "--batch", "8", "--world-size", str(world_size), "--steps", "2", "--block", "1",
        "--device", "cpu", "--json", "--csv", table])
    tiny = mock.Mock(side_effect=lambda arch, embedding_size: TinyBackbone(batch_norm=True))
    printed = io.StringIO()
    with (
        mock.patch.object(bench_step, "build_backbone", tiny), contextlib.redirect_stdout(printed),
        mock.patch.object(build, "build_backbone", tiny),
    ):
        bench_step.measure(DistContext(rank, world_size, world_size, CPU), options, training)
    return printed.getvalue()


def test_both_ways_of_training_take_turns(pools, tmp_path):
    result = json.loads(pools(2).run(step_in_this_process, str(tmp_path / "rows.csv"))[0])
    assert {"arch", "classes", "batch", "world_size", "precision", "impl"} <= result.keys()
    assert list(result["impl"]) == ["ours", "published"]
    for figures in result["impl"].values():
        assert 0 < figures["p20_images_s"] <= figures["p50_images_s"] <= figures["p80_images_s"]
        assert 0 <= figures["peak_mib"] < 2000 and 0 < figures["first_loss"] < 100
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["impl"], row["classes"]) for row in rows] == [("ours", "30"), ("published", "30")]
    assert float(rows[1]["speedup_to_published"]) == 1


def first_losses(rank: int, world_size: int) -> tuple[float, float]:
    """(ours, published) on the same images, without the mirroring that only ours does."""
    flags = ["--classes", "30", "--batch", "8", "--world-size", str(world_size), "--device", "cpu"]
    options, training = bench_step.parse_options(flags)
    training = dataclasses.replace(training, augment="none")
    context = DistContext(rank, world_size, world_size, CPU)
    images, labels = bench_step.draw_batch(context, options)
    losses = []
    tiny = mock.Mock(side_effect=lambda arch, embedding_size: TinyBackbone(batch_norm=True))
    with (
        mock.patch.object(bench_step, "build_backbone", tiny),
        mock.patch.object(build, "build_backbone", tiny),
    ):
        for way in (bench_step.OurTraining(context, training, images, labels),
                    bench_step.PublishedTraining(context, options, images, labels)):
            way.run(1)
            losses.append(way.first_loss())
            way.run(2)
    return tuple(losses)


@pytest.mark.parametrize("world_size", [1, 2])
def test_both_ways_of_training_start_from_the_same_loss(pools, world_size):
    for ours, published in pools(world_size).run(first_losses):
        assert ours == pytest.approx(published, rel=1e-4)


def test_peak_memory_counts_what_was_freed_again():
    memory = PeakMemory(CPU)
    torch.ones(64 * MIB // 4).sum()
    assert 60 < memory.bytes() / MIB < 80
    memory.restart()
    assert memory.bytes() / MIB < 20


def test_percentiles():
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == [2.0, 3.5, 5.0]


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    check_csv(str(path), ("a", "b"))
    with pytest.raises(UserError, match="other columns"):
        check_csv(str(path), ("a", "c"))
    assert path.read_text() == "a,b\n1,2\n"


def test_data_command_in_this_process(faces, tmp_path, monkeypatch, capsys):
    # Fresh processes would import torch and torchvision seven times.
    monkeypatch.setattr(bench_data, "in_a_fresh_process", lambda work, *args: work(*args))
    monkeypatch.setattr(bench_data.time, "sleep", lambda seconds: None)
    table = tmp_path / "rows.csv"
    flags = [faces / "train", "--workers", "0,1", "--batch", 8, "--rounds", 2, "--batches", 2, "--files", 60, "--directories", 7]
    monkeypatch.setattr(sys, "argv", ["bench_data.py", *map(str, flags), "--json", "--csv", str(table)])
    threads = torch.get_num_threads()
    try:
        bench_data.main()
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(capsys.readouterr().out)
    loaders = [(row["impl"], row["workers"]) for row in rows if row["measure"] == "loader"]
    assert loaders == [("ours", 0), ("published", 0), ("ours", 1), ("published", 1)]
    assert [row["impl"] for row in rows[4:]] == [*AUGMENTS, "published", "first, scans", "later, by the index"]
    for row in rows:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    assert rows[0]["over_published"] == pytest.approx(rows[0]["p50"] / rows[1]["p50"])
    assert rows[2]["worker_private_mib"] > 0.1 and rows[-1]["files"] == 60 and rows[-1]["directories"] == 7
    assert [row["impl"] for row in csv.DictReader(table.open())] == [row["impl"] for row in rows]
    assert bench_data.as_text(rows).count("\n") == 2 + len(rows)


@pytest.mark.parametrize("flags, words", [
    ("", "nothing to measure"),
    ("--files 5 --directories 6", "--files 5: fewer"),
    ("images --workers 1,x", "--workers 1,x"),
    ("images --workers=-1", "--workers -1: give at least 0"),
    ("--files 10 --directories 2 --temporary /nowhere", "--temporary /nowhere"),
])
def test_data_options(flags, words):
    with pytest.raises(UserError, match=words):
        bench_data.parse_options(flags.split())
