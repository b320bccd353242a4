"""The command line of main.py: what it accepts, and the one line it answers a mistake with."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

import main
from utils.errors import UserError, exit_on_user_error
from utils.launch.plan import plan_processes
from utils.options import parse_options


def test_published_defaults():
    options = parse_options(["some/dir"])
    assert (options.data, options.training_arch, options.workers, options.epochs, options.batch_size) == (
        "some/dir", "iresnet50", 4, 35, 512)
    assert (options.lr, options.momentum, options.weight_decay, options.print_freq) == (0.1, 0.9, 1e-4, 10)
    assert (options.world_size, options.rank, options.dist_url) == (1, 0, "tcp://127.0.0.1:8000")
    assert (options.margin, options.scale, options.easy_margin, options.num_classes) == (0.5, 64, True, 1000)
    assert options.lr_milestones == (10, 16, 21)


@pytest.mark.parametrize("argv", [
    ["DATA", "--lr-milestones", "1,2", "-b", "8"],
    ["--lr-milestones", "1,2", "DATA", "-b", "8"],
    ["--multiprocessing-distributed", "--no-easy-margin", "--learning-rate", "0.2", "--weight-decay", "0", "DATA"],
])
def test_directory_before_or_after_the_flags(argv):
    assert parse_options(argv).data == "DATA"


def test_the_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        parse_options(["DATA"]).batch_size = 3


@pytest.mark.parametrize(("flags", "words"), [
    (["--model-parallel-dim", "1"], ["--model-parallel-dim 1", "--enable-model-parallel"]),
    (["--enable-model-parallel", "--model-parallel-dim", "0"], ["--model-parallel-dim 0", "embedding", "--model-parallel-dim 1"]),
    (["--enable-model-parallel", "--model-parallel-dim", "2"], ["--model-parallel-dim 2"]),
    (["--num-classes", "1"], ["--num-classes 1", "at least 2"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--val-freq", "5"], ["--val-freq 5", "--val-pairs or --val-bin"]),
    (["--val-freq", "0", "--val-bin", "lfw.bin"], ["--val-freq 0", "at least 1"]),
    (["--val-bin", "lfw.bin,,"], ["--val-bin", "'lfw.bin,,'", "comma-separated"]),
    (["--val-bin", "lfw.bin", "--imgs-root", "x"], ["--imgs-root"]),
    (["--val-bin", "lfw.bin", "--evaluate", "--resume", "x", "--imgs-root", "x", "--pair-list", "x"], ["--val-bin", "--evaluate"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--lr-milestones", "1,x"], ["--lr-milestones", "1,x"]),
    (["--lr-milestones", "5,3"], ["--lr-milestones 5,3"]),
    (["--margin", "3"], ["--margin 3"]),
    (["--scale", "0"], ["--scale 0"]),
    (["--amp-dtype", "bf16"], ["--amp-dtype bf16", "--enable-amp-mode"]),
    (["--enable-amp-mode", "--precision", "float64"], ["--enable-amp-mode", "float64"]),
    (["--nproc-per-node", "2"], ["--nproc-per-node 2", "--multiprocessing-distributed"]),
    (["--gpu", "0", "--multiprocessing-distributed"], ["--gpu 0"]),
    (["--gpu", "0", "--device", "cpu"], ["--gpu 0"]),
    (["--classifier", "torchshard", "--classifier-memory-mib", "5"], ["--classifier-memory-mib 5", "--classifier torchshard"]),
    (["--classifier-memory-mib", "-1"], ["--classifier-memory-mib -1", "at least 0"]),
    (["--classifier", "torchshard", "--fuse-classifier-update"], ["--fuse-classifier-update", "--classifier torchshard"]),
    (["--fuse-classifier-update", "--accumulation-steps", "2"], ["--fuse-classifier-update", "--accumulation-steps 2"]),
    (["--fuse-classifier-update", "--enable-zero-optim"], ["--fuse-classifier-update", "--enable-model-parallel"]),
    (["--world-size", "2", "--rank", "2"], ["--rank 2"]),
    (["--world-size", "0"], ["--world-size 0"]),
    (["--dist-url", "localhost:80"], ["--dist-url localhost:80"]),
    (["--resume", "x", "--start-epoch", "3"], ["--start-epoch 3", "--resume"]),
    (["--start-epoch", "35"], ["--start-epoch 35", "--epochs 35"]),
    (["--imgs-root", "x"], ["--evaluate"]),
    (["-e"], ["--evaluate", "--resume"]),
    (["-e", "--resume", "x"], ["--imgs-root", "--pair-list"]),
    (["--batch-size", "many"], ["--batch-size", "many"]),
    (["--batch-size", "0"], ["--batch-size 0"]),
    (["--max-steps", "0"], ["--max-steps 0"]),
    (["--accumulation-steps", "0"], ["--accumulation-steps 0"]),
    (["--save-freq", "0"], ["--save-freq 0"]),
    (["--keep", "0"], ["--keep 0"]),
    (["--keep", "3", "--no-save"], ["--keep 3", "--no-save"]),
    (["--save-freq", "3", "--no-save"], ["--save-freq 3", "--no-save"]),
    (["-e", "--resume", "auto", "--imgs-root", "x", "--pair-list", "x"], ["--evaluate", "--resume auto"]),
    (["--no-such-flag"], ["--no-such-flag"]),
])
def test_a_wrong_flag_is_named(flags, words):
    with pytest.raises(UserError) as raised:
        parse_options(["DATA", *flags])
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_the_directory_is_required():
    with pytest.raises(UserError, match="DIR is missing"):
        parse_options([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("flags", "word"), [(["--device", "cuda"], "--device cuda"), (["--gpu", "0"], "--gpu 0"),
                                             (["--dist-backend", "nccl"], "--dist-backend nccl")])
def test_no_gpu(flags, word):
    with pytest.raises(UserError, match=word):
        plan_processes(parse_options(["DATA", *flags]))


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
    assert "no such directory" in answer(tmp_path / "missing")
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


def test_a_port_in_use_is_answered(answer, faces):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = answer(faces, "-b", 8, "--multiprocessing-distributed", "--nproc-per-node", 2, "--dist-url", f"tcp://127.0.0.1:{port}")
    assert f"port {port}" in error


def test_bad_resume_files_are_answered(answer, faces, tmp_path):
    assert "no such file" in answer(faces, "--resume", tmp_path / "missing.pth.tar")
    (tmp_path / "text").write_text("hello")
    assert "not a checkpoint" in answer(faces, "--resume", tmp_path / "text")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights")
    assert "no training state" in answer(faces, "-b", 8, "--resume", tmp_path / "weights")


@pytest.mark.parametrize("num_classes", [85744, 4000000])
def test_the_published_class_counts_print_their_plan(monkeypatch, capsys, faces, num_classes):
    monkeypatch.setattr(main, "launch", lambda *args: pytest.fail("training was started"))
    monkeypatch.setattr(sys, "argv", ["main.py", str(faces), "--enable-model-parallel", "--model-parallel-dim", "1",
                                      "-b", "8", "--num-classes", str(num_classes), "--plan"])
    main.main()
    assert f"{num_classes:,} classes" in capsys.readouterr().out
