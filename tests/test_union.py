"""Several training sets as one: labels, names, order, bad images, and a run over them."""

from __future__ import annotations

import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers.images import make_folder, smooth_image
from helpers.packages import JPEGS, insightface, write
from helpers.training import train

import main
from data.formats import open_training_set
from data.loader import GlobalBatchSampler, build_train_loader
from data.union import UnionSet
from utils.errors import UserError, exit_on_user_error
from utils.evaluation.mean_face import sample_mean_face
from utils.options import parse_options
from utils.preflight import count_classes, open_dataset


def opened(*paths: object, **options) -> UnionSet:
    return open_training_set(",".join(map(str, paths)), **{"index": "none", "skip_bad": False, "progress": False,
                                                           **options})


@pytest.fixture
def sets(tmp_path):
    """Two folders with ann in both, a package with names and one without."""
    make_folder(tmp_path / "one", {"ann": 2, "bob": 1})
    make_folder(tmp_path / "two", {"zoe": 1, "ann": 3})
    write(tmp_path / "named", insightface([0, 0, 1], JPEGS[:3]))
    (tmp_path / "named" / "train.identities.txt").write_text("bob\ncid\n")
    write(tmp_path / "numbers", insightface([0, 1, 1], JPEGS[3:6]))
    return tmp_path


def test_separate_identities_follow_one_another(sets):
    dataset = opened(sets / "one", sets / "two", sets / "named", sets / "numbers")
    assert dataset.identities == ["ann", "bob", "2/ann", "zoe", "3/bob", "cid", "4/0", "4/1"]
    assert dataset.labels.tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 7] and dataset.labels.dtype == np.int64
    assert len(dataset) == 13 and [label for _, label in dataset] == dataset.labels.tolist()
    data, name = dataset.encoded(12)
    assert data == JPEGS[5] and str(sets / "numbers") in name
    assert dataset.encoded(3)[1] == f"{sets}/two/ann/000.jpg"
    assert dataset[9][0].shape == (3, 112, 112)
    with pytest.raises(IndexError):
        dataset[13]
    assert dataset.describe() == (
        f"13 of 8 identities, separate: 3 of 2 identities in {sets}/one; 4 of 2 identities in {sets}/two; "
        f"3 of 2 identities in {sets}/named/train.rec; 3 of 2 identities in {sets}/numbers/train.rec")


def test_shared_identities_are_one_class_by_name(sets):
    dataset = opened(sets / "one", sets / "two", sets / "named", identities="shared")
    assert dataset.identities == ["ann", "bob", "zoe", "cid"]
    assert dataset.labels.tolist() == [0, 0, 1, 0, 0, 0, 2, 1, 1, 3]
    assert [label for _, label in dataset] == dataset.labels.tolist()
    with pytest.raises(UserError, match=f"--identities shared: {sets}/numbers/train.rec has no names"):
        opened(sets / "one", sets / "numbers", identities="shared")


def test_names_stay_unique_whatever_the_sets_call_them(sets):
    write(sets / "odd", insightface([0, 1, 2], JPEGS[:3]))
    (sets / "odd" / "train.identities.txt").write_text("2/ann\nx\ny\n")
    assert opened(sets / "odd", sets / "two").identities == ["2/ann", "x", "y", "ann", "zoe"]
    assert opened(sets / "one", sets / "two", sets / "odd").identities[4:] == ["3/2/ann", "x", "y"]


def test_the_fingerprint_tells_sets_order_and_labels_apart(sets):
    paths = [sets / "one", sets / "two", sets / "named"]
    prints = [opened(*paths).fingerprint(), opened(*paths[::-1]).fingerprint(), opened(*paths[:2]).fingerprint(),
              opened(*paths, identities="shared").fingerprint()]
    (sets / "one" / "bob" / "000.jpg").rename(sets / "one" / "bob" / "001.jpg")
    prints.append(opened(*paths).fingerprint())
    assert len(set(prints)) == 5 and prints[-1] == opened(*paths).fingerprint()
    assert prints[0].startswith("UnionSet(FaceFolder,FaceFolder,RecordIODataset):")


def test_bad_images_are_an_error_of_their_set_or_dropped(sets, capsys):
    (sets / "two" / "ann" / "001.jpg").write_bytes(b"damaged")
    (sets / "one" / "bob" / "000.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{sets}/one/bob/000.jpg: .*1 of 3 images is bad; --skip-bad-images"):
        opened(sets / "one", sets / "two")
    dataset = opened(sets / "one", sets / "two", skip_bad=True, progress=True)
    assert dataset.skip_bad and len(dataset) == 5 and dataset.identities == ["ann", "bob", "2/ann", "zoe"]
    assert dataset.labels.tolist() == [0, 0, 2, 2, 3] == [label for _, label in dataset]
    assert dataset.encoded(3)[1] == f"{sets}/two/ann/002.jpg"
    assert capsys.readouterr().err.count("is bad and skipped") == 2
    assert dataset.fingerprint() != opened(sets / "one", sets / "named", skip_bad=True).fingerprint()


def test_each_set_has_its_own_index(sets):
    opened(sets / "one", sets / "two", index="auto")
    assert (sets / "one" / ".image-index").exists() and (sets / "two" / ".image-index").exists()
    dataset = opened(sets / "one", sets / "two", index=f"{sets}/a,{sets}/b")
    assert (sets / "a").exists() and (sets / "b").exists()
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.labels.tolist() == dataset.labels.tolist() and copy[6][1] == dataset[6][1]
    assert copy.fingerprint() == dataset.fingerprint()
    with pytest.raises(UserError, match="--index one-file: for 2 training sets, give auto, none, or 2 files"):
        opened(sets / "one", sets / "two", index="one-file")


def test_paths_with_commas_and_mistakes(sets):
    make_folder(sets / "x,y", {"eve": 1, "fay": 1})
    assert opened(sets / "x,y").identities == ["eve", "fay"]
    for paths, words in (
        ([sets / "one", "missing"], "missing: no such directory"),
        ([sets / "one", ""], "names no training set before or after a comma"),
        ([sets / "one", f"{sets}/two/../one"], "is given twice"),
    ):
        with pytest.raises(UserError, match=words):
            opened(*paths)
    with pytest.raises(UserError, match="--identities shared: .*one is one training set; give several"):
        opened(sets / "one", identities="shared")


def test_batches_and_the_mean_face_cover_all_sets(sets):
    dataset = opened(sets / "one", sets / "numbers")
    sampler = GlobalBatchSampler(len(dataset), 3, 1, 0, 1, 5)
    sampler.set_position(0, 0)
    seen = [(int(label), image) for batch in build_train_loader(dataset, sampler, workers=1, pin_memory=False)
            for image, label in zip(batch.images, batch.labels)]
    assert sorted(label for label, _ in seen) == sorted(dataset.labels.tolist())
    expected = {label: [] for label in range(4)}
    for image, label in dataset:
        expected[label].append(image)
    assert all(any(torch.equal(image, one) for one in expected[label]) for label, image in seen)
    assert torch.equal(sample_mean_face(dataset), sample_mean_face(list(dataset)))


def test_the_table_of_a_run(sets, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "main.py", f"{sets}/one,{sets}/two", "--identities", "shared", "--num-classes", "auto", "-b", "2", "--plan",
        "-a", "mobilefacenet", "--index", "none", "-j", "0", "--device", "cpu"])
    exit_on_user_error(main.main)
    table = capsys.readouterr().out
    assert "classifier     3 classes, " in table
    assert f"7 of 3 identities, shared: 3 of 2 identities in {sets}/one; 4 of 2 identities in {sets}/two" in table
    options = parse_options([f"{sets}/one,{sets}/two", "--num-classes", "2", "-b", "2", "--index", "none"])
    plan = type("Plan", (), {"nodes": 1})
    with pytest.raises(UserError, match=f"--num-classes 2: give at least 4, the identities of {sets}/one, {sets}/two"):
        open_dataset(options, plan)
    options = parse_options([f"{sets}/one,{sets}/two", "--num-classes", "auto", "-b", "2", "--index", "none"])
    assert count_classes(options, open_dataset(options, plan)).num_classes == 4


def test_a_run_over_several_sets_is_resumed(pools, faces, tmp_path):
    """In the middle of an epoch; another order of the sets would give the class centers to other people."""
    for k in range(6):
        for name in ("new a", "new b"):
            (tmp_path / "more" / name).mkdir(parents=True, exist_ok=True)
            smooth_image(k).save(tmp_path / "more" / name / f"{k}.jpg")
    argv = ["-b", "12", "--num-classes", "11", "-j", "0", "--seed", "4", "--enable-model-parallel", "--epochs", "2"]
    both, output = f"{faces},{tmp_path}/more", tmp_path / "run"
    pools(2).run(train, [both, *argv, "--output", str(output), "--max-steps", "3"])
    first = torch.load(output / "checkpoint.pth.tar", weights_only=True)
    assert first["identities"][-2:] == ["new a", "new b"] and len(first["identities"]) == 10
    shutil.copytree(output, tmp_path / "copy", symlinks=True)
    pools(2).run(train, [both, *argv, "--output", str(output), "--max-steps", "7", "--resume", "auto"])
    pools(2).run(train, [both, *argv, "--output", str(tmp_path / "whole"), "--max-steps", "7"])
    resumed, whole = (torch.load(path / "checkpoint.pth.tar", weights_only=True)
                      for path in (output, tmp_path / "whole"))
    assert resumed["position"] == whole["position"] and resumed["sampler"] == whole["sampler"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    with pytest.raises(Exception, match="was trained with .* as class 0, which is new a in this training set"):
        pools(2).run(train, [f"{tmp_path}/more,{faces}", *argv, "--output", str(tmp_path / "copy"), "--max-steps", "7",
                             "--resume", "auto"])
