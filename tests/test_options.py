"""The command line of main.py: what it accepts, and the one line it answers a mistake with."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass

import pytest
import torch

import main
from losses.margins import MARGINS
from utils.errors import UserError, exit_on_user_error
from utils.flags import flag, flags_of
from utils.options import SECTIONS, Options, complete_loss_settings, loss_flags, main_flags, parse_options

# names -> default, and the metavar or choices. Scripts of users depend on these.
PUBLISHED = {
    "data": (None, "DIR"),
    "--index": ("auto", "FILE"),
    "--skip-bad-images": (False, None),
    "--augment": ("flip", "none|flip|standard|strong"),
    "-j --workers": (4, "N"),
    "-a --arch": (None, "ARCH"),
    "--num-classes": (1000, "C"),
    "--sync-bn": (False, None),
    "--loss": ("arcface", "NAME"),
    "--scale": (64.0, "S"),
    "--epochs": (35, "N"),
    "--start-epoch": (None, "N"),
    "--max-steps": (None, "N"),
    "-b --batch-size": (512, "N"),
    "--accumulation-steps": (1, "K"),
    "--lr --learning-rate": (0.1, "LR"),
    "--schedule": ("step", "NAME"),
    "--lr-milestones": ((10.0, 16.0, 21.0), "E,E,..."),
    "--warmup-epochs": (0.0, "E"),
    "--optimizer": ("sgd", "NAME"),
    "--momentum": (0.9, "M"),
    "--wd --weight-decay": (1e-4, "W"),
    "--seed": (None, "S"),
    "--output": (".", "DIR"),
    "--resume": ("", "PATH"),
    "--init-from": ("", "PATH"),
    "--no-save": (False, None),
    "--save-freq": (None, "N"),
    "--keep": (None, "N"),
    "--on-nonfinite": ("stop", "stop|skip"),
    "-p --print-freq": (10, "N"),
    "--plan": (False, None),
    "-e --evaluate": (False, None),
    "--imgs-root": (None, "DIR"),
    "--pair-list": (None, "FILE"),
    "--val-pairs": ((), "LIST,LIST,..."),
    "--val-bin": ((), "FILE,FILE,..."),
    "--val-freq": (None, "STEPS"),
    "--multiprocessing-distributed": (False, None),
    "--nproc-per-node": (None, "N"),
    "--world-size": (1, "N"),
    "--rank": (0, "R"),
    "--dist-url": ("tcp://127.0.0.1:8000", "URL"),
    "--dist-backend": (None, "nccl|gloo"),
    "--dist-timeout": (1800.0, "SECONDS"),
    "--device": ("auto", "auto|cuda|cpu"),
    "--gpu": (None, "ID"),
    "--enable-model-parallel": (False, None),
    "--model-parallel-dim": (None, "D"),
    "--enable-amp-mode": (False, None),
    "--amp-dtype": (None, "auto|bf16|fp16"),
    "--enable-zero-optim": (False, None),
    "--precision": ("float32", "float32|float64"),
    "--classifier": ("fused", "fused|torchshard"),
    "--classifier-memory-mib": (None, "MIB"),
    "--fuse-classifier-update": (False, None),
    "--compile": (False, None),
    "--channels-last": (False, None),
}


def test_the_published_flags():
    flags = flags_of(Options)
    assert {" ".join(one.names): (one.default, one.metavar or one.choices and "|".join(one.choices))
            for one in flags.values()} == PUBLISHED
    parsed = parse_options(["some/dir"])
    for field, one in flags.items():
        assert getattr(parsed, field) == ("some/dir" if field == "data" else one.default), one.name
    assert parsed.training_arch == "iresnet50"
    iresnets = {f"iresnet{depth}" for depth in (18, 34, 50, 100, 200)}
    assert set(flags["arch"].choices) >= iresnets | {"mobilefacenet"}


def test_every_flag_is_in_a_listed_section():
    assert {flag.section for flag in main_flags().values()} == set(SECTIONS)


@dataclass(eq=False)
class Toy(torch.nn.Module):
    """A loss of another module: it has its own margin and one more setting."""

    margin: float = flag("--margin", default=0.35, metavar="M", at_least=0, at_most=1, help="toy margin")
    momentum_of_norm: float = flag("--momentum-of-norm", default=0.01, at_least=0, help="toy statistics")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(MARGINS, "toy", Toy)


def test_settings_of_the_default_loss():
    assert parse_options(["DATA"]).loss_settings == {"margin": 0.5, "easy_margin": True}
    given = parse_options(["DATA", "--no-easy-margin", "--margin", "0.3"])
    assert (given.loss, given.loss_settings) == ("arcface", {"margin": 0.3, "easy_margin": False})


def test_a_loss_brings_its_settings_and_defaults(toy):
    # The choices of --loss are those of the import; a registered loss is in them.
    assert loss_flags()["momentum_of_norm"].default is None
    assert complete_loss_settings("toy", {}) == {"margin": 0.35, "momentum_of_norm": 0.01}
    assert complete_loss_settings("toy", {"margin": 0.9}) == {"margin": 0.9, "momentum_of_norm": 0.01}
    assert "arcface 0.5, toy 0.35" in loss_flags()["margin"].default_text


@pytest.mark.parametrize(("loss", "given", "words"), [
    ("toy", {"easy_margin": False}, ["--no-easy-margin", "--loss toy", "--loss arcface"]),
    ("arcface", {"momentum_of_norm": 0.5}, ["--momentum-of-norm 0.5", "--loss arcface", "--loss toy"]),
    ("toy", {"margin": 1.2}, ["--margin 1.2", "up to 1"]),
    ("arcface", {"margin": 1.6}, ["--margin 1.6", "up to 1.5708"]),
])
def test_a_setting_that_the_loss_lacks(toy, loss, given, words):
    with pytest.raises(UserError) as raised:
        complete_loss_settings(loss, given)
    for word in words:
        assert word in str(raised.value)


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
    (["--enable-model-parallel", "--model-parallel-dim", "0"],
     ["--model-parallel-dim 0", "embedding", "--model-parallel-dim 1"]),
    (["--enable-model-parallel", "--model-parallel-dim", "2"], ["--model-parallel-dim 2"]),
    (["--num-classes", "1"], ["--num-classes 1", "at least 2"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--val-freq", "5"], ["--val-freq 5", "--val-pairs or --val-bin"]),
    (["--val-freq", "0", "--val-bin", "lfw.bin"], ["--val-freq 0", "at least 1"]),
    (["--val-bin", "lfw.bin,,"], ["--val-bin", "'lfw.bin,,'", "comma-separated"]),
    (["--val-bin", "lfw.bin", "--imgs-root", "x"], ["--imgs-root"]),
    (["--val-bin", "lfw.bin", "--evaluate", "--resume", "x", "--imgs-root", "x", "--pair-list", "x"],
     ["--val-bin", "--evaluate"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--lr-milestones", "1,x"], ["--lr-milestones", "1,x"]),
    (["--lr-milestones", "5,3"], ["--lr-milestones 5,3"]),
    (["--margin", "3"], ["--margin 3"]),
    (["--scale", "0"], ["--scale 0"]),
    (["--amp-dtype", "bf16"], ["--amp-dtype bf16", "--enable-amp-mode"]),
    (["--enable-amp-mode", "--precision", "float64"], ["--enable-amp-mode", "float64"]),
    (["--loss", "softmax"], ["--loss softmax", "arcface"]),
    (["--arch", "resnet"], ["--arch resnet", "mobilefacenet"]),
    (["--schedule", "zigzag"], ["--schedule zigzag", "step"]),
    (["--augment", "all"], ["--augment all", "none, flip, standard, strong"]),
    (["--seed", str(2**63)], [f"--seed {2**63}", "below"]),
    (["--momentum", "1"], ["--momentum 1", "below 1"]),
    (["--dist-timeout", "1e8"], ["--dist-timeout 1e+08", "10000000"]),
    (["--classifier", "torchshard", "--classifier-memory-mib", "5"],
     ["--classifier-memory-mib 5", "--classifier torchshard"]),
    (["--classifier-memory-mib", "-1"], ["--classifier-memory-mib -1", "at least 0"]),
    (["--classifier", "torchshard", "--fuse-classifier-update"],
     ["--fuse-classifier-update", "--classifier torchshard"]),
    (["--fuse-classifier-update", "--accumulation-steps", "2"], ["--fuse-classifier-update", "--accumulation-steps 2"]),
    (["--fuse-classifier-update", "--enable-zero-optim"], ["--fuse-classifier-update", "--enable-model-parallel"]),
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
    assert "no such file or directory" in answer(tmp_path / "missing")
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
