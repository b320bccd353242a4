"""Which format opens a path, and what training data of all formats have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import encode, make_folder, smooth_image
from helpers.packages import JPEGS, im2rec, insightface, write

from data.folder import FaceFolder
from data.formats import FORMATS, open_training_set
from data.recordio import RecordIODataset
from data.training_set import TrainingSet
from utils.errors import UserError


def opened(path: Path, **options) -> TrainingSet:
    return open_training_set(str(path), **{"index": "none", "skip_bad": False, "progress": False, **options})


def test_the_format_follows_from_the_path(tmp_path):
    write(tmp_path / "package", insightface())
    make_folder(tmp_path / "folder", {"a": 1, "b": 2})
    for path in ("package", "package/train.rec"):
        assert isinstance(opened(tmp_path / path), RecordIODataset)
    assert isinstance(opened(tmp_path / "folder"), FaceFolder)
    assert list(FORMATS) == ["recordio", "folder"]


@pytest.mark.parametrize("path, cause", [
    ("nowhere", "nowhere: no such directory"),
    ("nowhere.rec", "nowhere.rec: no such file"),
    ("folder/a/000.jpg", "000.jpg: is a file that is no .rec file; give a .rec file, or a directory"),
    ("other", "other: holds faces.rec, but no train.rec; give .*other/faces.rec"),
    ("flat", "flat: has no sub-directories"),
])
def test_a_path_without_training_data(tmp_path, path, cause):
    make_folder(tmp_path / "folder", {"a": 1})
    write(tmp_path / "other", im2rec())
    for name in ("train.rec", "train.idx"):
        (tmp_path / "other" / name).rename(tmp_path / "other" / name.replace("train", "faces"))
    make_folder(tmp_path, {"flat": 2})
    with pytest.raises(UserError, match=cause):
        opened(tmp_path / path)


@pytest.mark.parametrize("index", ["none", "auto"])
def test_the_fingerprint_tells_which_images_there_are(tmp_path, index):
    """The same with and without a cache, and wherever the data lie; another one after a change of names or labels."""
    make_folder(tmp_path / "a", {"x": 2, "y": 1})
    make_folder(tmp_path / "b", {"x": 2, "y": 1, "empty": 0})
    fingerprint = opened(tmp_path / "a").fingerprint()
    assert fingerprint.startswith("FaceFolder:") and opened(tmp_path / "b", index=index).fingerprint() == fingerprint
    image, seen = tmp_path / "b/x/001.jpg", {fingerprint}
    for name in ("x/002.jpg", "y/001.jpg", "z"):  # renamed, moved to another identity, an identity renamed
        image = image.rename(tmp_path / "b" / name) if "/" in name else (tmp_path / "b/y").rename(tmp_path / "b/z")
        seen.add(opened(tmp_path / "b", index=index).fingerprint())
    (tmp_path / "b/z/000.jpg").write_bytes(b"damaged")
    seen.add(opened(tmp_path / "b", skip_bad=True).fingerprint())
    assert len(seen) == 5
    packages = [insightface([0, 0, 1]), insightface([0, 1, 1]), insightface([0, 0, 1], JPEGS[1:])]
    prints = [opened(write(tmp_path / f"{k}", frames), index=index).fingerprint() for k, frames in enumerate(packages)]
    assert len(set(prints)) == 3
    assert opened(tmp_path / "0", index=index).fingerprint() == prints[0] and prints[0].startswith("RecordIODataset:")


def good_and_bad(root: Path, form: str) -> Path:
    """Images 1, 4 and 5 of 9 are bad; those are all images of the class in the middle."""
    images = [JPEGS[0], b"text", *JPEGS[2:4], b"text", encode(smooth_image(size=100), "JPEG"), *JPEGS[6:]]
    labels = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    if form == "recordio":
        return write(root, insightface(labels, images))
    for k, (label, image) in enumerate(zip(labels, images)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        (root / str(label) / f"{k}.jpg").write_bytes(image)
    return root


@pytest.mark.parametrize("index", ["none", "auto"])
@pytest.mark.parametrize("form", FORMATS)
def test_bad_images_are_an_error_or_dropped_in_every_format(tmp_path, capsys, form, index):
    path = good_and_bad(tmp_path, form)
    with pytest.raises(UserError, match=r"not a JPEG.* \(3 of 9 images are bad; --skip-bad-images"):
        opened(path, index=index)
    dataset = opened(path, index=index, skip_bad=True, progress=True)
    assert isinstance(dataset, FORMATS[form]) and dataset.skip_bad and len(dataset) == 6
    assert list(dataset.identities) == ["0", "1", "2"]
    assert dataset.labels.tolist() == [0, 0, 0, 2, 2, 2] and dataset.labels.dtype == np.int64
    assert [dataset.encoded(i)[0] for i in range(6)] == [JPEGS[k] for k in (0, 2, 3, 6, 7, 8)]
    assert [label for _, label in dataset] == dataset.labels.tolist()
    assert dataset[5][0].shape == (3, 112, 112) and dataset[5][0].dtype == torch.uint8
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            dataset[outside]
    assert "3 of 9 images are bad and skipped" in capsys.readouterr().err
    assert dataset.check_headers(skip_bad=False, progress=True) == 0
