"""Drawn faces, their pair lists and the command line around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run
from PIL import Image

from data.align import TEMPLATE, align_face, similarity_transform
from scripts.synthesize import sample_pairs, write_identity_set, write_pairs
from scripts.synthetic import draw_face, draw_photo, find_landmarks
from utils.errors import UserError

SMALL = ("--identities", 3, "--images", 4, "--pairs", 12, "--pair-identities", 3)


def pixels(identity: int, image: int, seed: int = 0) -> np.ndarray:
    return np.asarray(draw_face(identity, image, seed), dtype=np.int16)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_drawing_depends_on_seed_identity_and_image_alone() -> None:
    face = draw_face(3, 5, seed=1)
    assert face.size == (112, 112) and face.mode == "RGB"
    first = pixels(3, 5, seed=1)
    pixels(8, 2)  # drawing another one in between changes nothing
    np.testing.assert_array_equal(first, pixels(3, 5, seed=1))
    for other in (pixels(4, 5, seed=1), pixels(3, 6, seed=1), pixels(3, 5, seed=2)):
        assert np.abs(first - other).mean() > 10


def test_a_drawing_is_neither_black_nor_white_nor_flat() -> None:
    for number in range(20):
        face = pixels(number, number)
        assert 10 < face.mean() < 245 and face.std() > 10


def test_identity_set_has_the_identities_asked_for(tmp_path: Path) -> None:
    write_identity_set(tmp_path, range(5, 8), images=2)
    names = sorted(contents(tmp_path))
    assert names == [f"{identity:06d}/{image:03d}.jpg" for identity in (5, 6, 7) for image in (0, 1)]
    with Image.open(tmp_path / names[0]) as image:
        assert image.size == (112, 112) and image.format == "JPEG"


def test_processes_draw_what_one_process_draws(tmp_path: Path) -> None:
    write_identity_set(tmp_path, range(20), images=11)  # enough images to be shared out
    name = "000017/003.jpg"
    write_identity_set(tmp_path / "one", [17], images=4)
    assert (tmp_path / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("count", [2, 40, 41])
def test_pairs_are_balanced_different_and_right(count: int) -> None:
    pairs = sample_pairs(count, range(6), images=5, seed=3)
    assert len(pairs) == count and sum(pairs.values()) == (count + 1) // 2
    for (one, other), same in pairs.items():
        assert one < other and (one[0] == other[0]) == same
    assert pairs == sample_pairs(count, range(6), images=5, seed=3)


@pytest.mark.parametrize("pairs, identities, images", [(100, 2, 3), (10, 1, 20), (2, 5, 1)])
def test_more_pairs_than_there_are_is_an_error(pairs: int, identities: int, images: int) -> None:
    with pytest.raises(UserError, match=f"--pairs {pairs}: "):
        sample_pairs(pairs, range(identities), images)


def test_pair_list_names_the_images_that_are_there(tmp_path: Path) -> None:
    write_pairs(tmp_path, 20, range(7, 11), images=4)
    lines = [line.split() for line in (tmp_path / "pair.list").read_text().splitlines()]
    assert len(lines) == 20
    named = {path for *paths, _ in lines for path in paths}
    assert named == contents(tmp_path / "imgs").keys()
    assert {int(path.split("/")[0]) for path in named} <= {7, 8, 9, 10}
    for one, other, label in lines:
        assert (one.split("/")[0] == other.split("/")[0]) == (label == "1")


def test_synthesize_keeps_its_own_set_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "set"
    run("scripts/synthesize.py", out, *SMALL)
    made = contents(out)
    train, unseen = ({path.name for path in (out / part).iterdir()} for part in ("train", "lfw/imgs"))
    assert len(train) == 3 and unseen and not train & unseen
    assert list(tmp_path.iterdir()) == [out]  # nothing half-made beside it

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "already" in run("scripts/synthesize.py", out, *SMALL)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    assert "error:" in run("scripts/synthesize.py", out, *SMALL, "--seed", 1, status=2)
    (out / "runs").mkdir()
    assert "holds runs beside the set" in run("scripts/synthesize.py", out, *SMALL, "--seed", 1, "--force", status=2)
    (out / "runs").rmdir()
    assert contents(out) == made
    run("scripts/synthesize.py", out, *SMALL, "--seed", 1, "--force")
    assert contents(out).keys() & made.keys() and contents(out) != made


def test_landmarks_of_drawings_are_those_of_a_face() -> None:
    for number in range(20):
        points = find_landmarks(number, number)
        transform = similarity_transform(points)
        aligned = points @ transform[:, :2].T + transform[:, 2]
        assert np.abs(aligned - TEMPLATE).max() < 16 and ((points > 10) & (points < 102)).all()
        photo, in_photo = draw_photo(number, number)
        assert ((in_photo > 0) & (in_photo < photo.size)).all()
        # The crop is the same, whether the face is aligned before it is put into a photo or after.
        crops = [align_face(np.asarray(image), at)[26:86, 26:86].astype(int)
                 for image, at in ((draw_face(number, number), points), (photo, in_photo))]
        assert np.abs(crops[0] - crops[1]).mean() < 4
        shifted = align_face(np.asarray(photo), in_photo + 2)[26:86, 26:86].astype(int)
        assert np.abs(crops[0] - shifted).mean() > 1.3 * np.abs(crops[0] - crops[1]).mean()


def test_unaligned_photos_have_landmarks(tmp_path: Path) -> None:
    out = tmp_path / "set"
    run("scripts/synthesize.py", out, *SMALL, "--unaligned")
    images = {name for name in contents(out) if name.endswith(".jpg")}
    landmarks = {name: np.array(numbers, float).reshape(5, 2) for name, *numbers in
                 map(str.split, (out / "landmarks.txt").read_text().splitlines())}
    assert landmarks.keys() == images and any(name.startswith("lfw/imgs/") for name in images)
    photo, points = draw_photo(1, 2)
    with Image.open(out / "train/000001/002.jpg") as image:
        assert image.size == photo.size
    np.testing.assert_allclose(landmarks["train/000001/002.jpg"], points, atol=0.006)
    assert "already" in run("scripts/synthesize.py", out, *SMALL, "--unaligned")
    run("scripts/synthesize.py", out, *SMALL, "--force")
    # As it was before there was this flag, so that older sets are still known.
    assert "unaligned" not in (out / "synthetic.json").read_text() and not (out / "landmarks.txt").exists()


def test_synthesize_touches_no_other_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    message = run("scripts/synthesize.py", tmp_path, *SMALL, "--force", status=2)
    assert message.count("\n") == 1 and str(tmp_path) in message
    assert contents(tmp_path) == {"mine.txt": b"mine"}
