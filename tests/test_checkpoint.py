"""Checkpoints: complete at every instant, read at any world size and in any mode, refused with a cause when damaged."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import format2
from helpers.commands import read_metrics, run
from helpers.saved import assert_same_training, saved_training
from helpers.tiny import TinyBackbone
from helpers.training import MODES, losses, train
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import main
from utils import build
from utils.checkpoint import layout, shards, writer
from utils.checkpoint.layout import DamagedCheckpoint, check_files, checksum, newest_first, read_manifest
from utils.checkpoint.reader import Resume, find_checkpoint, load_checkpoint, read_resumable
from utils.checkpoint.safe_load import NotEnoughMemory, read_torch_file
from utils.checkpoint.writer import CheckpointWriter
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.files import flush
from utils.options import parse_options
from utils.training.optim import OPTIMIZERS, Optimizers

SHORT = ["-b", "12", "-j", "0", "--epochs", "2", "--lr-milestones", "1"]
SHARDED = ["--enable-model-parallel"]
ELEVEN = ["--num-classes", "11", "-a", "mobilefacenet"]


def train_in_small_blocks(rank: int, world_size: int, argv: list[str]) -> None:
    """`train`, with shards that are written in several blocks even of few classes."""
    with mock.patch.object(shards, "BLOCK_CLASSES", 2):
        train(rank, world_size, argv)


def train_with_forms(rank: int, world_size: int, faces: str, output: str, forms: list[str], mode: str) -> None:
    """A run of two steps with each form of the classifier in turn, which resumes the one before."""
    for number, form in enumerate(forms):
        start = ["--resume", "auto"] if number else ["--seed", "3"]
        train(rank, world_size, [faces, *MATRIX, *MODES[mode], *start, "--classifier", form, "--output", output,
                                 "--max-steps", str(2 * number + 2)])


def refusal(rank: int, world_size: int, argv: list[str]) -> str:
    """The error of `train`, if any."""
    try:
        train(rank, world_size, argv)
    except UserError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Other world sizes and modes. 9 classes: 9; 5, 4; 3, 3, 3; 3, 3, 3, 0

MATRIX = ["-b", "12", "-j", "0", "--num-classes", "9", "--precision", "float64", "--sync-bn", "--lr", "0.05",
          "--epochs", "9"]
SAVED_IN = {1: "base", 2: "base, ZeRO", 3: "sharded, ZeRO", 4: "sharded"}


@pytest.fixture(scope="module")
def uninterrupted(pools, faces, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    pools(1).run(train, [str(faces), *MATRIX, "--seed", "3", "--max-steps", "6", "--output", str(output)])
    return output


@pytest.fixture(scope="module")
def saved_at(pools, faces, tmp_path_factory):
    """`saved_at(W)`: the directory of a run that W processes have left in the middle of an epoch."""
    outputs: dict[int, Path] = {}

    def output_of(world_size: int) -> Path:
        if world_size not in outputs:
            outputs[world_size] = tmp_path_factory.mktemp(f"saved-at-{world_size}")
            flags = [*MATRIX, *MODES[SAVED_IN[world_size]], "--seed", "3", "--max-steps", "2"]
            pools(world_size).run(train_in_small_blocks, [str(faces), *flags, "--output", str(outputs[world_size])])
        return outputs[world_size]
    return output_of


@pytest.mark.parametrize("forms", [["torchshard", "fused", "eager"], ["eager", "torchshard", "fused"]])
def test_resume_with_another_form_of_the_classifier(pools, faces, tmp_path, uninterrupted, forms):
    pools(2).run(train_with_forms, str(faces), str(tmp_path), forms, "sharded")
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=1e-9)
    assert_same_training(tmp_path, uninterrupted, tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_resume_at_another_world_size(pools, faces, tmp_path, uninterrupted, saved_at, before, after):
    mode = list(MODES)[(before + after) % len(MODES)]
    if mode == "sharded, fused update" and after == 1:
        mode = "base"
    resume = ["--resume", str(saved_at(before) / "checkpoint.pth.tar")]
    pools(after).run(train, [str(faces), *MATRIX, *MODES[mode], *resume, "--max-steps", "6", "--output", str(tmp_path)])
    expected = [line["loss"] for line in read_metrics(uninterrupted)]
    assert [line["loss"] for line in read_metrics(saved_at(before))] == pytest.approx(expected[:2], rel=1e-9)
    assert [line["loss"] for line in read_metrics(tmp_path)] == pytest.approx(expected[2:], rel=1e-9)
    assert_same_training(tmp_path, uninterrupted, tolerance=1e-9)


def rows_read(rank: int, world_size: int, argv: list[str]) -> list[int]:
    """How many rows a resume reads at a time."""
    counts, read = [], shards._read

    def watched(*args):
        rows = read(*args)
        counts.append(len(rows))
        return rows

    with mock.patch.object(shards, "_read", watched):
        train(rank, world_size, argv)
    return counts


@pytest.mark.slow
def test_a_reader_holds_one_block_beside_its_own_classes(pools, faces, tmp_path, saved_at):
    flags = [str(faces), *MATRIX, *SHARDED, "--resume", str(saved_at(4) / "checkpoint.pth.tar"), "--max-steps", "2"]
    # 9 classes on 2 ranks: 5 and 4, each with a center and a momentum. Written by 3 ranks in blocks of 2 and 1.
    assert pools(2).run(rows_read, [*flags, "--output", str(tmp_path)]) == [[2, 1, 2] * 2, [1, 2, 1] * 2]


def test_torch_reads_the_shards(saved_at):
    """torch.distributed.checkpoint, in one process and without this program."""
    output = saved_at(4)
    tensors = saved_training(output)
    names = ["centers", "optimizer/classifier.weight/momentum_buffer"]
    loaded = {name: torch.full_like(tensors[name], float("nan")) for name in names}
    dcp.load(loaded, checkpoint_id=(output / "checkpoint.pth.tar").resolve().parent / "shards", no_dist=True)
    for name in names:
        assert tensors[name].shape == (9, 512) and torch.equal(loaded[name], tensors[name])


# ---------------------------------------------------------------------------------------------------------------------
# Formats and losses


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_checkpoint_of_format_2_resumes_with_the_same_losses(pools, tmp_path, world_size):
    """A file that the program wrote when its format was 2. 5 classes: 5; 3, 2; 2, 2, 1, 0."""
    pools(world_size).run(format2.train, ["--seed", "1", "--max-steps", "3", "--output", str(tmp_path / "first")])
    assert [line["loss"] for line in read_metrics(tmp_path / "first")] == pytest.approx(format2.LOSSES[:3], rel=1e-9)
    for resume, output in ((format2.STATE, "second"), (tmp_path / "first/checkpoint.pth.tar", "third")):
        pools(world_size).run(format2.train, ["--resume", str(resume), "--output", str(tmp_path / output)])
        assert [line["loss"] for line in read_metrics(tmp_path / output)] == pytest.approx(format2.LOSSES[3:], rel=1e-9)
    contents = torch.load(tmp_path / "second/checkpoint.pth.tar", weights_only=True)
    assert contents["format_version"] == 3 and "momentum" not in contents
    assert set(contents["optimizer"]["fc.weight"]) == {"momentum_buffer"}
    assert contents["shards"] == ["centers", "optimizer/classifier.weight/momentum_buffer"]
    settings = {"scale": 16.0, "margin": 0.5, "easy_margin": True}
    assert contents["loss"] == {"name": "arcface", "settings": settings, "state": {}}


class Statistics(torch.nn.Module):
    """A margin with a running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))


def save_and_load(rank: int, world_size: int, output: str, resume: str, loss: str) -> float:
    """Save a run with --loss adaface, or resume one. The value of the margin's statistic afterwards."""
    options = parse_options(["unused", "--num-classes", "11", *SHARDED, "--output", output, "-a", "mobilefacenet"])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)):
        state, _ = build.build_training(context, options, 1, 48, 12)
    state = dataclasses.replace(state, loss=loss, loss_settings={"scale": 64.0, "h": 0.333}, margin=Statistics())
    asked = Resume(resume, output, arch="mobilefacenet", num_classes=11, loss=loss)
    if resume:
        load_checkpoint(state, find_checkpoint(asked, [], context))
    else:
        state.margin.mean.fill_(0.25)
        writer = CheckpointWriter(context, output, options={}, say=lambda text: None)
        writer.save(state)
        writer.close()
    return float(state.margin.mean)


@pytest.mark.slow
def test_the_loss_is_saved_with_its_statistics(pools, tmp_path):
    pools(2).run(save_and_load, str(tmp_path), "", "adaface")
    path = tmp_path / "checkpoint.pth.tar"
    loss = torch.load(path, weights_only=True)["loss"]
    assert loss == {"name": "adaface", "settings": {"scale": 64.0, "h": 0.333}, "state": {"mean": torch.tensor(0.25)}}
    assert pools(3).run(save_and_load, str(tmp_path), str(path), "adaface") == [0.25] * 3
    for resume in (str(path), "auto"):
        with pytest.raises(UserError, match="--loss adaface.*--loss arcface.*--init-from"):
            read_resumable(Resume(resume, str(tmp_path), arch="mobilefacenet", num_classes=11))


def step_of_adamw(rank: int, world_size: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Another optimizer's state goes through the same two methods. Steps after loading equal steps without."""
    with mock.patch.dict(OPTIMIZERS, adamw=torch.optim.AdamW):
        weights = []
        for interrupted in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Linear(3, 2)
            optimizers = Optimizers(model, "adamw", {"lr": 0.1}, zero=world_size > 1)
            for step in range(4):
                if step == 2 and interrupted:
                    state = [copy.deepcopy(optimizers.state())]
                    torch.distributed.broadcast_object_list(state, src=0)
                    optimizers = Optimizers(model, "adamw", {"lr": 0.1}, zero=world_size > 1)
                    optimizers.load_state(state[0])
                model(torch.ones(1, 3)).square().sum().backward()
                for optimizer in optimizers.all:
                    optimizer.step()
                optimizers.zero_grad()
            weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
    return {name: {key: tuple(value.shape) for key, value in values.items()} for name, values in state[0].items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_of_another_optimizer(pools, world_size):
    assert pools(world_size).run(step_of_adamw)[0] == {
        "weight": {"step": (), "exp_avg": (2, 3), "exp_avg_sq": (2, 3)},
        "bias": {"step": (), "exp_avg": (2,), "exp_avg_sq": (2,)},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Whole at every instant


class Killed(BaseException):
    pass


def make_step(output: Path, step: int, keep: int = 2, links: tuple[str, ...] = ("checkpoint.pth.tar",)) -> str:
    """A checkpoint of small files; its directory's name."""
    directory = layout.begin(str(output), step)
    files = {}
    for name in ("state.pth.tar", "shards/.metadata", "shards/__0_0.distcp"):
        path = os.path.join(directory, name)
        with open(path, "wb") as file:
            torch.save({"directory": layout.final_name(directory)}, file)
            flush(file)
        files[name] = checksum(path)
    layout.commit(str(output), directory, files, links=links, keep=keep)
    return os.path.basename(layout.final_name(directory))


def names(output: Path) -> list[str]:
    return [os.path.basename(path) for path in newest_first(str(output))]


def referred(output: Path, link: str = "checkpoint.pth.tar") -> str:
    return (output / link).resolve().parent.name


def test_a_kill_at_any_instant_leaves_whole_checkpoints(tmp_path):
    """Every call that changes the disk is once the one before which the process ends."""
    killed_at = 0
    while True:
        output, calls = tmp_path / str(killed_at), 0
        output.mkdir()
        for step in (1, 2):
            make_step(output, step)

        def wrap(function, killed_at=killed_at):
            def killable(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > killed_at:
                    raise Killed
                return function(*args, **kwargs)
            return killable

        changing = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir")
        try:
            with mock.patch.multiple(os, **{name: wrap(getattr(os, name)) for name in changing}):
                make_step(output, 3)
            break
        except Killed:
            pass
        assert referred(output) in ("step-00000002", "step-00000003")
        assert names(output)[0] in ("step-00000002", "step-00000003")
        for directory in newest_first(str(output)):
            check_files(directory, read_manifest(directory))
        make_step(output, 4)
        assert names(output)[0] == referred(output) == "step-00000004" and len(names(output)) == 2
        assert not list(output.glob("*.part")) and not list(output.glob("checkpoints/*.part"))
        killed_at += 1
    assert killed_at >= 15 and names(output) == ["step-00000003", "step-00000002"]


def test_what_is_kept(tmp_path):
    for step in range(1, 6):
        make_step(tmp_path, step, keep=2, links=("checkpoint.pth.tar", "model_best.pth.tar")[:1 + (step == 2)])
    assert names(tmp_path) == ["step-00000005", "step-00000004", "step-00000002"]
    assert referred(tmp_path) == "step-00000005" and referred(tmp_path, "model_best.pth.tar") == "step-00000002"
    # A run that went back to an earlier step: newer than those of later steps, and beside one of its own name.
    assert make_step(tmp_path, 4, keep=1) == "step-00000004.1"
    assert names(tmp_path) == ["step-00000004.1", "step-00000002"]


def test_copies_where_there_are_no_symbolic_links(tmp_path):
    with mock.patch.object(os, "symlink", side_effect=PermissionError(1, "Operation not permitted")):
        for step in range(1, 5):
            make_step(tmp_path, step, keep=1, links=("checkpoint.pth.tar", "model_best.pth.tar")[:1 + (step == 2)])
        assert names(tmp_path) == ["step-00000004", "step-00000002"]
    for link, step in (("checkpoint.pth.tar", 4), ("model_best.pth.tar", 2)):
        path = tmp_path / link
        assert not path.is_symlink()
        contents = torch.load(path, weights_only=True)
        assert layout.step_directory(str(path), contents).endswith(f"step-{step:08d}")


def test_a_fresh_run_moves_an_older_one_aside(pools, faces, tmp_path):
    """Nothing of it is deleted, and it can be resumed where it now is."""
    flags = [str(faces), *SHORT, "--num-classes", "11", "--seed", "1", "--save-freq", "1", "--keep", "1"]
    here, aside = ["--output", str(tmp_path)], tmp_path / "previous-run.1"
    pools(1).run(train, [*flags, *here, "--max-steps", "2"])
    before = saved_training(tmp_path)
    pools(1).run(train, [*flags, *here, "--max-steps", "1"])
    assert names(tmp_path) == ["step-00000001"] and names(aside) == ["step-00000002"]
    assert [len(read_metrics(output)) for output in (tmp_path, aside)] == [1, 2]
    assert len(list((tmp_path / "tensorboard").iterdir())) == len(list((aside / "tensorboard").iterdir())) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved_training(aside).items())
    pools(1).run(train, [*flags, "--output", str(aside), "--resume", "auto", "--max-steps", "3"])
    assert names(aside) == ["step-00000003"] and names(tmp_path) == ["step-00000001"]


def test_a_run_that_resumes_elsewhere_moves_aside_what_it_finds(pools, faces, tmp_path):
    """--resume FIRST/checkpoint.pth.tar --output SECOND: the run that is in SECOND is another one."""
    flags = [str(faces), *SHORT, "--num-classes", "11", "--seed", "1", "--save-freq", "1", "--keep", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    pools(1).run(train, [*flags, "--output", str(first), "--max-steps", "1"])
    pools(1).run(train, [*flags, "--output", str(second), "--max-steps", "3"])
    before = saved_training(second)
    flags += ["--output", str(second)]
    pools(1).run(train, [*flags, "--max-steps", "2", "--resume", str(first / "checkpoint.pth.tar")])
    assert names(second) == ["step-00000002"] and [line["step"] for line in read_metrics(second)] == [2]
    aside = second / "previous-run.1"
    assert names(aside) == ["step-00000003"] and len(read_metrics(aside)) == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved_training(aside).items())
    for number, path in enumerate(("checkpoint.pth.tar", "checkpoints/step-00000003/state.pth.tar"), start=3):
        pools(1).run(train, [*flags, "--max-steps", str(number), "--resume", str(second / path)])
        assert names(second) == [f"step-{number:08d}"] and len(read_metrics(second)) == number - 1
    pools(1).run(train, [*flags, "--max-steps", "4", "--resume", str(aside / "checkpoint.pth.tar")])
    assert names(second) == names(second / "previous-run.2") == ["step-00000004"] and names(aside) == ["step-00000003"]


def test_resume_auto_after_a_fresh_run_that_saved_nothing(tmp_path):
    """Which of the two runs to continue is for the user to say."""
    asked = Resume("auto", str(tmp_path), arch="mobilefacenet", num_classes=11)
    make_step(tmp_path, 7)
    aside = layout.move_older_run_aside(str(tmp_path))
    assert aside == str(tmp_path / "previous-run.1")
    with pytest.raises(UserError, match=f"--resume auto: .*{re.escape(aside)}.* drop --resume"):
        read_resumable(asked)
    (tmp_path / "previous-run.2").mkdir()  # of a run without checkpoints
    assert layout.newest_older_run(str(tmp_path)) == aside
    shutil.rmtree(aside)
    assert read_resumable(asked) is None


def test_what_of_an_older_run_is_moved(tmp_path):
    def tree(directory: Path) -> list[str]:
        return sorted(os.listdir(directory))

    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "metrics.jsonl").touch()  # of a run that ended before its first step
    assert layout.move_older_run_aside(str(tmp_path)) is None
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    make_step(tmp_path, 1, links=("checkpoint.pth.tar", "model_best.pth.tar"))
    layout.move_older_run_aside(str(tmp_path), checkpoints=False)  # a run with --no-save
    assert tree(tmp_path / "previous-run.1") == ["metrics.jsonl"] and names(tmp_path) == ["step-00000001"]
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").symlink_to("elsewhere")
    with pytest.raises(UserError, match="--output .*symbolic link.*; move it away"):
        layout.move_older_run_aside(str(tmp_path))
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    with mock.patch.object(layout, "flush_directory", side_effect=Killed), pytest.raises(Killed):
        layout.move_older_run_aside(str(tmp_path))
    assert names(tmp_path / "previous-run.2") == ["step-00000001"]
    assert tree(tmp_path) == ["previous-run.1", "previous-run.2", "tensorboard"]


def test_a_state_file_in_a_directory_whose_name_is_no_text(tmp_path):
    """torch opens a file that it maps by a name in UTF-8."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.pth.tar")
    with open(path, "wb") as file:
        torch.save({"identities": ["caf\udce9"]}, file)
    assert read_torch_file(path) == {"identities": ["caf\udce9"]}


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is full


def train_with_full_disk(rank: int, world_size: int, argv: list[str], full_on: int, at_step: int) -> str:
    """`train`, while the kernel refuses this rank to write files larger than 4 KiB at one of the saves."""
    save, (_, hard) = CheckpointWriter.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, state, **kwargs):
        self.wait()
        full = rank == full_on and state.position.step == at_step
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if full else hard, hard))
        return save(self, state, **kwargs)

    try:
        with mock.patch.object(CheckpointWriter, "save", limited):
            return refusal(rank, world_size, argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("full_on", [0, 1])
@pytest.mark.parametrize("at_step", [2, 3])
def test_a_full_disk(pools, faces, tmp_path, full_on, at_step):
    flags = [str(faces), *SHORT, *SHARDED, "--num-classes", "11", "--save-freq", "1", "--max-steps", "3",
             "--output", str(tmp_path)]
    errors = pools(2).run(train_with_full_disk, flags, full_on, at_step)
    assert len(read_metrics(tmp_path)) == 3
    assert not list(tmp_path.glob("checkpoints/*.part"))
    if at_step == 2:
        assert errors == ["", ""] and names(tmp_path) == ["step-00000003", "step-00000001"]
    else:
        assert referred(tmp_path) == "step-00000002"
        for error in errors:
            for words in (f"--output {tmp_path}", "File too large", f"rank {full_on}", "step-00000002"):
                assert words in error, error


# ---------------------------------------------------------------------------------------------------------------------
# Beside training


def save_while_training(rank: int, world_size: int, output: str, free_bytes: int) -> tuple[bool, bool]:
    """Save to a disk that blocks until the weights have changed. Returns (a thread wrote, `save` waited for it)."""
    options = parse_options(["unused", "--num-classes", "11", *SHARDED, "--output", output, "-a", "mobilefacenet"])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    with mock.patch.object(build, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)):
        state, model = build.build_training(context, options, 1, 48, 12)
    state.optimizers.load_state(
        {name: {"momentum_buffer": torch.ones_like(value)} for name, value in model.module.named_parameters()})
    for parameter in model.parameters():
        parameter.detach().fill_(1.0)
    changed, begin = threading.Event(), layout.begin

    def slow_begin(*args) -> str:
        changed.wait(timeout=5 if free_bytes else 0)
        return begin(*args)

    with (mock.patch.object(layout, "begin", slow_begin),
          mock.patch.object(writer, "free_host_bytes", lambda: free_bytes)):
        saving = CheckpointWriter(context, output, options={}, say=lambda text: None)
        saving.save(state)
        threaded = saving._thread is not None
        waited = os.path.exists(os.path.join(output, "checkpoint.pth.tar"))
        for parameter in model.parameters():
            parameter.detach().fill_(2.0)
        state.position.step = 5
        changed.set()
        saving.close()
    return threaded, waited


@pytest.mark.parametrize("free_bytes", [2**40, 0])
def test_saves_beside_training_if_memory_allows(pools, tmp_path, free_bytes):
    results = pools(2).run(save_while_training, str(tmp_path), free_bytes)
    assert results == ([(True, False)] * 2 if free_bytes else [(False, True)] * 2)
    assert names(tmp_path) == ["step-00000000"]
    for name, tensor in saved_training(tmp_path).items():
        if not name.startswith("weight bn") and not name.startswith("weight features"):
            assert (tensor == 1).all(), name


class OnTheGpu(TorchDispatchMode):
    """Fake tensors stand for a GPU's: pinned memory is plain, a copy from the GPU is noted and copies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.empty_like.default and kwargs.get("pin_memory"):
            self.events.append("pin")
            return torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype)
        if func is torch.ops.aten.copy_.default and args[1].is_cuda:
            self.events.append("copy without waiting" if args[2:] == (True,) or kwargs.get("non_blocking") else "copy")
            return args[0]
        assert func is not torch.ops.aten._to_copy.default or not args[0].is_cuda, "a copy to pageable memory"
        return func(*args, **kwargs)


def test_what_is_on_a_gpu_is_copied_into_pinned_memory_that_is_used_again(monkeypatch):
    """The copies are issued on the stream of training, which is waited for before `copy` returns."""
    gpu = OnTheGpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(
        synchronize=lambda: gpu.events.append(f"wait for {device}")))
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight, channels_last = torch.empty(5, 3, device="cuda"), torch.empty(2, 3, 4, 4, device="cuda")
        channels_last = channels_last.to(memory_format=torch.channels_last)
        other = torch.empty(6, 3, device="cuda")
    step = torch.ones(2)
    parts = {"shards": {"weight": weight}, "state": {"a": {"weight": channels_last}, "step": step, "names": ["x"] * 3}}
    staging = writer.Staging()
    assert staging.missing_bytes(parts) == 64 + 512 + 8  # of 60, 384 and 8 bytes
    buffers = []
    with gpu:
        for _ in range(2):
            gpu.events.clear()
            pinned = staging.pin(parts)
            copied = staging.copy(parts)
            assert pinned and gpu.events[-3:] == ["copy without waiting"] * 2 + ["wait for cuda:0"]
            buffers.append((copied["shards"]["weight"], copied["state"]["a"]["weight"]))
            assert staging.missing_bytes(parts) == 8
    assert gpu.events == ["copy without waiting"] * 2 + ["wait for cuda:0"]
    assert all(first is second for first, second in zip(*buffers))
    assert buffers[0][1].is_contiguous(memory_format=torch.channels_last)
    assert copied["state"]["step"] is not step and copied["state"]["names"] is parts["state"]["names"]
    assert staging.missing_bytes({"shards": {"weight": other}}) == 128  # another shape needs another buffer

    monkeypatch.setattr(torch, "empty_like", mock.Mock(side_effect=RuntimeError("CUDA error: out of memory")))
    assert not staging.pin({"shards": {"weight": other}})
    assert staging.missing_bytes({"shards": {"weight": weight}}) == 64  # nothing stays pinned


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not what was saved


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def manifest_follows(directory: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed: a checkpoint that somebody has forged."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = checksum(str(directory / name))
    (directory / "manifest.json").write_text(json.dumps(manifest))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_state(directory: Path, **entries) -> None:
    path = directory / "state.pth.tar"
    torch.save({**torch.load(path, weights_only=True), **entries}, path)
    manifest_follows(directory, "state.pth.tar")


def forge(directory: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a file's beginning; the rest, and its size, stay if it is longer."""
    path = directory / name
    path.write_bytes(data + path.read_bytes()[len(data):])
    manifest_follows(directory, name)


def forge_metadata(directory: Path, change) -> None:
    path = directory / "shards/.metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    manifest_follows(directory, "shards/.metadata")


def leave_a_hole(metadata) -> None:
    metadata.state_dict_metadata["centers"].chunks.pop()


def refer_outside(metadata) -> None:
    for stored in metadata.storage_data.values():
        stored.relative_path = "../state.pth.tar"


SHARD, METADATA = "shards/__1_0.distcp", "shards/.metadata"
# What happens to the step's directory d (code that runs would create p), and a pattern of the error.
DAMAGES = {
    "state truncated": (lambda d, _: cut(d / "state.pth.tar"), "checkpoint.pth.tar: .*truncated"),
    "state empty": (lambda d, _: (d / "state.pth.tar").write_bytes(b""), "checkpoint.pth.tar: .*not a checkpoint"),
    "state garbage": (
        lambda d, _: (d / "state.pth.tar").write_bytes(b"garbage" * 99), "checkpoint.pth.tar: .*not a checkpoint"),
    "state with a bit flipped": (lambda d, _: flip_a_bit(d / "state.pth.tar"), "state.pth.tar: is damaged.*checksum"),
    "state that is code": (
        lambda d, p: (d / "state.pth.tar").write_bytes(pickle.dumps(Malicious(p), 2)), "checkpoint.pth.tar: .*code"),
    "state with code in it": (
        lambda d, p: torch.save({"position": Malicious(p), "shards": 1}, d / "state.pth.tar"),
        "checkpoint.pth.tar: .*code"),
    "state of weights alone": (
        lambda d, _: torch.save({"fc.weight": torch.ones(1)}, d / "state.pth.tar"), "no training state.*--init-from"),
    "state of another version": (lambda d, _: change_state(d, format_version=1), "format version 1"),
    "state with another entry": (lambda d, _: change_state(d, loss={}), "not the state of a training run"),
    "state of other layers": (
        lambda d, _: change_state(d, state_dict={"a": torch.ones(1)}), "does not hold mobilefacenet"),
    "shard missing": (lambda d, _: (d / SHARD).unlink(), "__1_0.distcp.*No such file"),
    "shard truncated": (lambda d, _: cut(d / SHARD), "__1_0.distcp.*damaged"),
    "shard with a bit flipped": (lambda d, _: flip_a_bit(d / SHARD), "__1_0.distcp.*damaged.*checksum"),
    "shard that is code": (
        lambda d, p: forge(d, SHARD, pickle.dumps(Malicious(p), 2).ljust((d / SHARD).stat().st_size)),
        "__1_0.distcp.*damaged"),
    "metadata missing": (lambda d, _: (d / METADATA).unlink(), ".metadata.*No such file"),
    "metadata garbage": (lambda d, _: forge(d, METADATA, b"garbage"), ".metadata.*damaged"),
    "metadata that is code": (lambda d, p: forge(d, METADATA, pickle.dumps(Malicious(p))), ".metadata.*holds code"),
    "metadata with a hole": (lambda d, _: forge_metadata(d, leave_a_hole), ".metadata.*does not describe"),
    "metadata that leads outside": (lambda d, _: forge_metadata(d, refer_outside), ".metadata.*does not describe"),
    "manifest missing": (lambda d, _: (d / "manifest.json").unlink(), "manifest.json.*No such file"),
    "manifest garbage": (lambda d, _: (d / "manifest.json").write_text("{"), "manifest.json.*damaged"),
    "manifest foreign": (
        lambda d, _: (d / "manifest.json").write_text('{"files": {"a": 1}}'), "manifest.json.*not the manifest"),
}


@pytest.fixture(scope="module")
def sound(pools, faces, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sound")
    pools(2).run(train, [str(faces), *SHORT, *SHARDED, *ELEVEN, "--seed", "1", "--save-freq", "1", "--max-steps", "2",
                         "--output", str(output)])
    return output


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_foreign_and_malicious_files(pools, faces, tmp_path, sound, damage):
    output, mark = tmp_path / "run", tmp_path / "code was run"
    shutil.copytree(sound, output, symlinks=True)
    do, words = DAMAGES[damage]
    do(output / "checkpoints/step-00000002", mark)
    flags = [str(faces), *SHORT, *SHARDED, *ELEVEN, "--output", str(output), "--max-steps", "3"]
    before = sorted(output.rglob("*"))
    errors = pools(2).run(refusal, [*flags, "--resume", str(output / "checkpoint.pth.tar")])
    for error in errors:
        assert re.search(f"^--resume .*{words}.*$", error), error
    assert not mark.exists() and sorted(output.rglob("*")) == before


@pytest.mark.parametrize(("flags", "words"), [
    (["--num-classes", "12"], "--num-classes 11"),
    (["-a", "iresnet18"], "--arch mobilefacenet"),
    (["--seed", "2"], "--seed 1"),
])
@pytest.mark.parametrize("how", ["checkpoint.pth.tar", "auto"])
def test_a_whole_checkpoint_of_another_run(faces, sound, flags, words, how):
    resume = how if how == "auto" else str(sound / how)
    given = parse_options([str(faces), *SHORT, *ELEVEN, *flags, "--output", str(sound), "--resume", resume])
    with pytest.raises(UserError, match=words):
        read_resumable(main.resume_request(given))


def test_a_copy_elsewhere_cannot_be_resumed(faces, sound, tmp_path):
    path = shutil.copy(sound / "checkpoint.pth.tar", tmp_path / "copy.pth.tar")
    given = parse_options([str(faces), *SHORT, "--num-classes", "11", "-a", "mobilefacenet", "--resume", str(path)])
    with pytest.raises(UserError, match="copy of a state file without its class centers"):
        read_resumable(main.resume_request(given))


# ---------------------------------------------------------------------------------------------------------------------
# --resume auto


def test_auto_goes_back_to_the_last_whole_checkpoint(pools, faces, tmp_path):
    flags = [str(faces), *SHORT, *SHARDED, "--num-classes", "11", "--seed", "1", "--resume", "auto", "--save-freq", "1",
             "--keep", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pools(2).run(train, [*flags, "--output", str(whole)])
    pools(2).run(train, [*flags, "--output", str(parts), "--max-steps", "5"])
    step = parts / "checkpoints/step-00000005"
    flip_a_bit(step / "shards/__0_0.distcp")
    (parts / "checkpoints/step-00000006.part/shards").mkdir(parents=True)  # of a save that was interrupted
    pools(2).run(train, [*flags, "--output", str(parts)])
    assert_same_training(parts, whole)
    assert (parts / "checkpoints/step-00000005.damaged").is_dir() and not list(parts.glob("checkpoints/*.part"))
    assert [line["loss"] for line in read_metrics(parts)] == [line["loss"] for line in read_metrics(whole)]
    for directory, manifest in zip(newest_first(str(parts)), ("{}", "[]", '{"files": {}, "saved_at": "?"}')):
        (Path(directory) / "manifest.json").write_text(manifest)
    errors = pools(2).run(refusal, [*flags, "--output", str(parts)])
    assert all("--resume auto" in error and "damaged" in error and str(parts) in error for error in errors)


def test_auto_in_an_output_of_the_old_format(tmp_path):
    torch.save({"format_version": 1, "position": {}, "shards": {}}, tmp_path / "checkpoint.pth.tar")
    with pytest.raises(UserError, match="format version 1"):
        read_resumable(Resume("auto", str(tmp_path), arch="mobilefacenet", num_classes=11))


@pytest.mark.parametrize("content", [
    {"fc.weight": torch.ones(1)}, {"format_version": 2, "position": {}, "shards": {}, "options": 3},
    {"format_version": torch.ones(2), "position": {}, "shards": {}},
    {"format_version": 3, "position": {}, "shards": {}, "arch": torch.ones(2), "num_classes": 11, "seed": 1,
     "loss": {"name": "arcface"}},
])
def test_auto_takes_another_file_in_the_place_of_the_state_for_damage(sound, tmp_path, content):
    shutil.copytree(sound / "checkpoints", tmp_path / "checkpoints")
    torch.save(content, tmp_path / "checkpoints/step-00000002/state.pth.tar")
    resume = Resume("auto", str(tmp_path), arch="mobilefacenet", num_classes=11)
    assert read_resumable(resume).directory == str(tmp_path / "checkpoints/step-00000001")


def test_auto_does_not_take_a_lack_of_memory_for_damage(sound, tmp_path):
    shutil.copytree(sound / "checkpoints", tmp_path / "checkpoints")
    resume = Resume("auto", str(tmp_path), arch="mobilefacenet", num_classes=11)
    words = "cannot be read: there is not enough memory"
    with mock.patch("torch.load", side_effect=MemoryError), pytest.raises(UserError, match=f"state.pth.tar: {words}"):
        read_resumable(resume)
    with (mock.patch.object(shards, "load_tensor", side_effect=MemoryError),
          pytest.raises(NotEnoughMemory, match=f"distcp: {words}")):
        saved_training(sound)


def test_what_is_not_a_checkpoint_is_for_init_from(sound, tmp_path):
    torch.save({"args": Malicious("")}, tmp_path / "backbone.pth")
    torch.save({"fc.weight": torch.ones(1)}, tmp_path / "weights.pth")
    for path in (tmp_path / "backbone.pth", tmp_path / "weights.pth"):
        with pytest.raises(UserError, match=f"--init-from {path}"):
            read_resumable(Resume(str(path), "", arch="mobilefacenet", num_classes=11))
    with pytest.raises(UserError, match=f"give the file in it, {sound}/checkpoint.pth.tar$"):
        read_resumable(Resume(str(sound), "", arch="mobilefacenet", num_classes=11))


def test_manifest_errors_are_of_their_own_kind(sound, tmp_path):
    """--resume auto tries the next checkpoint for these, and for nothing else."""
    shutil.copytree(sound / "checkpoints", tmp_path / "checkpoints")
    cut(tmp_path / "checkpoints/step-00000002" / SHARD)
    with pytest.raises(DamagedCheckpoint):
        read_manifest(str(tmp_path / "checkpoints/step-00000002"))


# ---------------------------------------------------------------------------------------------------------------------
# Killed runs, eight processes: scripts/kill_test.sh does the first with main.py itself


@pytest.mark.slow
def test_killed_runs_and_eight_processes(faces, tmp_path):
    """SIGKILL to whole runs, most of them inside a save: at last the weights of the run that nobody killed, to the bit.

    In the same program: what four processes saved is continued by eight, two of them without any class.
    """
    result = json.loads(run("tests/helpers/forked.py", faces, tmp_path, 5, OMP_NUM_THREADS="1").splitlines()[-1])
    for name in ("", "sampled "):  # all classes; sampled ones, and a loss with statistics
        assert result[name]["kills"] >= 2 and result[name]["inside a save"] >= 1, result
