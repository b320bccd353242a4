"""--init-from: class centers by identity, from checkpoints and from the files of other programs."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exported import NAMES, SHARDED, backbone_of, centers, export_to, make_checkpoint, save, start
from helpers.images import make_folder
from helpers.saved import saved_training
from helpers.training import train

from models import build_backbone
from utils.checkpoint.init_from import check_init_from, rows_by_name
from utils.checkpoint.weights import open_weights
from utils.dist.sharding import ClassShard
from utils.errors import UserError
from utils.options import parse_options


@pytest.fixture(scope="module")
def checkpoint(pools, tmp_path_factory) -> Path:
    return make_checkpoint(pools, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def torchshard_file(checkpoint) -> Path:
    return export_to(checkpoint, "torchshard", checkpoint.parent / "torchshard.pth.tar")


@pytest.fixture(scope="module")
def safetensors_file(checkpoint) -> Path:
    pytest.importorskip("safetensors")
    return export_to(checkpoint, "safetensors", checkpoint.parent / "all.safetensors", "--centers")


# The run's identities, its number of classes, and for each class its row in the file (-1: the initial one of seed 2).
CHANGED = [f"person {number}" for number in (10, 3, 4, 5)] + ["new a", "person 0", "new b"]
IDENTITIES = {
    "the same": (NAMES, 11, list(range(11))),
    "others": (CHANGED, 7, [10, 3, 4, 5, -1, 0, -1]),
    "others, classes to spare": (CHANGED, 11, [10, 3, 4, 5, -1, 0, -1, -1, -1, -1, -1]),
    "new ones beside them": ([*NAMES, "2/person 0", "new a"], 13, [*range(11), -1, -1]),
    "another order": (NAMES[::-1], 11, list(range(11))[::-1]),
    "none in common": (["x", "y", "z"], 3, [-1, -1, -1]),
}


def assert_starts_with(outcomes: list[tuple], expected: np.ndarray, sharded: bool, source: Path) -> None:
    true = backbone_of(source)
    for rank, (said, mine, backbone) in enumerate(outcomes):
        shard = ClassShard(len(expected), rank, len(outcomes)) if sharded else ClassShard(len(expected), 0, 1)
        np.testing.assert_array_equal(mine, expected[shard.start:shard.stop])
        assert said == outcomes[0][0] and said.startswith(f"starting from {source}: backbone")
        for name, tensor in true.items():
            np.testing.assert_array_equal(backbone[name], tensor.numpy())


@pytest.mark.slow
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
        assert f"{kept} kept, {len(names) - kept} new with initial values, {11 - kept} dropped" in outcomes[0][0]
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
    assert "11 class centers have no names and this run has 7 classes" in outcomes[0][0]


def test_a_backbone_alone(pools, checkpoint, tmp_path):
    path = export_to(checkpoint, "insightface", tmp_path / "backbone.pth")
    outcomes = pools(2).run(start, str(path), 11, NAMES, [])
    assert_starts_with(outcomes, centers(11, 2), False, path)
    assert "no class centers" in outcomes[0][0]


def test_checkpoints_of_any_shape_are_read(pools, tmp_path):
    """Shards that are empty (two classes on three ranks) and a classifier that every rank had a copy of, in float64."""
    for world_size, flags, num_classes in ((3, SHARDED, 2), (2, [], 11), (1, ["--precision", "float64"], 11)):
        output = tmp_path / str(world_size)
        pools(world_size).run(save, str(output), num_classes, NAMES[:num_classes], flags)
        weights = open_weights(str(output / "checkpoint.pth.tar"), with_centers=True)
        assert weights.centers.shape == (num_classes, 512) and weights.identities == NAMES[:num_classes]
        rows = torch.cat([rows for _, rows in weights.centers.blocks()])
        np.testing.assert_array_equal(rows.float().numpy(), centers(num_classes, 1))


def start_and_train(rank: int, world_size: int, argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the loop with the real backbone: `train` puts a tiny one in its place
        patch.setattr("helpers.training.TinyBackbone", lambda batch_norm: build_backbone("mobilefacenet"))
        train(rank, world_size, argv)


@pytest.mark.slow
def test_a_run_starts_from_another_run(pools, faces, tmp_path):
    """Through main.py's own loop: the weights are those of the file, everything else is as at the start of a run."""
    flags = [str(faces), "-a", "mobilefacenet", "-b", "4", "--num-classes", "9", "--max-steps", "1", "-j", "0",
             "--seed", "4", *SHARDED]
    pools(2).run(start_and_train, [*flags, "--output", str(tmp_path / "first")])
    first = torch.load(tmp_path / "first" / "checkpoint.pth.tar", weights_only=True)
    assert first["identities"] == sorted(path.name for path in (faces / "train").iterdir() if path.is_dir())
    pools(2).run(start_and_train, [*flags, "--lr", "0", "--init-from", str(tmp_path / "first" / "checkpoint.pth.tar"),
                                   "--output", str(tmp_path / "second")])
    second = torch.load(tmp_path / "second" / "checkpoint.pth.tar", weights_only=True)
    assert second["position"]["step"] == 1
    for name, tensor in first["state_dict"].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(tensor, second["state_dict"][name]), name
    before, after = (saved_training(tmp_path / name)["centers"] for name in ("first", "second"))
    assert torch.equal(before, after)
    # New identities beside the old ones, in a second training set, with parts of the backbone frozen.
    make_folder(tmp_path / "more", {"new a": 2, "new b": 2})
    pools(2).run(start_and_train, [
        f"{faces},{tmp_path}/more", *flags[1:], "--num-classes", "10", "--lr", "0", "--freeze", "stem,bottlenecks",
        "--init-from", str(tmp_path / "first" / "checkpoint.pth.tar"), "--output", str(tmp_path / "tuned")])
    tuned = torch.load(tmp_path / "tuned" / "checkpoint.pth.tar", weights_only=True)
    assert tuned["identities"] == [*first["identities"], "new a", "new b"]
    assert torch.equal(saved_training(tmp_path / "tuned")["centers"][:8], before[:8])
    for name, tensor in first["state_dict"].items():
        if name.endswith("running_mean"):
            assert torch.equal(tensor, tuned["state_dict"][name]) == name.startswith(("stem", "bottlenecks")), name
    # A requeued job runs the same command and resumes its own checkpoint, even if the other one is gone.
    again = [*flags, "--lr", "0", "--init-from", str(tmp_path / "gone"), "--output", str(tmp_path / "second"),
             "--resume", "auto"]
    pools(2).run(start_and_train, [*again, "--max-steps", "2"])
    assert torch.load(tmp_path / "second" / "checkpoint.pth.tar", weights_only=True)["position"]["step"] == 2


@pytest.mark.parametrize(("flags", "words"), [
    (["--init-from", "a", "--resume", "b"], "--init-from a with --resume b"),
    (["--init-from", "a", "--evaluate"], "--evaluate"),
])
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(UserError, match=words):
        parse_options(["unused", *flags])


def test_files_that_cannot_be_a_start(checkpoint, torchshard_file, tmp_path):
    for path, arch, words in (
        (tmp_path / "missing", "mobilefacenet", "[Nn]o such file"),
        (tmp_path / "missing.safetensors", "mobilefacenet", "[Nn]o such file"),
        (checkpoint, "iresnet18", "holds mobilefacenet"),
    ):
        with pytest.raises(UserError, match=f"--init-from {path}.*{words}"):
            check_init_from(str(path), arch, 512)
    with pytest.raises(UserError, match="embedding size 512.*256"):
        check_init_from(str(checkpoint), "mobilefacenet", 256)
    text = tmp_path / "text.safetensors"
    text.write_text("not a safetensors file")
    with pytest.raises(UserError, match="is not a safetensors file"):
        check_init_from(str(text), "mobilefacenet", 512)
    contents = torch.load(torchshard_file, weights_only=True)
    entries = {**contents["state_dict"], "module.arcface_linear.weight": torch.zeros(11, 5)}
    torch.save({**contents, "state_dict": entries}, tmp_path / "damaged.pth.tar")
    with pytest.raises(UserError, match="not a matrix of class centers"):
        check_init_from(str(tmp_path / "damaged.pth.tar"), "mobilefacenet", 512)


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("damage", ["truncated", "missing", "code"])
def test_class_centers_that_are_damaged(checkpoint, tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "step"
    shutil.copytree(checkpoint.resolve().parent, step)
    shard = sorted(step.glob("shards/*.distcp"))[1]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    else:
        metadata = step / "shards" / ".metadata"
        forged = pickle.dumps(Code())
        metadata.write_bytes(forged.ljust(metadata.stat().st_size))  # A pickle may end before its file does.
    cause = "code" if damage == "code" else ""
    with pytest.raises(UserError, match=f"--init-from {step}.*class centers are.*damaged.*{cause}"):
        check_init_from(str(step / "state.pth.tar"), "mobilefacenet", 512)
    assert not (tmp_path / "executed").exists()


def start_with_damage(rank: int, world_size: int, path: str) -> str:
    try:
        start(rank, world_size, path, 11, NAMES, SHARDED)
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_know_of_class_centers_that_one_cannot_read(pools, checkpoint, tmp_path):
    step = tmp_path / "step"
    shutil.copytree(checkpoint.resolve().parent, step)
    shard = step / "shards/__1_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    for error in pools(2).run(start_with_damage, str(step / "state.pth.tar")):
        assert error.startswith(f"--init-from {step}/state.pth.tar: {shard}: is damaged"), error


def test_rows_by_name():
    generator = np.random.default_rng(0)
    names, wanted = (np.char.mod("%d", generator.permutation(3000)[:2000]).tolist() for _ in range(2))
    expected = [names.index(name) if name in names else -1 for name in wanted]
    assert rows_by_name(names, wanted).tolist() == expected and -1 in expected
    assert rows_by_name([], wanted).tolist() == [-1] * 2000 and rows_by_name(names, []).tolist() == []
