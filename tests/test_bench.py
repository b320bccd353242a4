"""The benchmarks at sizes that only show that they run. Their figures mean nothing here."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from unittest import mock

import pytest
import torch
from helpers.commands import run
from helpers.tiny import TinyBackbone

from data.augment import AUGMENTS
from scripts import bench_classifier, bench_data, bench_step, measure
from scripts.measure import MIB
from utils.dist.context import DistContext
from utils.errors import UserError, exit_on_user_error

CPU = torch.device("cpu")


def read_rows(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_classifier_command(tmp_path):
    flags = ["--classes", 1001, "--batch", 8, "--world-size", 2, "--steps", 2, "--update", "--device", "cpu",
             "--sample-rate", "0.3", "--embedding-size", 64]
    table = tmp_path / "rows.csv"
    printed = run("scripts/bench_classifier.py", *flags, "--csv", table)
    rows = read_rows(table)
    assert [row["impl"] for row in rows] == ["fused", "torchshard", "fused, rate 0.3"]
    for row in rows:
        assert (row["classes"], row["batch"], row["world_size"], row["update"]) == ("1001", "8", "2", "True")
        assert 0 < float(row["p20_s"]) <= float(row["p50_s"]) <= float(row["p80_s"]) and float(row["gemm_floor_s"]) > 0
        assert 0 <= float(row["extra_mib"]) < 200
        assert float(row["over_floor"]) == pytest.approx(float(row["p50_s"]) / float(row["gemm_floor_s"]))
        assert row["impl"] in printed
    assert float(rows[1]["speedup_to_torchshard"]) == 1


@pytest.mark.slow
def test_step_command(tmp_path):
    """`test_both_ways_of_training_take_turns` covers the measuring itself with a tiny backbone."""
    flags = ["-a", "mobilefacenet", "--classes", 20, "--batch", 2, "--steps", 1, "--block", 1, "--device", "cpu"]
    run("scripts/bench_step.py", *flags, "--csv", tmp_path / "rows.csv")
    for row in check_step_rows(tmp_path / "rows.csv"):
        assert 50 < float(row["peak_mib"])  # two images' activations are 70 MiB


def check_step_rows(path) -> list[dict[str, str]]:
    rows = read_rows(path)
    assert [row["impl"] for row in rows] == ["ours", "published"]
    for row in rows:
        assert 0 < float(row["p20_images_s"]) <= float(row["p50_images_s"]) <= float(row["p80_images_s"])
        # No lower bound: a process of the pool may free what earlier tests left in it. The command's test has one.
        assert float(row["peak_mib"]) < 2000 and 0 < float(row["first_loss"]) < 100
    assert float(rows[1]["speedup_to_published"]) == 1
    return rows


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
    ("--classes 9 --batch 4 --operands bf16", "--operands bf16"),
    ("--classes 9 --batch 4 --impl torchshard --sample-rate 0.3", "--sample-rate without fused"),
])
def test_classifier_options(flags, words):
    with pytest.raises(UserError, match=words):
        bench_classifier.parse_options([*flags.split(), "--device", "cpu"])


@pytest.mark.parametrize("flags, words", [
    ("--classes 9 --batch 2 --world-size 2", "--batch 2: .*needs two"),
    ("--classes 9 --batch 4 --fuse-classifier-update --precision fp16", "--fuse-classifier-update with fp16"),
    ("--classes 9 --batch 4 --fuse-classifier-update --classifier torchshard", "--fuse-classifier-update with"),
    ("--classes 9 --batch 4 -a resnet", "resnet"),
])
def test_step_options(flags, words):
    with pytest.raises(UserError, match=words):
        bench_step.parse_options([*flags.split(), "--device", "cpu"])


def test_step_flags_reach_the_trainer():
    flags = "--classes 9 --batch 4 --world-size 2 --precision bf16 --channels-last --fuse-classifier-update"
    _, training = bench_step.parse_options([*flags.split(), "--device", "cpu"])
    assert training.enable_amp_mode and training.amp_dtype == "bf16" and training.nproc_per_node == 2
    assert training.channels_last and training.fuse_classifier_update and not training.compile


def classifier_in_this_process(rank: int, world_size: int, table: str, replaced: str, replacement: str) -> str:
    """What bench_classifier's `run` prints, or its error, with a function replaced by one of this file."""
    flags = f"--classes 300 --batch 4 --steps 1 --device cpu --csv {table}"
    options = bench_classifier.parse_options(flags.split())
    printed = io.StringIO()
    with mock.patch(replaced, globals()[replacement]), contextlib.redirect_stdout(printed):
        try:
            bench_classifier.run(DistContext(rank, world_size, world_size, CPU), options)
        except UserError as error:
            return f"error: {error}"
    return printed.getvalue()


def slightly_wrong(embedding, target, centers, margin, **settings):
    settings = {name: settings[name] for name in ("scale", "group", "norm")}
    loss, num_closer = bench_classifier.margin_softmax_torchshard(embedding, target, centers, margin, **settings)
    return loss + 1e-3 * (embedding - embedding.detach()).sum(), num_closer


def wrong_form(name, device_type):
    return slightly_wrong


def nothing_is_free() -> int:
    return 0


@pytest.mark.slow
def test_nothing_is_measured_where_the_results_differ(pools, tmp_path):
    (message,) = pools(1).run(classifier_in_this_process, str(tmp_path / "rows.csv"),
                              "scripts.bench_classifier.find_form", wrong_form.__name__)
    assert message.startswith("error: --impl fused: its gradient of the embeddings differs from torchshard's by ")
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.slow
def test_what_does_not_fit_is_reported_and_the_others_are_measured(pools, tmp_path):
    (printed,) = pools(1).run(classifier_in_this_process, str(tmp_path / "rows.csv"),
                              "scripts.measure.free_host_bytes", nothing_is_free.__name__)
    assert printed.startswith("torchshard: out of memory\n")
    (row,) = read_rows(tmp_path / "rows.csv")
    assert row["impl"] == "fused" and float(row["p50_s"]) > 0 and row["speedup_to_torchshard"] == ""


def step_in_this_process(rank: int, world_size: int, table: str, wrong: float) -> None:
    """bench_step's `run` with a tiny backbone; `wrong` is added to the scale of the published way."""
    options, training = bench_step.parse_options([
        "--classes", "30", "--batch", "8", "--world-size", str(world_size), "--steps", "2", "--block", "1",
        "--device", "cpu", "--csv", table])
    tiny = mock.Mock(side_effect=lambda arch, embedding_size: TinyBackbone(batch_norm=True))
    with (
        mock.patch.object(bench_step, "build_backbone", tiny), mock.patch("utils.build.build_backbone", tiny),
        mock.patch.object(bench_step, "SCALE", 64.0 + wrong),
    ):
        bench_step.run(DistContext(rank, world_size, world_size, CPU), options, training)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_both_ways_of_training_take_turns(pools, tmp_path, world_size):
    pools(world_size).run(step_in_this_process, str(tmp_path / "rows.csv"), 0.0)
    rows = check_step_rows(tmp_path / "rows.csv")
    assert rows[0]["classes"] == "30" and rows[0]["world_size"] == str(world_size)
    ours, published = (float(row["first_loss"]) for row in rows)
    assert ours == pytest.approx(published, rel=1e-4)


def test_steps_are_not_timed_where_the_first_losses_differ(pools, tmp_path):
    with pytest.raises(Exception, match="first losses differ"):
        pools(1).run(step_in_this_process, str(tmp_path / "rows.csv"), 10.0)
    assert not (tmp_path / "rows.csv").exists()


def test_peak_memory_counts_what_was_freed_again():
    held = measure.restart_peak(CPU)
    torch.ones(64 * MIB // 4).sum()
    assert 60 < measure.peak_mib(CPU, held) < 80
    measure.restart_peak(CPU)
    assert measure.peak_mib(CPU, held) < 20


def test_spread():
    assert measure.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], "_s") == {"p20_s": 2.0, "p50_s": 3.5, "p80_s": 5.0}


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    measure.check_csv(str(path), ("a", "b"))
    with pytest.raises(UserError, match="other columns"):
        measure.check_csv(str(path), ("a", "c"))
    assert path.read_text() == "a,b\n1,2\n"


@pytest.mark.slow
def test_data_command_in_this_process(faces, tmp_path, monkeypatch, capsys):
    # Fresh processes would import torch and torchvision seven times.
    monkeypatch.setattr(bench_data, "open_in_a_fresh_process", bench_data.open_folder)
    monkeypatch.setattr(bench_data.time, "sleep", lambda seconds: None)
    table = tmp_path / "rows.csv"
    flags = [faces / "train", "--workers", "0,1", "--batch", 8, "--rounds", 2, "--batches", 2, "--files", 60]
    monkeypatch.setattr(sys, "argv", ["bench_data.py", *map(str, flags), "--directories", "7", "--csv", str(table)])
    threads = torch.get_num_threads()
    try:
        bench_data.main()
    finally:
        torch.set_num_threads(threads)
    rows = read_rows(table)
    loaders = [(row["impl"], row["workers"]) for row in rows if row["measure"] == "loader"]
    assert loaders == [("ours", "0"), ("published", "0"), ("ours", "1"), ("published", "1")]
    assert [row["impl"] for row in rows[4:]] == [*AUGMENTS, "published", "first, scans", "later, by the index"]
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
    assert float(rows[0]["over_published"]) == pytest.approx(float(rows[0]["p50"]) / float(rows[1]["p50"]))
    assert (rows[-1]["files"], rows[-1]["directories"]) == ("60", "7") and float(rows[-1]["process_mib"]) >= 0
    assert capsys.readouterr().out.count("\n") == 3 + len(rows)  # machine, empty line, head


@pytest.mark.parametrize("flags, words", [
    ("", "nothing to measure"),
    ("images --workers 1,x", "1,x.*numbers"),
    ("images --workers=-1", "--workers -1: give a number of at least 0"),
])
def test_data_options(flags, words):
    with pytest.raises(UserError, match=words):
        bench_data.parse_options(flags.split())
