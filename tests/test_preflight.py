"""What main.py checks and prints before it starts processes: each mistake gets one line, and nothing is started."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from unittest import mock

import pytest
import torch

import main
from data.folder import FaceFolder
from utils import preflight
from utils.checkpoint.reader import Checkpoint
from utils.errors import UserError, exit_on_user_error
from utils.launch.plan import ProcessPlan, plan_processes
from utils.options import parse_options
from utils.preflight import check_classifier, run_table, shared_facts


@pytest.fixture
def answer(monkeypatch, capsys):
    """`answer(*flags)`: main.py's one line of error for them; it must come before any process is started."""
    monkeypatch.setattr(main, "launch", lambda *args: pytest.fail("training was started"))

    def call(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            exit_on_user_error(main.main)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return call


def test_bad_data_is_answered_before_training(answer, faces, tmp_path):
    assert "no such" in answer(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "has no sub-directories" in answer(tmp_path / "empty")
    (tmp_path / "empty" / "someone").mkdir()
    assert "no images" in answer(tmp_path / "empty")
    error = answer(faces, "--num-classes", 5, "-b", 4)
    assert "--num-classes 5" in error and "at least 8" in error
    error = answer(faces, "-b", 64)
    assert "--batch-size 64" in error and "has 48" in error


@pytest.mark.parametrize(("contents", "word"), [(b"", "is empty"), (b"hello, world", "not a JPEG")])
def test_a_bad_image_is_named(answer, faces, tmp_path, contents, word):
    shutil.copytree(faces, tmp_path / "faces")
    bad = sorted((tmp_path / "faces" / "train").glob("*/*.jpg"))[7]
    bad.write_bytes(contents)
    error = answer(tmp_path / "faces", "-b", 4)
    assert str(bad) in error and word in error and "--skip-bad-images" in error


def test_bad_batches_are_answered(answer, faces):
    processes = ["--multiprocessing-distributed", "--nproc-per-node", 3, "--dist-url", "tcp://127.0.0.1:29431"]
    assert "multiple of 3" in answer(faces, "-b", 8, *processes)
    assert "multiple of 6" in answer(faces, "-b", 9, "--accumulation-steps", 2, *processes)
    assert "multiple of 3" in answer(faces, "-b", 2, *processes)
    assert "--sync-bn" in answer(faces, "-b", 3, *processes)
    assert "one image per process" in answer(faces, "-b", 1)


def test_an_output_that_cannot_be_written_is_answered(answer, faces, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output" in answer(faces, "-b", 8, "--output", tmp_path / "file")
    assert "--output" in answer(faces, "-b", 8, "--output", tmp_path / "file" / "below")


def test_bad_resume_files_are_answered(answer, faces, tmp_path):
    assert "No such file" in answer(faces, "--resume", tmp_path / "missing.pth.tar")
    (tmp_path / "text").write_text("hello")
    assert "not a checkpoint" in answer(faces, "--resume", tmp_path / "text")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights")
    assert "no training state" in answer(faces, "-b", 8, "--resume", tmp_path / "weights")


@pytest.mark.parametrize("num_classes", [85744, 4000000])
def test_the_published_class_counts_print_their_plan(monkeypatch, capsys, faces, num_classes):
    monkeypatch.setattr(main, "launch", lambda *args: pytest.fail("training was started"))
    monkeypatch.setattr(sys, "argv", ["main.py", str(faces), "--enable-model-parallel", "--model-parallel-dim", "1",
                                      "-b", "8", "--num-classes", str(num_classes), "--plan"])
    monkeypatch.setattr(preflight, "host_bytes", lambda: 2**36)
    main.main()
    assert f"{num_classes:,} classes" in capsys.readouterr().out


def test_the_number_of_classes_from_the_training_set(answer, monkeypatch, capsys, faces, tmp_path):
    assert "'many'" in answer(faces, "--num-classes", "many")
    launched = []
    monkeypatch.setattr(main, "launch", lambda work, plan, options, *rest: launched.append(options.num_classes) or 0)
    assert "--num-classes: '0'" in answer(faces, "-b", 8, "--num-classes", 0)
    for given, row in (("auto", "8 classes, "), ("11", "11 classes (3 of them without images")):
        monkeypatch.setattr(sys, "argv", ["main.py", str(faces), "-b", "8", "--num-classes", given, "--output",
                                          str(tmp_path)])
        with pytest.raises(SystemExit):
            main.main()
        assert row in capsys.readouterr().out
    assert launched == [8, 11]
    (tmp_path / "one" / "someone").mkdir(parents=True)
    for number in range(2):
        shutil.copy(next((faces / "train").glob("*/*.jpg")), tmp_path / "one" / "someone" / f"{number}.jpg")
    assert "--num-classes auto" in answer(tmp_path / "one", "-b", 2, "--num-classes", "auto")
    options, dataset = parse_options([str(faces), "--num-classes", "auto"]), FaceFolder(faces)
    for classes, words in ((9, "trained with 9 classes; give --num-classes 9"), (7, "--init-from PATH")):
        with pytest.raises(UserError, match=words):
            preflight.count_classes(options, dataset, Checkpoint("PATH", "", {"num_classes": classes}, {}))


def test_a_run_that_cannot_fit_into_memory_is_answered(answer, faces, monkeypatch):
    flags = [faces, "-b", 8, "-a", "mobilefacenet", "--device", "cpu", "--plan"]
    error = answer(*flags, "--num-classes", 2**31)
    assert "--num-classes 2147483648" in error and "16.0 TiB" in error and "--enable-model-parallel" in error
    monkeypatch.setattr(preflight, "host_bytes", lambda: 8 * 2**30)  # the processes of a machine share its memory
    two = ["--multiprocessing-distributed", "--nproc-per-node", 2]
    assert "2 processes share" in answer(*flags, *two, "--num-classes", 1_000_000)
    monkeypatch.setattr(sys, "argv", list(map(str, ["main.py", *flags, *two, "--num-classes", 1_000_000,
                                                    "--enable-model-parallel"])))
    main.main()
    # 1.05 GiB of centers: weights, gradient, DDP's copy and momentum are 8 of these, with ZeRO 7.
    assert "550000" in answer(*flags, *two, "--num-classes", 550_000)
    monkeypatch.setattr(sys, "argv", list(map(str, ["main.py", *flags, *two, "--num-classes", 550_000,
                                                    "--enable-zero-optim"])))
    main.main()
    assert "--fuse-classifier-update" in answer(*flags, "--num-classes", 1_200_000)
    monkeypatch.setattr(sys, "argv", list(map(str, ["main.py", *flags, "--num-classes", 1_200_000, "--momentum", 0])))
    main.main()


def test_a_tiny_dev_shm_is_answered(answer, faces, monkeypatch):
    flags = [faces, "-b", 8, "-a", "mobilefacenet", "--device", "cpu"]
    monkeypatch.setattr(os, "statvfs", lambda path: type("Room", (), {"f_bavail": 20, "f_frsize": 4096}))
    assert "--workers 2" in (error := answer(*flags, "-j", 2)) and "80 KiB free" in error and "-j 0" in error


def test_the_table_of_the_run(faces):
    def table(*flags: str) -> dict[str, str]:
        options = parse_options([str(faces), "-b", "8", "-a", "mobilefacenet", "--device", "cpu", *flags])
        text = run_table(options, plan_processes(options), FaceFolder(str(faces)), {})
        return dict(line.split("  ", 1) for line in text.splitlines())

    rows = {name: value.strip() for name, value in table().items()}
    assert rows["loss"] == "ArcFace, margin 0.5 (easy), scale 64"
    assert rows["schedule"] == "lr 0.1, step, lr-milestones 10,16,21, warmup-epochs 0"
    assert rows["optimizer"] == "sgd, momentum 0.9, wd 0.0001"
    assert rows["class centers"] == "up to 1,000 per process: 2 MiB, 6 MiB with gradient and momentum"
    adamw = table("--optimizer", "adamw", "--schedule", "cosine", "--ema", "0.9", "--no-decay", "norm,bias")
    assert adamw["optimizer"].strip() == "adamw, wd 0.1, no-decay norm,bias, ema 0.9"
    assert adamw["schedule"].strip() == "lr 0.001, cosine, warmup-epochs 0"
    assert adamw["class centers"].strip().endswith("8 MiB with gradient and two moments")
    assert rows["images"].startswith("48 of 8 identities in ")
    assert rows["training"] == "35 epochs x 6 steps, augmentation flip"
    for flags, form in (([], "fused (walk)"), (["--classifier", "eager"], "eager (class-major eager)"),
                        (["--classifier", "torchshard"], "torchshard")):
        assert table(*flags)["classifier"].endswith(f"a copy per process, {form}")
    changed = table("--margin", "0.3", "--no-easy-margin", "--scale", "32", "--max-steps", "4", "--enable-amp-mode")
    assert "margin 0.3 (hard), scale 32" in changed["loss"]
    assert "stops at step 4" in changed["training"]
    sampled = table("--sample-rate", "0.5", "--accumulation-steps", "4", "--augment", "strong", "--compile")
    assert "MiB, 5 MiB with gradient and momentum" in sampled["class centers"]  # one gradient, of half of the rows
    assert "augmentation strong" in sampled["training"] and ", compiled" in sampled["backbone"]
    assert "backbone bfloat16, classifier float32" in changed["precision"]
    assert "tf32" not in rows["precision"] + changed["precision"]
    options = parse_options([str(faces), "-b", "8", "--device", "cpu"])
    checkpoint = Checkpoint("r/checkpoint.pth.tar", "r", {"position": {"epoch": 2, "step": 14}}, {})
    text = run_table(options, plan_processes(options), FaceFolder(str(faces)), [], checkpoint)
    assert "resumes        r/checkpoint.pth.tar, step 14, epoch 3" in text


@pytest.mark.parametrize(("flags", "words"), [
    ([], "float32, float32 products tf32"), (["--matmul", "ieee"], "float32, float32 products ieee"),
    (["--enable-amp-mode"], "mixed: backbone bfloat16, classifier bfloat16 products summed in float32, float32 "
                            "products tf32"),
    (["--precision", "float64"], "float64"),
])
def test_the_table_says_how_a_gpu_multiplies(faces, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # Triton, which CPUs need not have
    options = parse_options([str(faces), "-b", "8", "-a", "mobilefacenet", *flags])
    plan = ProcessPlan("single", 1, 0, 1, "cuda", None, "nccl", "127.0.0.1", 0, matmul=options.matmul or "tf32")
    table = run_table(options, plan, FaceFolder(str(faces)), [])
    assert f"precision      {words}" in table.splitlines() and "device         H100, nccl" in table.splitlines()
    assert f", fused (class-major {'eager' if 'float64' in flags else 'triton'})\n" in table
    with pytest.raises(UserError, match="--classifier triton with --precision float64"):
        check_classifier(parse_options([str(faces), "--precision", "float64", "--classifier", "triton"]), plan)


def test_nodes_compare_the_flags_that_must_agree(faces):
    facts = [shared_facts(parse_options([str(faces), *flags]), FaceFolder(str(faces)), {}) for flags in (
        [], ["--rank", "0", "--workers", "9", "--output", "elsewhere"], ["--wd", "0.1", "--margin", "0.2"])]
    assert facts[0] == facts[1]
    assert {name for name in facts[0] if facts[0][name] != facts[2][name]} == {"--wd", "--margin"}
    assert {"--loss", "--lr", "--resume given", "number of images"} <= set(facts[0])


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "model_best.pth.tar"])
def test_something_in_the_way_of_the_output(answer, faces, tmp_path, name):
    (tmp_path / name).mkdir() if name == "model_best.pth.tar" else (tmp_path / name).touch()
    assert f"--output {tmp_path}: {name} is" in answer(faces, "-b", 8, "--output", tmp_path)


def test_no_temporary_directory(answer, faces, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", mock.Mock(side_effect=FileNotFoundError(2, "No usable one")))
    assert "No usable one" in (error := answer(faces)) and "TMPDIR" in error
