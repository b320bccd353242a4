"""--init-from and scripts/export.py: what is written by one is read by the other, class centers by identity."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import ROOT, load_script, run
from helpers.training import train

import main
from models.classifier import initial_centers
from utils.checkpoint.initial import check_initial, open_weights, rows_by_name, start_from
from utils.checkpoint.weights import load_backbone
from utils.checkpoint.writer import CheckpointWriter
from utils.dist.context import DistContext
from utils.dist.sharding import ClassShard
from utils.errors import UserError
from utils.options import parse_options

NAMES = [f"person {number}" for number in range(11)]
SHARDED = ["--enable-model-parallel"]
export = load_script("export")


def build(rank: int, world_size: int, num_classes: int, seed: int, identities: list[str], flags: list[str]):
    """The state of a mobilefacenet run that has not begun."""
    options = parse_options(["unused", "-a", "mobilefacenet", "--num-classes", str(num_classes), "--batch-size", "12", *flags])
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    state, _ = main.build_training(context, options, seed, 48, 12, identities)
    return state, options, context


def save(rank: int, world_size: int, output: str, num_classes: int, identities: list[str], flags: list[str]) -> None:
    """A checkpoint of seed 1, of which class c's center is its initial one."""
    state, options, context = build(rank, world_size, num_classes, 1, identities, ["--output", output, *flags])
    os.makedirs(output, exist_ok=True)
    writer = CheckpointWriter(options, context, lambda text: None, fresh=True)
    writer.save(state)
    writer.close()


def start(rank: int, world_size: int, path: str, num_classes: int, identities: list[str], flags: list[str]) -> tuple:
    """What a run of seed 2 starts with: the line it says, this rank's centers, the backbone."""
    state, options, _ = build(rank, world_size, num_classes, 2, identities, flags)
    said = start_from(path, options.training_arch, state.backbone, state.classifier, identities)
    backbone = {name: tensor.numpy().copy() for name, tensor in state.backbone.state_dict().items()}
    return said, state.classifier.weight.detach().numpy().copy(), backbone


@pytest.fixture(scope="module")
def checkpoint(pools, tmp_path_factory) -> Path:
    """11 classes with names, written by two ranks: 6 and 5."""
    output = tmp_path_factory.mktemp("checkpoint")
    pools(2).run(save, str(output), 11, NAMES, SHARDED)
    return output / "checkpoint.pth.tar"


@pytest.fixture(scope="module")
def torchshard_file(checkpoint) -> Path:
    return export_to(checkpoint, "torchshard", checkpoint.parent / "torchshard.pth.tar")


@pytest.fixture(scope="module")
def safetensors_file(checkpoint) -> Path:
    pytest.importorskip("safetensors")
    return export_to(checkpoint, "safetensors", checkpoint.parent / "all.safetensors", "--centers")


def export_to(source: Path, format: str, output: Path, *flags: str) -> Path:
    before = sys.argv
    sys.argv = ["export.py", "--resume", str(source), "--format", format, "--output", str(output), *flags]
    try:
        export.main()
    finally:
        sys.argv = before
    assert not [path for path in output.parent.iterdir() if path.name.endswith(".part") or path.name.startswith(".centers")]
    return output


def centers(num_classes: int, seed: int) -> np.ndarray:
    return initial_centers(ClassShard(num_classes, 0, 1), 512, seed).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# --init-from

# The run's identities, its number of classes, and for each class its row in the file (-1: the initial one of seed 2).
CHANGED = [f"person {number}" for number in (10, 3, 4, 5)] + ["new a", "person 0", "new b"]
IDENTITIES = {
    "the same": (NAMES, 11, list(range(11))),
    "others": (CHANGED, 7, [10, 3, 4, 5, -1, 0, -1]),
    "others, classes to spare": (CHANGED, 11, [10, 3, 4, 5, -1, 0, -1, -1, -1, -1, -1]),
    "another order": (NAMES[::-1], 11, list(range(11))[::-1]),
    "none in common": (["x", "y", "z"], 3, [-1, -1, -1]),
}


def assert_starts_with(outcomes: list[tuple], expected: np.ndarray, sharded: bool, source: Path) -> None:
    true = load_backbone(str(source))[0].state_dict()
    for rank, (said, mine, backbone) in enumerate(outcomes):
        shard = ClassShard(len(expected), rank, len(outcomes)) if sharded else ClassShard(len(expected), 0, 1)
        np.testing.assert_array_equal(mine, expected[shard.start:shard.stop])
        assert said == outcomes[0][0] and said.startswith(f"starting from {source}: backbone")
        for name, tensor in true.items():
            np.testing.assert_array_equal(backbone[name], tensor.numpy())


@pytest.mark.parametrize("identities", IDENTITIES)
@pytest.mark.parametrize(("world_size", "flags"), [(1, []), (1, SHARDED), (2, []), (2, SHARDED), (3, SHARDED)])
def test_centers_go_by_identity(pools, checkpoint, identities, world_size, flags):
    names, num_classes, rows = IDENTITIES[identities]
    rows = np.array(rows)
    expected = np.where(rows[:, None] >= 0, centers(11, 1)[rows], centers(num_classes, 2))
    outcomes = pools(world_size).run(start, str(checkpoint), num_classes, names, flags)
    assert_starts_with(outcomes, expected, bool(flags), checkpoint)
    kept = np.count_nonzero(rows >= 0)
    if identities != "the same":
        assert f"{kept} kept, {len(names) - kept} new, {11 - kept} dropped" in outcomes[0][0]
    else:
        assert "all 11 class centers" in outcomes[0][0]


@pytest.mark.parametrize("file", ["torchshard_file", "safetensors_file"])
def test_exported_files_are_sources(pools, file, request):
    path = request.getfixturevalue(file)
    names, num_classes, rows = IDENTITIES["others"]
    rows = np.array(rows)
    expected = np.where(rows[:, None] >= 0, centers(11, 1)[rows], centers(num_classes, 2))
    assert_starts_with(pools(3).run(start, str(path), num_classes, names, SHARDED), expected, True, path)


def test_a_file_without_names(pools, torchshard_file, tmp_path):
    """As torchshard writes it: the classes are taken if there are as many, whatever the identities are called."""
    contents = torch.load(torchshard_file, weights_only=True)
    del contents["identities"]
    path = tmp_path / "published.pth.tar"
    torch.save({**contents, "optimizer": {"state": {}}}, path)
    assert_starts_with(pools(2).run(start, str(path), 11, CHANGED, SHARDED), centers(11, 1), True, path)
    outcomes = pools(2).run(start, str(path), 7, CHANGED, SHARDED)
    assert_starts_with(outcomes, centers(7, 2), True, path)
    assert "its 11 class centers have no names and this run has 7 classes: these start anew" in outcomes[0][0]


def test_a_backbone_alone(pools, checkpoint, tmp_path):
    path = export_to(checkpoint, "insightface", tmp_path / "backbone.pth")
    outcomes = pools(2).run(start, str(path), 11, NAMES, [])
    assert_starts_with(outcomes, centers(11, 2), False, path)
    assert "it has no class centers" in outcomes[0][0]


def test_checkpoints_of_any_shape_are_read(pools, tmp_path):
    """Shards that are empty (two classes on three ranks) and a classifier that every rank had a copy of, in float64."""
    for world_size, flags, num_classes in ((3, SHARDED, 2), (2, [], 11), (1, ["--precision", "float64"], 11)):
        output = tmp_path / str(world_size)
        pools(world_size).run(save, str(output), num_classes, NAMES[:num_classes], flags)
        stored = open_weights(str(output / "checkpoint.pth.tar")).centers
        assert stored.num_classes == num_classes and stored.identities == NAMES[:num_classes]
        np.testing.assert_array_equal(torch.cat([rows for _, rows in stored.blocks()]).float().numpy(), centers(num_classes, 1))


def start_and_train(rank: int, world_size: int, argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the loop with the real backbone: `train` puts a tiny one in its place
        patch.setattr("helpers.training.TinyBackbone", lambda batch_norm: main_build_backbone("mobilefacenet"))
        train(rank, world_size, argv)


def main_build_backbone(arch: str):
    from models import build_backbone

    return build_backbone(arch)


def test_a_run_starts_from_another_run(pools, faces, tmp_path):
    """Through main.py's own loop: the weights are those of the file, everything else is as at the start of a run."""
    flags = [str(faces), "-a", "mobilefacenet", "-b", "4", "--num-classes", "9", "--max-steps", "1", "-j", "0", "--seed", "4", *SHARDED]
    pools(2).run(start_and_train, [*flags, "--output", str(tmp_path / "first")])
    first = torch.load(tmp_path / "first" / "checkpoint.pth.tar", weights_only=True)
    assert first["identities"] == sorted(path.name for path in (faces / "train").iterdir())
    pools(2).run(start_and_train, [*flags, "--lr", "0", "--init-from", str(tmp_path / "first" / "checkpoint.pth.tar"),
                                   "--output", str(tmp_path / "second")])
    second = torch.load(tmp_path / "second" / "checkpoint.pth.tar", weights_only=True)
    assert second["position"]["step"] == 1
    for name, tensor in first["state_dict"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, second["state_dict"][name]), name
    before, after = (torch.cat([rows for _, rows in open_weights(str(tmp_path / name / "checkpoint.pth.tar")).centers.blocks()])
                     for name in ("first", "second"))
    assert torch.equal(before, after)
    # A job that is requeued: the same command goes on from its own checkpoint, whatever became of the other one.
    again = [*flags, "--lr", "0", "--init-from", str(tmp_path / "gone"), "--output", str(tmp_path / "second"), "--resume", "auto"]
    pools(2).run(start_and_train, [*again, "--max-steps", "2"])
    assert torch.load(tmp_path / "second" / "checkpoint.pth.tar", weights_only=True)["position"]["step"] == 2


@pytest.mark.parametrize(("flags", "words"), [
    (["--init-from", "a", "--resume", "b"], "--init-from a with --resume b"),
    (["--init-from", "a", "--evaluate", "--resume", ""], "--evaluate"),
])
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(UserError, match=words):
        parse_options(["unused", *flags])


def test_files_that_cannot_be_a_start(checkpoint, torchshard_file, tmp_path):
    for path, arch, words in (
        (tmp_path / "missing", "mobilefacenet", "no such file"),
        (tmp_path / "missing.safetensors", "mobilefacenet", "no such file"),
        (checkpoint, "iresnet18", "holds mobilefacenet"),
    ):
        with pytest.raises(UserError, match=f"--init-from {path}.*{words}"):
            check_initial(str(path), arch, 512)
    with pytest.raises(UserError, match="has embeddings of 512 numbers, a run has 256"):
        check_initial(str(checkpoint), "mobilefacenet", 256)
    text = tmp_path / "text.safetensors"
    text.write_text("not a safetensors file")
    with pytest.raises(UserError, match="is not a safetensors file"):
        check_initial(str(text), "mobilefacenet", 512)
    contents = torch.load(torchshard_file, weights_only=True)
    for damage, words in (
        ({"identities": NAMES * 2}, "list of identities"),
        ({"state_dict": {**contents["state_dict"], "module.arcface_linear.weight": torch.zeros(11, 5)}}, "not a matrix of class centers"),
    ):
        torch.save({**contents, **damage}, tmp_path / "damaged.pth.tar")
        with pytest.raises(UserError, match=words):
            check_initial(str(tmp_path / "damaged.pth.tar"), "mobilefacenet", 512)


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("damage", ["truncated", "missing", "not an archive", "code"])
def test_class_centers_that_are_damaged(checkpoint, tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "step"
    shutil.copytree(checkpoint.resolve().parent, step)
    shard = sorted(step.glob("shards/*.distcp"))[1]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "not an archive":
        shard.write_bytes(bytes(shard.stat().st_size))
    else:
        metadata = step / "shards" / ".metadata"
        forged = pickle.dumps(Code())
        metadata.write_bytes(forged + bytes(metadata.stat().st_size - len(forged)))  # a pickle ends before its file does
    with pytest.raises(UserError, match=f"--init-from {step}.*class centers are.*damaged.*{'code' if damage == 'code' else ''}"):
        check_initial(str(step / "state.pth.tar"), "mobilefacenet", 512)
    assert not (tmp_path / "executed").exists()


def test_rows_by_name():
    generator = np.random.default_rng(0)
    names, wanted = (np.char.mod("%d", generator.permutation(3000)[:2000]).tolist() for _ in range(2))
    expected = [names.index(name) if name in names else -1 for name in wanted]
    assert rows_by_name(names, wanted).tolist() == expected and -1 in expected
    assert rows_by_name([], wanted).tolist() == [-1] * 2000 and rows_by_name(names, []).tolist() == []


# ---------------------------------------------------------------------------------------------------------------------
# scripts/export.py


def test_torchshard_file(checkpoint, torchshard_file):
    contents = torch.load(torchshard_file, weights_only=True)
    assert contents["epoch"] == 0 and contents["arch"] == "mobilefacenet" and contents["identities"] == NAMES
    entries = contents["state_dict"]
    assert all(name.startswith("module.") for name in entries)
    np.testing.assert_array_equal(entries["module.arcface_linear.weight"].numpy(), centers(11, 1))
    backbone, _ = load_backbone(str(checkpoint))
    assert {f"module.{name}" for name in backbone.state_dict()} == entries.keys() - {"module.arcface_linear.weight"}
    assert_same_backbone(torchshard_file, checkpoint)


def test_insightface_and_safetensors_files(checkpoint, safetensors_file, tmp_path):
    path = export_to(checkpoint, "insightface", tmp_path / "backbone.pth")
    assert torch.load(path, weights_only=True).keys() == load_backbone(str(checkpoint))[0].state_dict().keys()
    for path in (path, export_to(checkpoint, "safetensors", tmp_path / "backbone.safetensors"), safetensors_file):
        assert_same_backbone(path, checkpoint)
    from safetensors import safe_open

    with safe_open(safetensors_file, framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("arcface_linear.weight"), centers(11, 1))
        assert file.metadata()["arch"] == "mobilefacenet"
    with safe_open(tmp_path / "backbone.safetensors", framework="np") as file:
        assert "arcface_linear.weight" not in file.keys()


def assert_same_backbone(path: Path, source: Path) -> None:
    mine, true = (load_backbone(str(file)) for file in (path, source))
    assert mine[1] == true[1]
    for name, tensor in true[0].state_dict().items():
        assert torch.equal(mine[0].state_dict()[name], tensor), name


def test_onnx_file(checkpoint, tmp_path, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = export_to(checkpoint, "onnx", tmp_path / "backbone.onnx")
    assert "onnxruntime agrees with PyTorch" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (network_input,), (output,) = session.get_inputs(), session.get_outputs()
    assert (network_input.name, network_input.shape[1:], output.name) == ("input", [3, 112, 112], "embedding")
    assert isinstance(network_input.shape[0], str)
    assert str(ROOT).encode() not in path.read_bytes()  # nothing of where it was made
    backbone, _ = load_backbone(str(checkpoint))
    images = torch.rand(7, 3, 112, 112)
    with torch.inference_mode():
        np.testing.assert_allclose(session.run(None, {"input": images.numpy()})[0], backbone(images).numpy(), atol=1e-3)
    # Another network than the one asked for does not get the name.
    written = path.read_bytes()
    with torch.no_grad():
        next(backbone.parameters()).mul_(1.5)
    monkeypatch.setattr(export, "export_onnx", lambda _, temporary: Path(temporary).write_bytes(written))
    monkeypatch.setattr(export, "open_weights", lambda *_: export.StoredWeights("", backbone, "mobilefacenet", 0, None))
    with pytest.raises(UserError, match="onnxruntime's embeddings differ from PyTorch's"):
        export_to(checkpoint, "onnx", tmp_path / "wrong.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["backbone.onnx"]


def data_bytes() -> int:
    """What counts against RLIMIT_DATA: memory of the process's own, not files that are mapped into it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


def test_no_process_holds_the_classifier(pools, tmp_path):
    """A classifier of 117 MiB is exported, and a third of it read, by a process that may take 48 MiB more than it has."""
    num_classes = 60_000
    pools(2).run(save, str(tmp_path), num_classes, [], SHARDED)
    checkpoint = tmp_path / "checkpoint.pth.tar"
    export_to(checkpoint, "insightface", tmp_path / "warm-up.pth")  # what is imported and allocated once
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    shard = ClassShard(num_classes, 1, 3)
    mine = torch.zeros(shard.size, 512)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + 48 * 2**20, limits[1]))
    try:
        with pytest.raises((RuntimeError, MemoryError)):  # the limit is one
            torch.zeros(num_classes, 512)
        export_to(checkpoint, "torchshard", tmp_path / "exported.pth.tar")
        open_weights(str(checkpoint)).centers.copy_rows(np.arange(shard.start, shard.stop), mine)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    expected = torch.from_numpy(centers(num_classes, 1))
    assert torch.equal(mine, expected[shard.start:shard.stop])
    exported = torch.load(tmp_path / "exported.pth.tar", weights_only=True, mmap=True)
    assert torch.equal(exported["state_dict"]["module.arcface_linear.weight"], expected)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--format", "onnx", "--output", "x.onnx"], "--resume is missing"),
    (["--resume", "x", "--output", "x.onnx"], "--format is missing"),
    (["--resume", "x", "--format", "onnx"], "--output is missing"),
    (["--resume", "x", "--format", "onnx", "--output", "x.pth"], "ends in .onnx"),
    (["--resume", "x", "--format", "safetensors", "--output", "x.pth"], "ends in .safetensors"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "--centers"], "--centers with --format onnx"),
    (["--resume", "x", "--format", "onnx", "--output", "x.onnx", "-a", "vgg"], "--arch vgg is unknown"),
    (["--resume", "x", "--format", "tflite", "--output", "x"], "invalid choice"),
])
def test_mistakes_on_the_command_line(arguments, words):
    with pytest.raises(UserError, match=words):
        export.parse_options(arguments)


def test_what_cannot_be_exported(checkpoint, tmp_path, monkeypatch):
    backbone = export_to(checkpoint, "insightface", tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="has no class centers, which --format torchshard writes"):
        export_to(backbone, "torchshard", tmp_path / "x")
    with pytest.raises(UserError, match="there is no directory"):
        export_to(backbone, "torchshard", tmp_path / "nowhere" / "x")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(UserError, match="the package onnxruntime is missing.*pip install -r scripts/requirements.txt"):
        export_to(backbone, "onnx", tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="the package safetensors is missing"):
        open_weights(str(tmp_path / "x.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.pth"]


def test_export_as_a_program(checkpoint, tmp_path):
    output = run("scripts/export.py", "--resume", checkpoint, "--format", "torchshard", "--output", tmp_path / "x.pth.tar")
    assert "mobilefacenet of" in output and "backbone and 11 class centers" in output
