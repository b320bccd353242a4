"""TinyFace, and MATLAB's files."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.evaluation import ALONE, Pixels
from helpers.ijb import write_mat
from PIL import Image

from data import mat_file
from data.mat_file import read_mat
from utils.errors import UserError
from utils.evaluation.protocol import EvalSet, Result, Source
from utils.evaluation.sets import evaluate_set, open_sets

# What scipy.io.savemat (1.17) wrote after the text of its header.
BY_SCIPY = base64.b85decode(
    "000000000000Bu&4*&oFWdHyGc%0*700Kq^1~wqY0bzmxE0oU+6$4>zAWl!r$w@7$j4w_t0juK!VhaX@eik(SAbspe<_bXhhVhAdSq14}{SE~5bD-("
    "x1Y#r8_`@r~CNL1~4puaCK>P~5f;^BJ04v@OSq}gJ05<>t0C=3^V_;zL0Ae;E<^W=D1_)q<@|l5{5sE=_>4`ZxsYR9XnJL9!bu3W5j0}<tIzUALqJ0"
    "Hz")


def test_a_file_of_scipy(tmp_path: Path) -> None:
    (tmp_path / "x.mat").write_bytes(b"MATLAB 5.0 MAT-file Platform: posix".ljust(116) + BY_SCIPY)
    found = read_mat(str(tmp_path / "x.mat"), "--tinyface")
    assert found["gallery_set"] == ["1_a.jpg", "25_é.jpg", "x.png"] and found["gallery_ids"].tolist() == [1, 25, 300]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [True, False])
def test_files_of_both_byte_orders(order: str, compressed: bool, tmp_path: Path) -> None:
    write_mat(tmp_path / "x.mat", compressed, order, names=["a.jpg", "bb.png", ""], small=np.array([1, 2, 3], "u1"),
              ids=np.array([-7, 2**31 - 1], "i4"), numbers=np.array([1.5, 2, 1e9]))
    found = read_mat(str(tmp_path / "x.mat"), "--tinyface")
    assert found["names"] == ["a.jpg", "bb.png", ""] and found["small"].tolist() == [1, 2, 3]
    assert found["ids"].tolist() == [-7, 2**31 - 1] and found["numbers"].tolist() == [1.5, 2, 1e9]


def test_damaged_mat_files_give_one_line(tmp_path: Path) -> None:
    """Cut off anywhere, or with any byte changed: one line, or other values."""
    path = tmp_path / "x.mat"
    rng = np.random.default_rng(0)
    for compressed in (True, False):
        write_mat(path, compressed, names=["a.jpg", "b.png"], ids=np.array([1, 2], "u2"))
        good = path.read_bytes()
        for trial in range(120):
            data = bytearray(good)
            if trial % 2:
                del data[rng.integers(0, len(good)):]
            else:
                data[rng.integers(124, len(good))] = rng.integers(0, 256)
            path.write_bytes(data)
            try:
                read_mat(str(path), "--tinyface")
            except UserError as error:
                assert "\n" not in str(error) and str(error).startswith(f"--tinyface: {path}: ")


def test_compressed_variables_have_one_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zlib takes the nothing that is left of the limit for no limit."""
    path = tmp_path / "x.mat"
    write_mat(path, True, first=np.arange(100, dtype="u1"), second=np.zeros(100_000, "u1"))
    data = path.read_bytes()
    size = len(zlib.decompress(data[136:136 + int.from_bytes(data[132:136], "little")]))
    monkeypatch.setattr(mat_file, "_MAX_INFLATED", size)
    with pytest.raises(UserError, match="its compressed data are larger than"):
        read_mat(str(path), "--tinyface")


def test_huge_and_other_mat_files(tmp_path: Path) -> None:
    path = tmp_path / "x.mat"
    header = b"MATLAB 5.0".ljust(124) + b"\0\1IM"
    bomb = zlib.compress(struct.pack("<II", 14, 2**26) + bytes(2**26), 1)
    for data, message in (
        (header + struct.pack("<II", 15, len(bomb)) + bomb, "is damaged .its compressed data are larger than 64 MiB"),
        (b"MATLAB 7.3 MAT-file".ljust(512), "version 7.3; save it with"),
        (b"\x89HDF\r\n", "version 7.3"),
        (b"name,id\n1,2\n", "is no .mat file of version 5"),
        (b"", "is no .mat file"),
        (header + struct.pack("<II", 14, 2**31), "is damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_mat(str(path), "--tinyface")
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(UserError, match="should have 67,108,864 at most"):
        read_mat(str(path), "--tinyface")
    with pytest.raises(UserError, match="cannot be read .No such file"):
        read_mat(str(tmp_path / "y.mat"), "--tinyface")


# One color per image, and the mean color is the embedding by Pixels. Identities 1, 2 and 3.
GALLERY = {"1_a.jpg": (1, (255, 0, 0)), "1_b.jpg": (1, (0, 255, 0)), "2_a.jpg": (2, (200, 200, 0)),
           "3_a.jpg": (3, (0, 100, 255))}
PROBES = {"1_p.jpg": (1, (250, 40, 0)), "2_p.jpg": (2, (255, 160, 10)), "3_p.jpg": (3, (255, 155, 0))}
DISTRACTORS = {"x.jpg": (0, (255, 120, 0)), "y.jpg": (0, (255, 250, 250))}


def write_tinyface(root: Path, size: tuple[int, int] = (16, 20)) -> Path:
    testing = root / "Testing_Set"
    for part, images in (("Gallery_Match", GALLERY), ("Probe", PROBES), ("Gallery_Distractor", DISTRACTORS)):
        (testing / part).mkdir(parents=True)
        for name, (_, color) in images.items():
            Image.new("RGB", size, color).save(testing / part / name, format="png")
    for file, kind, images in (("gallery_match", "gallery", GALLERY), ("probe", "probe", PROBES)):
        write_mat(testing / f"{file}_img_ID_pairs.mat", **{
            f"{kind}_set": list(images), f"{kind}_ids": np.array([one for one, _ in images.values()], "u2")})
    return root


def open_set(root: Path, imgs_root: Path | None = None) -> EvalSet:
    eval_set, = open_sets([Source("tinyface", str(root), "--tinyface", str(imgs_root) if imgs_root else None,
                                  settings={"flip": True})])
    return eval_set


def evaluate(root: Path, imgs_root: Path | None = None) -> Result:
    result = evaluate_set(Pixels(), open_set(root, imgs_root), ALONE, embeddings=str(root / "embeddings"), batch_size=4,
                          workers=0, flip=True, progress=False)
    assert result is not None
    return result


def expected_ranks() -> list[int]:
    """By hand: the cosines of the colors, (value - 127.5) / 127.5."""
    def unit(color: tuple[int, int, int]) -> np.ndarray:
        v = np.array(color) / 127.5 - 1
        return v / np.linalg.norm(v)

    entries = [*GALLERY.values(), *((-100, color) for _, color in DISTRACTORS.values())]
    ranks = []
    for subject, color in PROBES.values():
        scores = [(float(unit(color) @ unit(other)), one == subject) for one, other in entries]
        best = max(score for score, mate in scores if mate)
        ranks.append(1 + sum(score >= best for score, mate in scores if not mate))
    return ranks


def test_ranks(tmp_path: Path) -> None:
    """The first probe is closest to its own color, the second to a distractor, the third far from its mate."""
    eval_set = open_set(write_tinyface(tmp_path))
    assert eval_set.size == "3 probes, 4 gallery images, 2 distractors"
    ranks = expected_ranks()
    assert ranks == [1, 2, 6]
    result = evaluate(tmp_path)
    assert [result.json[f"rank_{k}"] for k in (1, 5, 20)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert result.headline == pytest.approx(1 / 3) and "rank 5    66.67 %" in result.report
    assert "mirrored images added" in result.report and json.dumps(result.json, allow_nan=False)


def test_aligned_images_and_missing_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned images may have another extension. Missing probes count as errors, missing gallery images are absent."""
    write_tinyface(tmp_path / "data")
    aligned = write_tinyface(tmp_path / "aligned", (112, 112)) / "Testing_Set"
    (aligned / "Probe" / "1_p.jpg").rename(aligned / "Probe" / "1_p.png")
    (aligned / "Probe" / "2_p.jpg").unlink()
    (aligned / "Gallery_Match" / "3_a.jpg").unlink()
    (aligned / "Gallery_Distractor" / "notes.txt").write_text("")
    result = evaluate(tmp_path / "data", aligned)
    assert [result.json[f"rank_{k}"] for k in (1, 5, 20)] == pytest.approx([1 / 3] * 3)
    assert result.json["missing_images"] == {"Probe": 1, "Gallery_Match": 1}
    errors = capsys.readouterr().err
    assert "1 of 3 images of" in errors and "count as not found; the first one: 2_p.jpg" in errors
    assert "left out of the gallery; the first one: 3_a.jpg" in errors
    assert "1 of 2 probes are of people whom the gallery lacks" in errors


def test_embeddings_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_set = open_set(write_tinyface(tmp_path))
    rows = np.float32([[1, 0], [np.nan, 0], [0, 0], [1, 0], [0, 1], [np.inf, 1], [1, 1], [0, -1], [1, 1]])
    result = eval_set.score(rows)
    assert result.json["rank_1"] == pytest.approx(1 / 3) == result.json["rank_20"]
    assert "3 of 9 embeddings are zero, NaN or infinite" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ("no list", "gallery_match_img_ID_pairs.mat: cannot be read"),
    ("no names", "has no cell array gallery_set of file names"),
    ("few ids", "needs a whole number in gallery_ids for each of the 4 names"),
    ("fractions", "needs a whole number in gallery_ids"),
    ("huge ids", "needs a whole number in gallery_ids"),
    ("infinite ids", "needs a whole number in gallery_ids"),
    ("distractors", "needs a whole number in gallery_ids .*, not -100, which stands for distractors"),
    ("no directory", "Gallery_Distractor: cannot be read"),
    ("other images", "Probe has none of the 3 images of the list, such as 1_p.jpg"),
    ("broken image", "2_p.jpg: not a "),
])
def test_mistakes_give_one_line(change: str, message: str, tmp_path: Path) -> None:
    testing = write_tinyface(tmp_path) / "Testing_Set"
    path = testing / "gallery_match_img_ID_pairs.mat"
    ids = np.array([1, 1, 2, 3], "u2")
    if change == "no list":
        path.unlink()
    elif change == "no names":
        write_mat(path, gallery_ids=ids)
    elif change == "few ids":
        write_mat(path, gallery_set=list(GALLERY), gallery_ids=ids[:3])
    elif change in ("huge ids", "infinite ids", "distractors"):
        value = {"huge ids": 1e300, "infinite ids": np.inf, "distractors": -100.0}[change]
        write_mat(path, gallery_set=list(GALLERY), gallery_ids=np.array([1, 1, 2, value]))
    elif change == "fractions":
        write_mat(path, gallery_set=list(GALLERY), gallery_ids=ids + 0.5)
    elif change == "no directory":
        (testing / "Gallery_Distractor").rename(testing / "Distractors")
    elif change == "other images":
        for image in (testing / "Probe").iterdir():
            image.rename(image.with_name("other_" + image.name))
    else:
        (testing / "Probe" / "2_p.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=message) as caught:
        evaluate(tmp_path)
    assert "\n" not in str(caught.value)
