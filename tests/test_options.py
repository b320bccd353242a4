"""The command line of main.py: its published flags, the settings of losses, and errors that name the flag."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from losses.margins import MARGINS
from utils.errors import UserError
from utils.flags import flag, flags_of
from utils.options import (
    SECTIONS,
    Options,
    complete_loss_settings,
    describe_changes,
    loss_flags,
    main_flags,
    parse_options,
)

# names -> default, and the metavar or choices. Scripts of users depend on these.
PUBLISHED = {
    "data": (None, "DIR"),
    "--identities": (None, "separate|shared"),
    "--exclude": (None, "FILE"),
    "--index": ("auto", "FILE"),
    "--skip-bad-images": (False, None),
    "--augment": ("flip", "none|flip|standard|strong"),
    "-j --workers": (4, "N"),
    "-a --arch": (None, "ARCH"),
    "--embedding-size": (512, "D"),
    "--num-classes": (1000, "C"),
    "--sync-bn": (False, None),
    "--loss": ("arcface", "NAME"),
    "--scale": (None, "S"),
    "--margin-gradient": ("exact", "exact|unit"),
    "--inter-class-filter": (None, "T"),
    "--sub-centers": (1, "K"),
    "--sample-rate": (1.0, "R"),
    "--epochs": (35, "N"),
    "--start-epoch": (None, "N"),
    "--max-steps": (None, "N"),
    "-b --batch-size": (512, "N"),
    "--accumulation-steps": (1, "K"),
    "--lr --learning-rate": (None, "LR"),
    "--schedule": ("step", "NAME"),
    "--lr-milestones": (None, "E,E,..."),
    "--poly-power": (None, "P"),
    "--warmup-epochs": (0.0, "E"),
    "--optimizer": ("sgd", "NAME"),
    "--backbone-lr-scale": (None, "X"),
    "--freeze": ((), "PART,PART,..."),
    "--momentum": (None, "M"),
    "--wd --weight-decay": (None, "W"),
    "--no-decay": (None, "KIND,..."),
    "--clip-grad-norm": (None, "X"),
    "--clip-centers": (False, None),
    "--ema": (None, "DECAY"),
    "--seed": (None, "S"),
    "--output": (".", "DIR"),
    "--resume": ("", "PATH"),
    "--init-from": ("", "PATH"),
    "--channel-order": (None, "rgb|bgr"),
    "--no-save": (False, None),
    "--save-freq": (None, "N"),
    "--keep": (None, "N"),
    "--on-nonfinite": ("stop", "stop|skip"),
    "-p --print-freq": (10, "N"),
    "--plan": (False, None),
    "-e --evaluate": (False, None),
    "--imgs-root": (None, "DIR"),
    "--pair-list": (None, "FILE"),
    "--skip-missing-pairs": (False, None),
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
    "--local-rank --local_rank": (None, "N"),
    "--matmul": (None, "tf32|ieee"),
    "--enable-model-parallel": (False, None),
    "--model-parallel-dim": (None, "D"),
    "--enable-amp-mode": (False, None),
    "--amp-dtype": (None, "auto|bf16|fp16"),
    "--enable-zero-optim": (False, None),
    "--precision": ("float32", "float32|float64"),
    "--classifier": ("fused", "fused|eager|triton|torchshard"),
    "--classifier-memory-mib": (None, "MIB"),
    "--fuse-classifier-update": (False, None),
    "--checkpoint-activations": (False, None),
    "--compile": (False, None),
    "--channels-last": (False, None),
}


def test_the_published_flags():
    flags = flags_of(Options)
    assert {" ".join(one.names): (one.default, one.metavar or one.choices and "|".join(one.choices))
            for one in flags.values()} == PUBLISHED
    parsed = parse_options(["some/dir"])
    for field, one in flags.items():
        completed = {"data": "some/dir", "scale": 64.0, "lr_milestones": (10.0, 16.0, 21.0), "lr": 0.1, "momentum": 0.9,
                     "weight_decay": 1e-4}
        assert getattr(parsed, field) == completed.get(field, one.default), one.name
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
    assert loss_flags()["momentum_of_norm"].default is None
    assert complete_loss_settings("toy", {}) == {"margin": 0.35, "momentum_of_norm": 0.01}
    assert complete_loss_settings("toy", {"margin": 0.9}) == {"margin": 0.9, "momentum_of_norm": 0.01}
    assert "toy 0.35" in loss_flags()["margin"].default_text


@pytest.mark.parametrize(("loss", "given", "words"), [
    ("toy", {"easy_margin": False}, ["--no-easy-margin", "--loss toy", "--loss arcface"]),
    ("arcface", {"momentum_of_norm": 0.5}, ["--momentum-of-norm 0.5", "--loss arcface", "--loss toy"]),
    ("toy", {"margin": 1.2}, ["--margin 1.2", "up to 1"]),
    ("arcface", {"margin": 1.6}, ["--margin 1.6", "up to 1.5708"]),
])
def test_a_setting_that_the_loss_lacks_or_that_is_out_of_its_range(toy, loss, given, words):
    with pytest.raises(UserError) as raised:
        complete_loss_settings(loss, given)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("argv", [
    ["DATA", "--lr-milestones", "1,2", "-b", "8"],
    ["--lr-milestones", "1,2", "DATA", "-b", "8"],
    ["--multiprocessing-distributed", "--no-easy-margin", "--learning-rate", "0.2", "--weight-decay", "0", "DATA"],
])
def test_the_directory_may_come_before_or_after_the_flags(argv):
    assert parse_options(argv).data == "DATA"


def test_the_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        parse_options(["DATA"]).batch_size = 3


@pytest.mark.parametrize(("flags", "words"), [
    (["--matmul", "ieee", "--precision", "float64"], ["--matmul ieee", "--precision float64", "no effect"]),
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
    (["--skip-missing-pairs"], ["--skip-missing-pairs", "--val-pairs"]),
    (["--val-bin", "lfw.bin", "--evaluate", "--resume", "x", "--imgs-root", "x", "--pair-list", "x"],
     ["--val-bin", "--evaluate"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--lr-milestones", "1,x"], ["--lr-milestones", "1,x"]),
    (["--lr-milestones", "5,3"], ["--lr-milestones 5,3"]),
    (["--lr-milestones", "1,2", "--schedule", "poly"], ["--lr-milestones 1,2", "--schedule poly", "--schedule step"]),
    (["--poly-power", "2"], ["--poly-power 2", "no effect with --schedule step", "--schedule poly"]),
    (["--poly-power", "0", "--schedule", "poly"], ["--poly-power 0", "above 0"]),
    (["--ema", "1"], ["--ema 1", "below 1"]),
    (["--optimizer", "adamw", "--momentum", "0.9"], ["--momentum 0.9", "no effect with --optimizer adamw", "sgd"]),
    (["--no-decay", "norm,prelu"], ["--no-decay norm,prelu", "norm, bias"]),
    (["--clip-grad-norm", "0"], ["--clip-grad-norm 0", "above 0"]),
    (["--clip-centers"], ["--clip-centers", "no effect without --clip-grad-norm"]),
    (["--clip-grad-norm", "5", "--clip-centers", "--fuse-classifier-update", "--enable-model-parallel"],
     ["--clip-centers with --fuse-classifier-update"]),
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
    (["--resume", "x", "--start-epoch", "3"], ["--start-epoch 3", "--resume x"]),
    (["--epochs", "3", "--warmup-epochs", "3.5"], ["--warmup-epochs 3.5", "--epochs 3"]),
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
    (["-e", "--resume", "auto", "--imgs-root", "x", "--pair-list", "x"], ["--evaluate", "--resume PATH"]),
    (["--no-such-flag"], ["--no-such-flag"]),
])
def test_a_wrong_flag_is_named(flags, words):
    with pytest.raises(UserError) as raised:
        parse_options(["DATA", *flags])
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("flags, hint", [
    (["--num_classes", "40"], "did you mean --num-classes instead of --num_classes?"),
    (["--lr_milestones=1,2"], "did you mean --lr-milestones instead of"),
    (["--batch", "8"], "did you mean --batch-size instead of --batch?"),
    (["--enable-model-paralel"], "did you mean --enable-model-parallel instead of"),
    (["--lr-milestones", "10", "16", "21"], "the values of --lr-milestones are one argument, with commas"),
    (["--sync-bn", "True"], "--sync-bn takes no value"),
    (["--no-decay", "norm", "bias"], "the values of --no-decay are one argument, with commas"),
    (["--val-bin", "a.bin", "b.bin"], "the values of --val-bin are one argument, with commas"),
])
def test_a_hint_for_what_is_left_over(flags, hint):
    for argv in (["DATA", *flags], [*flags, "DATA"]):
        with pytest.raises(UserError, match="unrecognized arguments: ") as raised:
            parse_options(argv)
        assert hint in str(raised.value)
    with pytest.raises(UserError, match="--compile takes no value"):
        parse_options(["DATA", "--compile", "7"])
    with pytest.raises(UserError, match="a list such as DIR1,DIR2 is one argument, without blanks"):
        parse_options(["DIR1,", "DIR2"])


def test_changed_flags():
    def options(*flags: str) -> Options:
        return parse_options(["DATA", *flags])

    saved = dataclasses.asdict(options("--lr", "0.2", "--sync-bn", "--max-steps", "3", "--margin", "0.4", "-j", "7"))
    assert describe_changes(saved, options("--lr", "0.2", "--sync-bn", "--margin", "0.4", "--output", "x")) == ""
    assert describe_changes(saved, options("--lr-milestones", "1,2", "--margin", "0.4")) == (
        "--lr 0.1 (was 0.2), --lr-milestones 1,2 (was 10,16,21), no --sync-bn (was --sync-bn)")
    assert describe_changes(saved, options("--lr", "0.2", "--sync-bn")) == "--margin 0.5 (was 0.4)"
    assert describe_changes({"lr": 0.2}, options()) == "--lr 0.1 (was 0.2)"
    assert describe_changes({"lr_milestones": (10.0, 16.0, 21.0)}, options("--lr-milestones", "none")) == (
        "--lr-milestones none (was 10,16,21)")
    assert describe_changes({"freeze": ("stem",)}, options()) == "--freeze off (was stem)"
    assert describe_changes({"inter_class_filter": None}, options("--inter-class-filter", "0.4")) == (
        "--inter-class-filter 0.4 (was off)")


def test_the_directory_is_required():
    with pytest.raises(UserError, match="DIR is missing"):
        parse_options([])


@pytest.mark.parametrize("flags", [
    ["--resume", ""], ["--resume="], ["--init-from", " "], ["--output", ""], ["--index", ""], ["--pair-list", ""],
    ["--val-bin", ""], ["--dist-url", ""]], ids=" ".join)
def test_an_empty_value_is_an_error(flags):
    """A variable of the shell that is not set must not start a run anew, or write somewhere else."""
    with pytest.raises(UserError, match=flags[0].rstrip("=")):
        parse_options(["data", *flags])
    with pytest.raises(UserError, match="DIR"):
        parse_options([""])
