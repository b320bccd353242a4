"""main.py's `train` in the pooled processes: whole runs, from images on disk to metrics.jsonl and checkpoints.

With a tiny backbone: PyTorch's float64 convolutions on a CPU are a hundred times slower than what is tested here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.commands import read_metrics
from helpers.saved import assert_same_training
from helpers.tiny import TinyBackbone
from helpers.training import MODES, RESUME, losses, train
from torch._dynamo.testing import CompileCounter

import main
from data.augment import prepare_batch
from data.folder import FaceFolder
from models.sync_batchnorm import convert_sync_batchnorm
from utils.checkpoint.reader import Checkpoint, _require_same_identities
from utils.dist.context import DistContext
from utils.dist.ddp import fix_gradient_buckets
from utils.dist.stop import Dropped
from utils.errors import UserError
from utils.options import parse_options
from utils.training.metrics import TrainingLog
from utils.training.optim import Optimizers
from utils.training.state import TrainState

TRACE = ["-b", "12", "--num-classes", "11", "--max-steps", "20", "--precision", "float64", "--sync-bn",
         "--seed", "3", "--no-save", "-j", "0", "-p", "7", "--lr", "0.05", "--epochs", "9"]


@pytest.fixture(scope="module")
def one_process_trace(pools, faces, tmp_path_factory) -> list[float]:
    output = tmp_path_factory.mktemp("trace")
    pools(1).run(train, [str(faces), *TRACE, "--output", str(output)])
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_loss_traces_agree(pools, faces, tmp_path, one_process_trace, mode, world_size):
    if (mode, world_size) == ("base", 1):
        pytest.skip("is the trace that the others are compared with")
    pools(world_size).run(train, [str(faces), *TRACE, *MODES[mode], "--output", str(tmp_path)])
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["loss"] for line in lines] == pytest.approx(one_process_trace, rel=1e-6)
    assert len(set(one_process_trace)) == 20
    assert [line["step"] for line in lines if "top1" in line] == [7, 14]
RESUMED = {**MODES, "base, accumulation": ["--accumulation-steps", "2"],
           "sharded, ZeRO, accumulation":
               ["--enable-model-parallel", "--enable-zero-optim", "--accumulation-steps", "2"]}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "world_size"), [
    *((mode, 3) for mode in RESUMED if mode != "sharded, ZeRO, accumulation"),
    ("sharded", 1), ("base", 2), ("sharded", 2),
    ("sharded, ZeRO, accumulation", 2),
])
def test_resume_continues_the_run(pools, faces, tmp_path, mode, world_size):
    """Stopped inside an epoch and resumed, at the same world size: the same losses, weights and momentum to the bit.

    From three ranks on the order in which they add up gradients shows (`fix_gradient_buckets`).
    """
    flags = [str(faces), *RESUME, *RESUMED[mode]]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pools(world_size).run(train, [*flags, "--seed", "5", "--output", str(whole)])
    pools(world_size).run(train, [*flags, "--seed", "5", "--output", str(parts), "--max-steps", "3"])
    with (parts / "metrics.jsonl").open("a") as file:  # steps that the checkpoint does not know, and a torn line
        file.write('{"step": 4, "epoch": 0, "loss": 1.0, "lr": 1.0}\n{"step": 5, "epo')
    # The seed comes from the checkpoint.
    pools(world_size).run(train, [*flags, "--output", str(parts), "--resume", str(parts / "checkpoint.pth.tar")])
    assert_same_training(parts, whole)
    keys = ("step", "epoch", "loss", "lr")
    whole, parts = ([[line[key] for key in keys] for line in read_metrics(output)] for output in (whole, parts))
    assert parts == whole
    assert len(whole) == 8 and whole[3][3] == pytest.approx(0.1) and whole[4][3] == pytest.approx(0.01)


def train_until_signalled(rank: int, world_size: int, argv: list[str], step: int) -> int:
    """The last rank gets SIGTERM in the given step of the run."""
    steps = itertools.count(1)

    def prepare(*args, **options):
        if rank == world_size - 1 and next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare_batch(*args, **options)

    with mock.patch.object(main, "prepare_batch", prepare):
        return train(rank, world_size, argv)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_stops_the_run_inside_an_epoch_and_resume_continues_it(pools, faces, tmp_path, world_size):
    flags = [str(faces), *RESUME, "--enable-model-parallel"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pools(world_size).run(train, [*flags, "--seed", "5", "--output", str(whole), "--no-save"])
    assert pools(world_size).run(
        train_until_signalled, [*flags, "--seed", "5", "--output", str(parts)], 2) == [75] * world_size
    assert len(losses(parts)) == (2 if world_size == 1 else 3)  # the others know it a step later
    assert pools(world_size).run(train, [*flags, "--output", str(parts), "--resume", "auto"]) == [0] * world_size
    assert losses(parts) == losses(whole) and len(losses(whole)) == 8


def test_a_signal_without_a_checkpoint_is_no_reason_to_start_again(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--no-save", "--output", str(tmp_path)]
    assert pools(2).run(train_until_signalled, flags, 3) == [128 + signal.SIGTERM] * 2
    # In the last step it comes too late to stop anything.
    assert pools(2).run(train_until_signalled, [*flags, "--max-steps", "3"], 3) == [0, 0]


def train_with_dropout(rank: int, world_size: int, argv: list[str]) -> list[bool]:
    """`train`, with a backbone that draws random numbers; the first mask."""
    masks = []

    class Dropping(TinyBackbone):
        def forward(self, images):
            embedding = super().forward(images)
            dropped = torch.nn.functional.dropout(embedding, 0.5, self.training)
            masks.append((dropped == 0)[0].tolist())
            return dropped

    with mock.patch("helpers.training.TinyBackbone", Dropping):
        train(rank, world_size, argv)
    return masks[0]


def test_random_numbers_depend_on_the_step_and_the_rank_alone(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--seed", "5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pools(2).run(train_with_dropout, [*flags, "--output", str(whole), "--max-steps", "3"])
    first, second = pools(2).run(train_with_dropout, [*flags, "--output", str(parts), "--max-steps", "2"])
    assert first != second
    pools(2).run(train_with_dropout, [*flags, "--output", str(parts), "--max-steps", "3", "--resume", "auto"])
    assert_same_training(parts, whole)


@pytest.mark.slow
def test_resume_at_another_world_size_and_mode(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--sync-bn", "--precision", "float64"]
    whole = tmp_path / "whole"
    pools(3).run(train, [*flags, "--enable-model-parallel", "--seed", "5", "--output", str(tmp_path),
                         "--max-steps", "3"])
    pools(1).run(train, [*flags, "--seed", "5", "--output", str(whole), "--no-save"])
    pools(2).run(train, [*flags, "--enable-zero-optim", "--output", str(tmp_path), "--resume",
                         str(tmp_path / "checkpoint.pth.tar"), "--max-steps", "6"])
    first = torch.load(tmp_path / "checkpoint.pth.tar")["mean_face"]
    pools(1).run(train, [*flags, "--output", str(tmp_path), "--resume", str(tmp_path / "checkpoint.pth.tar")])
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-6)
    assert torch.equal(torch.load(tmp_path / "checkpoint.pth.tar")["mean_face"], first)


def train_with_other_flags(rank: int, world_size: int, argv: list[str], on_rank_1: list[str]) -> str:
    try:
        train(rank, world_size, argv + (on_rank_1 if rank == 1 else []))
    except UserError as error:
        return str(error)
    return ""


def test_different_flags_on_two_nodes_are_an_error(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--output", str(tmp_path)]
    first, second = pools(2).run(train_with_other_flags, flags, ["--lr", "0.3"])
    assert first == second and "--lr is 0.3 on rank 1 and 0.1 on rank 0" in first


class OneMoreBefore(FaceFolder):
    """As if somebody had added a person whose name sorts first: every label means somebody else."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.identities = ["0", *self.identities]


class OneMoreBehind(FaceFolder):
    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.identities = [*self.identities, "zebra"]


def resume_with_identities(rank: int, world_size: int, argv: list[str], folder: str) -> str:
    with mock.patch("helpers.training.open_training_set", lambda data, **_: globals()[folder](data)):
        return train_with_other_flags(rank, world_size, argv, [])


def test_a_resumed_run_keeps_the_meaning_of_its_labels(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--enable-model-parallel", "--output", str(tmp_path)]
    pools(2).run(train, [*flags, "--max-steps", "1"])
    resume = [*flags, "--max-steps", "2", "--resume", "auto"]
    for error in pools(2).run(resume_with_identities, resume, "OneMoreBefore"):
        assert "was trained with 000000 as class 0, which is 0 in this training set" in error and "--init-from" in error
    assert pools(2).run(resume_with_identities, resume, "OneMoreBehind") == ["", ""]


def test_a_renamed_image_starts_the_epoch_again(pools, faces, tmp_path):
    """As an added one does: its position in the order of the epoch has changed."""
    data = tmp_path / "faces"
    shutil.copytree(faces / "train", data)
    flags = [str(data), *RESUME, "--output", str(tmp_path)]

    def position_after(steps: int) -> tuple[int, int]:
        pools(2).run(train, [*flags, "--max-steps", str(steps), "--resume", "auto"])
        position = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["position"]
        return position["step"], position["step_in_epoch"]

    assert position_after(1) == (1, 1)
    (data / "an empty directory").mkdir()  # changes nothing
    assert position_after(2) == (2, 2)
    image = next(data.glob("*/*.jpg"))
    image.rename(image.with_name("z.jpg"))
    assert position_after(3) == (3, 1)


def test_which_images_a_checkpoint_was_counted_in():
    def same(saved: dict, images: str, num_images: int = 8) -> bool:
        state = mock.Mock(images=images, num_images=num_images)
        return TrainState.has_same_images(state, {"num_images": 8, "global_batch": 4, **saved})

    assert same({"images": "FaceFolder:1"}, "FaceFolder:1") and not same({"images": "FaceFolder:1"}, "FaceFolder:2")
    assert same({"images": "FaceFolder:1"}, "RecordIODataset:2")  # the same images, packed
    assert same({}, "FaceFolder:1") and same({"images": ""}, "FaceFolder:1")  # of an older version
    assert not same({"images": "FaceFolder:1"}, "FaceFolder:1", 9) and not same({}, "FaceFolder:1", 9)


@pytest.mark.parametrize("stored, given, accepted", [
    ("abc", "abd", False), ("abc", "ab", True), ("012", "abc", True), ("abc", "012", True), ("ab", "10", False)])
def test_a_package_may_get_names(stored, given, accepted):
    """Of train.lst, which older versions did not read: label numbers are no names, and tell nothing about people."""
    checkpoint = Checkpoint("path", "directory", {"identities": list(stored)}, {})
    with contextlib.nullcontext() if accepted else pytest.raises(UserError, match="was trained with"):
        _require_same_identities(checkpoint, list(given))


def test_auto_goes_on_from_a_checkpoint_that_lies_elsewhere(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--seed", "5"]
    pools(1).run(train, [*flags, "--max-steps", "1", "--output", str(tmp_path / "first")])
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "checkpoint.pth.tar").symlink_to(tmp_path / "first" / "checkpoint.pth.tar")
    pools(1).run(train, [*flags, "--max-steps", "2", "--output", str(tmp_path / "second"), "--resume", "auto"])
    assert [line["step"] for line in read_metrics(tmp_path / "second")] == [2]


def lay_out_buckets_as_on_a_gpu(rank: int, world_size: int) -> bool:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    model.device_ids = [0]  # what DistributedDataParallel then does with its inputs needs no GPU
    fix_gradient_buckets(model)
    return all(parameter.grad is None for parameter in model.parameters()) and model(torch.ones(1, 3)).shape == (1, 2)


def test_buckets_are_laid_out_with_device_ids(pools):
    assert pools(2).run(lay_out_buckets_as_on_a_gpu) == [True, True]


def momentum_in_another_layout(rank: int, world_size: int) -> float:
    """The largest difference between a step with momentum loaded in another layout, and the true one."""
    options = parse_options(["x", "--on-nonfinite", "skip", "--enable-zero-optim"][: 3 + world_size % 2])
    generator = torch.Generator().manual_seed(0)
    weight, momentum, gradient = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    model = torch.nn.Conv2d(3, 2, 4, bias=False)
    model.weight.data.copy_(weight)
    settings = dict(lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    optimizers = Optimizers(model, "sgd", settings, zero=options.enable_zero_optim,
                            skippable=options.on_nonfinite == "skip")
    optimizers.load_state({"weight": {"momentum_buffer": momentum.to(memory_format=torch.channels_last)}})
    model.weight.grad = gradient.clone()
    for optimizer in optimizers.all:
        optimizer.step()
    true = weight - options.lr * (options.momentum * momentum + gradient + options.weight_decay * weight)
    return float((model.weight.detach() - true).abs().max())


def test_momentum_is_laid_out_as_its_parameter(pools):
    for world_size in (1, 2):
        assert max(pools(world_size).run(momentum_in_another_layout)) < 1e-6


class OtherName(FaceFolder):
    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.identities = [name + "x" * (label == 3) for label, name in enumerate(self.identities)]


class OtherLabel(FaceFolder):
    @property
    def labels(self) -> np.ndarray:
        labels = super().labels
        labels[6] = 0  # an image of identity 1 lies with identity 0
        return labels


def train_on_other_data(rank: int, world_size: int, argv: list[str], change: str) -> str:
    folder = {"name": OtherName, "label": OtherLabel}[change] if rank == 1 else FaceFolder
    with mock.patch("helpers.training.open_training_set", lambda data, **_: folder(data)):
        return train_with_other_flags(rank, world_size, argv, [])


@pytest.mark.parametrize("change", ["name", "label"])
def test_different_data_on_two_nodes_are_an_error(pools, faces, tmp_path, change):
    first, second = pools(2).run(train_on_other_data, [str(faces), *RESUME, "--output", str(tmp_path)], change)
    assert first == second and first.startswith("training data (hash of identity names and labels) is ")


def test_a_fresh_start_at_a_later_epoch_begins_a_new_metrics_file(pools, faces, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    pools(1).run(train, [str(faces), *RESUME, "--start-epoch", "1", "--output", str(tmp_path), "--no-save"])
    assert (tmp_path / "previous-run.1" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [line["step"] for line in read_metrics(tmp_path)] == [5, 6, 7, 8]


def sync_batch_norm_in_half(rank: int, world_size: int) -> float:
    torch.manual_seed(0)
    images = 300 * torch.randn(8, 4, 5, 5)
    synced = convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(4)))
    with torch.autocast("cpu", torch.float16):
        out = synced(images.half().chunk(world_size)[rank])
    assert out.dtype == torch.float16 and synced[0].running_var.isfinite().all()
    expected = torch.nn.BatchNorm2d(4)(images).chunk(world_size)[rank]
    return float((out.float() - expected).abs().max())


def test_synchronised_batch_norm_does_not_overflow_in_half(pools):
    assert max(pools(2).run(sync_batch_norm_in_half)) < 0.01


def sync_batch_norm_without_gain(rank: int, world_size: int) -> float:
    torch.manual_seed(0)
    values = torch.randn(6, 4)
    (synced,) = convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(4, affine=False)))
    out = synced(values.chunk(world_size)[rank])
    plain = torch.nn.BatchNorm1d(4, affine=False)
    expected = plain(values).chunk(world_size)[rank]
    assert list(synced.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(synced.running_var, plain.running_var)
    return float((out - expected).abs().max())


def test_synchronised_batch_norm_without_gain_and_bias(pools):
    """As the last one of ir50 and its siblings."""
    assert max(pools(2).run(sync_batch_norm_without_gain)) < 1e-5


def test_damaged_lines_of_metrics_are_dropped(tmp_path):
    """Also bytes that are no text, as a disk that lost a block leaves them."""
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n\xff\xfe\n{"step": "x"}\n[]\n7\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"step": 3}\n{"ste')
    log = TrainingLog(DistContext(0, 1, 1, torch.device("cpu")), str(tmp_path), fresh=False, step=2, total_steps=9,
                      epochs=1, global_batch=8, print_freq=10)
    log.add_evaluation(step=2, epoch=0, metrics={"caf\udce9": {"accuracy": 0.5}})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 2]
    assert read_metrics(tmp_path)[-1]["val"] == {"caf\udce9": {"accuracy": 0.5}}


@pytest.mark.parametrize("what", ["directory", "dangling link"])
def test_something_else_in_the_place_of_metrics_is_moved(tmp_path, what):
    path = tmp_path / "metrics.jsonl"
    path.mkdir() if what == "directory" else path.symlink_to("nowhere")
    TrainingLog(DistContext(0, 1, 1, torch.device("cpu")), str(tmp_path), fresh=False, step=2, total_steps=9, epochs=1,
                global_batch=8, print_freq=10).close()
    assert path.is_file() and not path.is_symlink() and os.path.lexists(tmp_path / "metrics.jsonl.1")
    assert not (tmp_path / "nowhere").exists()


def test_an_evaluation_compiles_nothing():
    compiled = CompileCounter()
    network = torch.nn.Linear(2, 3)
    network.compile(backend=compiled)

    def evaluate(backbone, stop):
        backbone.eval()(torch.ones(5, 2))
        backbone.train()
        raise Dropped("", signal.SIGTERM)

    run = mock.Mock(options=parse_options(["DATA", "--compile"]))
    run.state.backbone, run.state.ema, run.evaluator.run = network, None, evaluate
    network(torch.ones(4, 2))
    assert main.evaluate_backbone(run) == signal.SIGTERM
    network(torch.ones(4, 2))
    assert compiled.frame_count == 1
