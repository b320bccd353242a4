"""data.align, read_photo and scripts/align.py: the warp, the files of landmarks, and photos of all kinds."""

from __future__ import annotations

import base64
import csv
import errno
import fcntl
import os
import re
import shutil
import sys
import types
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import run
from PIL import Image

from data import decode
from data.align import TEMPLATE, align_face, similarity_transform
from data.decode import read_photo
from scripts import align
from scripts.align import Options, Row, crop_names, read_landmarks
from scripts.synthetic import draw_photo
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")

# ---------------------------------------------------------------------------------------------------------------------
# The warp

# cv2.warpAffine(pattern(), similarity_transform(...), (8, 8), borderValue=0) of OpenCV 4.14: base85 of (8, 8, 3).
REFERENCES = {
    "enlarged": (0.1, 0.5, (24.3, 19.8),
                 "wjOMuVppblT*M!G8C0)Kr*fKpX-<(-sz{^CJ($x?sH%0vT$d8INo=%-YL)P7DTLoDg@{6(_;}NPidcCifZL`~T&sGUYQ;cz(k+|5"
                 "QQ1t7pNd(OyH-Gvd1;V?v}0<@U4VmDu|b;Gr7(P_dR>b|X^*-^t6sSweAiyNWQ?<B9eB&2XJbN?n4wRkSF(MCpE}1neUE~0oVQXw"
                 "mbaLhjBT%xv_EQcMW8#D$)PNSrh#0Se_)-^Q@@^d"),
    "reduced": (0.55, -0.9, (25.1, 20.4),
                "0000000000000006mQA^000000000000000000000Ft>?al|K~G*<us0000000000001$JUrcAhP^8g{Lz4gi00000Dg+s0zF}Kt"
                "!EA5Jeb_lkq}Oz)DgXcg0001iT$grIb!}LNonTX*S+rTSw-s>900000004DBn~6M^l{97EQIvblhi|?y00000000000Jw8*>`0=4"
                "%r|wAD*ylh000000000000000oHvqRx?KPO00000"),
    "at the border": (0.3, 2.6, (3.7, 31.2),
                      "uE}IqsW<=t00000000000000000000Tyv@{hvIc;k0KEk000000000000000f^9gzS%^ZBx2cD8j)d9(0000000000J9e3e"
                      "Z&`g{vy+ZVEQhktGll>F00000NTYT|ShKx2bB*9bZ<-}xyte=V00000T(==Ah0u*;zmiX?sY|8+0000000000eV{XD!9-oS"
                      "qhq!i7&=@40000000000k9J?G?O?rtd8})0000000000000000"),
}


def pattern() -> np.ndarray:
    """An image whose neighboring pixels differ much: uint8 (40, 50, 3)."""
    y, x, channel = np.ogrid[:40, :50, :3]
    return ((3 * x * x + 5 * y * y + 7 * x * y + 91 * channel) % 256).astype(np.uint8)


def face(scale: float, angle: float, at: tuple[float, float]) -> np.ndarray:
    """The template enlarged, turned and centered somewhere: (5, 2)."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return scale * (TEMPLATE - 56) @ turn + at


@pytest.mark.parametrize("name", REFERENCES)
def test_the_warp_gives_opencvs_pixels(name: str) -> None:
    scale, angle, at, expected = REFERENCES[name]
    crop = align_face(pattern(), face(scale, angle, at), size=8)
    np.testing.assert_array_equal(crop, np.frombuffer(base64.b85decode(expected), np.uint8).reshape(8, 8, 3))


def test_the_warp_gives_the_installed_opencvs_pixels() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for trial in range(20):
        height, width = rng.integers(1, 300, 2)
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        points = face(10 ** rng.uniform(-1, 0.5), rng.uniform(-3, 3), rng.uniform(0, 1, 2) * (width, height))
        points += rng.normal(0, 2, (5, 2))
        expected = cv2.warpAffine(noise, similarity_transform(points), (112, 112), borderValue=0.0)
        difference = np.abs(align_face(noise, points).astype(int) - expected)
        if int(cv2.__version__.split(".")[0]) < 5:
            assert difference.max() <= 1, trial
        else:  # it rounds places no more, by up to 1/64 of a pixel on each axis
            assert difference.max() <= 2 * 255 / 64 + 1, trial


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Equations 38 to 43 of the paper, as they stand there: (2, 3)."""
    mean_x, mean_y = source.mean(axis=0), target.mean(axis=0)
    variance = ((source - mean_x) ** 2).sum(axis=1).mean()
    u, d, vt = np.linalg.svd((target - mean_y).T @ (source - mean_x) / len(source))
    sign = np.diag([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / variance
    return np.c_[scale * rotation, mean_y - scale * rotation @ mean_x]


@pytest.mark.parametrize("size", [112, 224])
def test_the_transform_is_umeyamas(size: int) -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(0, 3, (50, 5, 2))
    for one in points:
        one += face(10 ** rng.uniform(-1, 1), rng.uniform(-3, 3), rng.uniform(-500, 500, 2))
    points[0] *= -1, 1  # mirrored: only a rotation is fitted
    expected = np.stack([umeyama(one, TEMPLATE * size / 112) for one in points])
    transforms = similarity_transform(points, size)
    np.testing.assert_allclose(transforms, expected, rtol=1e-9, atol=1e-9)
    assert (np.linalg.det(transforms[:, :, :2]) > 0).all()
    np.testing.assert_allclose(similarity_transform(points.reshape(5, 10, 5, 2), size), expected.reshape(5, 10, 2, 3))


def test_a_face_on_the_template_is_cut_out_as_it_is() -> None:
    photo = np.random.default_rng(2).integers(0, 256, (150, 160, 3), dtype=np.uint8)
    np.testing.assert_array_equal(align_face(photo, TEMPLATE + (20, 30)), photo[30:142, 20:132])
    padded = align_face(photo, TEMPLATE - (10, 5))  # the rest is black
    np.testing.assert_array_equal(padded[5:, 10:], photo[:107, :102])
    assert not padded[:5].any() and not padded[:, :10].any()


def test_a_view_of_an_array_is_a_photo_too() -> None:
    photo = np.random.default_rng(3).integers(0, 256, (90, 100, 3), dtype=np.uint8)
    points = face(0.5, 0.3, (50, 45))
    np.testing.assert_array_equal(align_face(photo[:, :, ::-1], points), align_face(photo, points)[:, :, ::-1])


BAD_LANDMARKS = {"nan": np.full((5, 2), np.nan),
                 "one nan": np.where(np.arange(10).reshape(5, 2) == 3, np.nan, TEMPLATE),
                 "infinite": TEMPLATE + np.inf, "coinciding": np.full((5, 2), 7.0), "huge": TEMPLATE * 1e200}


@pytest.mark.parametrize("name", BAD_LANDMARKS)
def test_landmarks_without_a_transform(name: str) -> None:
    bad = BAD_LANDMARKS[name]
    transforms = similarity_transform(np.stack([TEMPLATE, bad, TEMPLATE]))
    np.testing.assert_allclose(transforms[[0, 2]], [[[1, 0, 0], [0, 1, 0]]] * 2, atol=1e-12)
    if name != "huge":
        assert np.isnan(transforms[1]).all()
    with pytest.raises(UserError, match="the landmarks are not finite"):
        align_face(pattern(), bad)


@pytest.mark.parametrize("points", [TEMPLATE + 1e9, face(1e-4, 0, (20, 20)), face(1e5, 1, (0, 0))])
def test_landmarks_far_away_tiny_or_large(points: np.ndarray) -> None:
    crop = align_face(pattern(), points)
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8


@pytest.mark.parametrize("image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)])
def test_what_is_no_photo_is_the_callers_mistake(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image: expected uint8"):
        align_face(image, TEMPLATE)


# ---------------------------------------------------------------------------------------------------------------------
# Photos


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_photos_of_any_mode_are_rgb(tmp_path: Path, mode: str) -> None:
    values = np.arange(0, 240, 2, dtype=np.uint8).reshape(10, 12)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) << 8)
    else:
        image = Image.fromarray(values).convert("L" if mode in ("LA", "RGBA") else mode)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
    image.save(path := tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png"))
    expected = np.repeat((values[..., None] >= 128) * 255 if mode == "1" else values[..., None], 3, axis=2)
    pixels = read_photo(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (10, 12, 3)
    if mode != "1":  # Pillow dithers
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path := tmp_path / "photo.webp", lossless=True, exif=exif)
    turned = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1], pixels.transpose(1, 0, 2),
              np.rot90(pixels, -1), pixels[::-1, ::-1].transpose(1, 0, 2), np.rot90(pixels)][orientation - 1]
    np.testing.assert_array_equal(read_photo(path), turned)
    np.testing.assert_array_equal(read_photo(path, exif=False), pixels)


def test_damaged_exif_turns_nothing(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" * 3
    Image.new("RGB", (9, 6), (200, 0, 0)).save(path := tmp_path / "photo.jpg", exif=exif)
    assert read_photo(path).shape == (6, 9, 3)


def test_damaged_and_huge_photos_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_photo(0, 0)[0].save(whole := tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, message in {"cut": "damaged or truncated", "empty": "the file is empty", "text": "not a JPEG",
                          "pipe": "cannot be read", "missing": "cannot be read"}.items():
        with pytest.raises(UserError, match=rf"/{name}.jpg: .*{message}"):
            read_photo(tmp_path / f"{name}.jpg")
    monkeypatch.setattr(decode, "MAX_PHOTO_PIXELS", 1000)
    with pytest.raises(UserError, match=r"should have 1,000 pixels at most"):
        read_photo(whole)
    os.truncate(whole, decode.MAX_PHOTO_BYTES + 1)
    with pytest.raises(UserError, match=r"has 268,435,457 bytes, and should have 268,435,456 at most"):
        read_photo(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Files of landmarks

NUMBERS = [str(value) for value in (11.5, 12, 31, 12.25, 21, 20, 13, 30, 29, 31)]
OTHERS = [str(float(value) + 100) for value in NUMBERS]
CELEBA = ("lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x "
          "rightmouth_y").split()
SHORT = [f"{axis}{i}" for i in range(1, 6) for axis in "xy"]
VGG = [f"P{i}{axis}" for i in range(1, 6) for axis in "XY"]
PHOTOS = ["a/1.jpg", "a/my photo 2.jpg", "b, c/3.png", "4.jpg"]


def table(*rows: list[str], glue: str = " ") -> str:
    return "".join(glue.join(row) + "\n" for row in rows)


LAYOUTS = {
    "blanks and a score": table(["a/1.jpg", *NUMBERS, "0.99"], ["4.jpg", *OTHERS, "1"]),
    "blanks": table(["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS]),
    "many blanks": table(["  a/1.jpg", *NUMBERS], [], ["4.jpg", *OTHERS, ""], glue="   "),
    "tabs": table(["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS], glue="\t"),
    "commas": table(["a/1.jpg", *NUMBERS, "0.5"], ["4.jpg", *OTHERS, "0.5"], glue=","),
    "commas and blanks": table(["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS], glue=", "),
    "semicolons": table(["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS], glue=";"),
    "CSV": table(["image", *SHORT], ["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS], glue=","),
    "more columns": table(["score", "Filename", *SHORT[::-1]], ["1", "a/1.jpg", *NUMBERS[::-1]],
                          ["1", "4.jpg", *OTHERS[::-1]], glue=","),
    "CelebA's text": table(["2"], CELEBA, ["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS]),
    "CelebA's CSV": table(["image_id", *CELEBA], ["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS], glue=","),
    "MTCNN's names": table(["file", *"left_eye_x left_eye_y right_eye_x right_eye_y nose_x nose_y mouth_left_x "
                            "mouth_left_y mouth_right_x mouth_right_y".split()],
                           ["a/1.jpg", *NUMBERS], ["4.jpg", *OTHERS], glue=","),
    "VGGFace2's CSV": table(["NAME_ID", *VGG], ['"a/1"', *NUMBERS], ['"4"', *OTHERS], glue=","),
    "Windows": "\ufeff" + table(["a/1.jpg", *NUMBERS, "\r"], ["4.jpg", *OTHERS, "\r"]),
    "paths": table(["./a//1.jpg", *NUMBERS], ["{DIR}/4.jpg", *OTHERS]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "landmarks.txt").write_text(LAYOUTS[name].replace("{DIR}", str(tmp_path)), encoding="utf-8")
    faces = read_landmarks(str(tmp_path / "landmarks.txt"), PHOTOS, str(tmp_path))
    assert {photo: list(values) for photo, values in faces.items()} == {
        "a/1.jpg": list(map(float, NUMBERS)), "4.jpg": list(map(float, OTHERS))}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("score", [[], ["0.9"]])
@pytest.mark.parametrize("text", [
    lambda name, rest: table([name, *rest]),
    lambda name, rest: table(["name", *SHORT, *["score"] * (len(rest) - 10)], [f'"{name}"', *rest], glue=","),
    lambda name, rest: table([*SHORT, *["score"] * (len(rest) - 10)], [name, *rest]),
])
@pytest.mark.parametrize("name", ["a/my photo 2.jpg", "b, c/3.png", "a/my photo 2"])
def test_names_with_separators(tmp_path: Path, name: str, text, score: list[str]) -> None:
    (tmp_path / "list").write_text(text(name, NUMBERS + score))
    faces = read_landmarks(str(tmp_path / "list"), [*PHOTOS, "a/my.jpg"], "DIR")
    (photo, values), = faces.items()
    assert photo.startswith(name) and list(values) == list(map(float, NUMBERS))


def test_a_number_in_a_name_is_no_landmark(tmp_path: Path) -> None:
    """"John 1" and "John" are both photos, and the file has no score."""
    (tmp_path / "list").write_text(table(["Ann.jpg", *NUMBERS], ["John", "1", *NUMBERS], ["John", *OTHERS]))
    faces = read_landmarks(str(tmp_path / "list"), ["Ann.jpg", "John.jpg", "John 1.jpg"], "DIR")
    assert list(faces["John 1.jpg"]) == list(map(float, NUMBERS))
    assert list(faces["John.jpg"]) == list(map(float, OTHERS))


def test_several_lines_are_several_faces(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(table(["4.jpg", *NUMBERS], ["a/1.jpg", *OTHERS], ["4.jpg", *OTHERS]))
    faces = read_landmarks(str(tmp_path / "list"), PHOTOS, "DIR")
    assert [len(faces[photo]) for photo in ("4.jpg", "a/1.jpg")] == [20, 10]


def test_damaged_lines_are_counted_and_nothing_else_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [table(["4.jpg", *NUMBERS]), "garbage\n", "\0\xff\n", "x" * 200_000 + "\n", table(["no.jpg", *NUMBERS]),
             table(["no.jpg", *NUMBERS]), table(["a/1.jpg", *NUMBERS[:9], "?"]), "b, c/3.png\n", "a/1.jpg 3 4"]
    (tmp_path / "list").write_bytes("".join(lines).encode("latin-1"))
    faces = read_landmarks(str(tmp_path / "list"), [*PHOTOS, "3.png"], "DIR")
    assert list(faces["4.jpg"]) == list(map(float, NUMBERS))
    assert len(faces["a/1.jpg"]) == 20 and np.isnan(faces["a/1.jpg"]).all()  # two damaged faces, which are listed
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2
    assert "4 of 9 lines cannot be read, such as line 2" in err
    assert "2 of 9 lines name photos that are not in DIR, such as 'no.jpg'" in err


def test_points_at_one_place_form_no_face_whatever_the_place() -> None:
    """The mean of five equal numbers may differ from them in the last bit."""
    places = np.round(np.random.default_rng(0).uniform(0, 3000, (5000, 1, 2)), 2)
    assert np.isnan(similarity_transform(np.repeat(places, 5, axis=1))).all()
    assert np.isfinite(similarity_transform(places + 0.01 * TEMPLATE)).all()  # a face of one pixel


@pytest.mark.parametrize("content, message", [
    (b"", "is empty; expected"),
    ("name,x1,y1".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 900, "line 1, .* is neither a face nor a header"),
    (b"name,x1,y1,x2,y2\na/1.jpg,1,2,3,4\n", "line 1, 'name,x1,y1,x2,y2', is neither"),
    (table(["no.jpg", *NUMBERS]).encode(),
     "none of its 1 lines names a photo of DIR DIR: the first has 'no.jpg', and a photo is 'a/1.jpg'"),
    (table(["image", *SHORT], glue=",").encode(), "none of its 0 lines names a face"),
    (table(["image", *SHORT], ["a", "1"], glue=",").encode(), "none of its 1 lines names a face"),
])
def test_files_without_landmarks_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_landmarks(str(tmp_path / "list"), PHOTOS, "DIR")
    assert "\n" not in str(caught.value) and "expected lines of name x1 y1" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The program


class Album:
    """DIR with photos, and the landmarks that are known of them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.lines = directory, list[str]()
        self.photos, self.out, self.list = directory / "photos", directory / "out", directory / "landmarks.txt"

    def add(self, name: str, *faces: np.ndarray, pixels: np.ndarray | None = None) -> np.ndarray:
        """A photo, drawn or of these pixels, and a line for each of these faces, or for the face that is drawn."""
        if pixels is None:
            photo, points = draw_photo(0, len(self.lines))
            pixels, faces = np.asarray(photo), faces or (points,)
        path = self.photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, "PNG")
        self.lines += [table([name, *map(repr, map(float, one.ravel()))]) for one in faces]
        return pixels

    def align(self, **options: object) -> dict[str, Row]:
        """Run the program. Returns the rows by photo, or by crop for photos with several."""
        if "detector" not in options:
            text = "".join(self.lines).encode(errors="surrogateescape")
            if not self.list.exists() or self.list.read_bytes() != text:  # its time tells whether it is another one
                self.list.write_bytes(text)
            options = {"landmarks": str(self.list)} | options
        settings = {"photos": str(self.photos), "out": str(self.out), "workers": 0, "format": "png"}
        align.align(Options(**(settings | options)))
        return self.rows()

    def rows(self) -> dict[str, Row]:
        with open(self.out / "align.csv", newline="", errors="surrogateescape") as file:
            header, *rows = csv.reader(file)
        assert header == ["photo", "crop", "status", "reason", "faces", "eyes", "landmarks"]
        assert rows == sorted(rows, key=lambda row: row[0])
        found = [Row(*row[:4], int(row[4]), *row[5:]) for row in rows]
        names = [row.photo for row in found]
        return {row.photo if names.count(row.photo) == 1 else row.crop or row.status: row for row in found}

    def crop(self, name: str) -> np.ndarray:
        with Image.open(self.out / name) as image:
            return np.asarray(image)

    def crops(self) -> dict[str, int]:
        return {str(path.relative_to(self.out)): path.stat().st_mtime_ns for path in self.out.rglob("*.png")}


@pytest.fixture
def album(tmp_path: Path) -> Album:
    return Album(tmp_path)


ODD = ["a/x.png", "a/deeper/my photo.PNG", "b/ünï\u202e.png", "b/new\nline, \"quoted\".png", "b/\udcff\udcfe.png",
       "c/.x.png"]


def test_folders_stay_folders(album: Album, capsys: pytest.CaptureFixture[str]) -> None:
    photos = {name: album.add(name) for name in ODD if "\n" not in name}
    (album.photos / "a" / "notes.txt").touch()
    rows = album.align()
    expected = {name: f"{os.path.splitext(name)[0]}.png" for name in photos if name != "c/.x.png"}  # hidden
    assert {row.photo: row.crop for row in rows.values()} == expected
    assert all(row[2:5] == ("aligned", "", 1) for row in rows.values())
    for i, (name, pixels) in enumerate(photos.items()):
        if name in expected:
            np.testing.assert_array_equal(album.crop(expected[name]), align_face(pixels, draw_photo(0, i)[1]))
    assert sorted(os.listdir(album.out)) == ["a", "align.csv", "align.json", "b"]
    assert "4 crops of 4 photos" in capsys.readouterr().out


def test_processes_align_what_one_process_aligns(album: Album) -> None:
    for i in range(20):
        album.add(f"{i % 3}/{i}.png")
    album.add(ODD[3], np.full((5, 2), np.nan))
    (album.photos / "bad.png").write_bytes(b"no image")
    album.lines += [table(["bad.png", *NUMBERS])]
    one = album.align()
    output = run("scripts/align.py", album.photos, album.directory / "two", "--landmarks", album.list, "-j", 2,
                 "--format", "png")
    assert "20 crops of 22 photos" in output and "1 unreadable (bad.png: not a JPEG" in output
    assert "left out: " in output and "Traceback" not in output
    crops = {name: (album.out / name).read_bytes() for name in album.crops()}
    album.out = album.directory / "two"
    assert album.rows() == one and crops == {name: (album.out / name).read_bytes() for name in album.crops()}


def test_each_photo_without_a_crop_has_its_reason(album: Album, capsys: pytest.CaptureFixture[str]) -> None:
    flat = np.full((60, 80, 3), 90, np.uint8)
    good = face(0.4, 0, (40, 30))
    album.add("good.png", good, pixels=flat)
    album.add("partly outside.png", face(0.4, 0, (75, 50)), pixels=flat)
    album.add("profile.png", face(0.4, 0, (40, 30)) * (0.05, 1) + (40, 0), pixels=flat)
    album.add("upside down.png", face(0.4, np.pi, (40, 30)), pixels=flat)
    album.add("outside.png", good + (80, 0), pixels=flat)
    album.add("nan.png", good * np.nan, pixels=flat)
    album.add("one place.png", np.full((5, 2), 20.0), pixels=flat)
    album.add("swapped.png", good[[1, 0, 2, 4, 3]], pixels=flat)
    album.add("mirrored.png", good * (-1, 1) + (80, 0), pixels=flat)
    album.add("tiny.png", face(0.2, 0, (40, 30)), pixels=flat)
    album.add("unknown.png", pixels=flat)
    album.add("damaged.png", good, pixels=flat)
    (album.photos / "damaged.png").write_bytes((album.photos / "damaged.png").read_bytes()[:60])
    album.add("gone.png", good, pixels=flat)
    (album.photos / "gone.png").unlink()
    rows = album.align()
    assert {row.photo.removesuffix(".png"): (row.status, re.split(r"[,:(]", row.reason)[0].strip(), row.faces)
            for row in rows.values()} == {
        "good": ("aligned", "", 1), "partly outside": ("aligned", "", 1), "profile": ("aligned", "", 1),
        "upside down": ("aligned", "", 1),
        "outside": ("landmarks", "the face lies outside of the photo", 1),
        "nan": ("landmarks", "they are not finite", 1), "one place": ("landmarks", "they are not finite", 1),
        "swapped": ("landmarks", "left and right are swapped", 1),
        "mirrored": ("landmarks", "left and right are swapped", 1),
        "tiny": ("tiny", "the eyes are 7.0 pixels apart", 1),
        "unknown": ("no face", "landmarks.txt does not name it", 0),
        "damaged": ("unreadable", "the image is damaged or truncated", 1)}
    assert float(rows["good.png"].eyes) == pytest.approx(0.4 * 35.24, abs=0.06)
    out, err = capsys.readouterr()
    assert "4 crops of 12 photos" in out and "5 landmarks (mirrored.png: left" in out
    assert err == (f"warning: --landmarks {album.list}: 1 of 12 lines name photos that are not in DIR, such as "
                   "'gone.png'\n")


@pytest.mark.parametrize("several, chosen", [("largest", [1]), ("center", [2]), ("all", [0, 1, 2, 3, 4])])
def test_several_faces(album: Album, several: str, chosen: list[int]) -> None:
    faces = [face(0.5, 0, (40, 40)), face(0.6, 0.2, (150, 40)), face(0.5, 0, (100, 80)), face(0.1, 0, (100, 75)),
             np.full((5, 2), np.nan)]
    noise = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    photo = album.add("a/x.png", *faces, pixels=noise)
    album.add("z.png", face(0.5, 0, (40, 40)), pixels=noise)
    *rows, last = album.align(several=several).values()
    if several == "all":
        assert [row.status for row in rows] == ["aligned", "aligned", "aligned", "tiny", "landmarks"]
        crops = {f"a/x.face{i}.png": faces[i] for i in range(3)}
    else:
        # The tiny face is closest to the center: who asks for that one gets it, or a row that says why not.
        assert [row.status for row in rows] == ["aligned" if several == "largest" else "tiny"]
        assert several == "center" or "5 faces, the largest" in rows[0].reason
        crops = {"a/x.png": faces[1]} if several == "largest" else {}
    assert {row.faces for row in rows} == {5} and set(album.crops()) == {*crops, last.crop}
    for name, points in crops.items():
        np.testing.assert_array_equal(album.crop(name), align_face(photo, points))


def test_photos_that_differ_in_their_extension_both_have_crops(album: Album) -> None:
    photos = {name: album.add(name) for name in ("a/x.jpg", "a/x.png", "a/y.jpg", "b/x.jpg")}
    crops = {photo: row.crop for photo, row in album.align().items()}
    assert crops == {"a/x.jpg": "a/x.jpg.png", "a/x.png": "a/x.png.png", "a/y.jpg": "a/y.png", "b/x.jpg": "b/x.png"}
    for i, (name, pixels) in enumerate(photos.items()):
        np.testing.assert_array_equal(album.crop(crops[name]), align_face(pixels, draw_photo(0, i)[1]))
    assert list(crop_names(["x.jpg", "x.face0.jpg"])) == ["x", "x.face0.jpg"]


def test_jpeg_crops(album: Album) -> None:
    pixels = album.add("x.png")
    album.align(format="jpg")
    with Image.open(album.out / "x.jpg") as image:
        assert image.format == "JPEG" and image.layer[0][1:3] == image.layer[1][1:3]  # no chroma subsampling
        difference = np.abs(np.asarray(image).astype(int) - align_face(pixels, draw_photo(0, 0)[1]))
    assert difference.mean() < 2


@pytest.mark.parametrize("ignore_exif", [False, True])
def test_landmarks_are_those_of_the_photo_as_it_is_shown(album: Album, ignore_exif: bool) -> None:
    photo, points = draw_photo(0, 0)
    pixels = np.asarray(photo)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    album.photos.mkdir()
    stored = pixels if ignore_exif else np.rot90(pixels)
    Image.fromarray(stored).save(album.photos / "x.webp", lossless=True, exif=exif)
    album.lines = [table(["x.webp", *map(repr, points.ravel().tolist())])]
    album.align(ignore_exif=ignore_exif)
    np.testing.assert_array_equal(album.crop("x.png"), align_face(pixels, points))


def test_a_rerun_aligns_what_is_missing_or_has_changed(album: Album, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abcdef":
        album.add(f"1/{name}.png")
    damaged = album.photos / "1/e.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:1000])
    rows, before = album.align(), album.crops()
    assert rows["1/e.png"].status == "unreadable" and len(before) == 5
    (album.out / "1/b.png").unlink()
    (album.out / "1/c.png").write_bytes(b"")  # what a power cut may leave
    (album.out / ".align-77.part").write_bytes(b"cut")
    damaged.write_bytes(whole)
    changed = album.photos / "1/d.png"
    changed.write_bytes(changed.read_bytes())
    (album.photos / "1/f.png").unlink()
    capsys.readouterr()
    rows, after = album.align(), album.crops()
    out, err = capsys.readouterr()
    assert "5 crops of 5 photos, 1 of the photos were aligned before" in out
    assert "has crops of 1 photos that are not in DIR any more" in err
    assert {name for name in after if after[name] == before.get(name)} == {"1/a.png", "1/f.png"}
    assert rows["1/e.png"].status == "aligned" and len(rows) == 6  # f's crop is still there, and has its row
    assert album.align() == rows and "1 photos that are not in DIR" in capsys.readouterr().err
    assert sorted(os.listdir(album.out)) == ["1", "align.csv", "align.json"]


@pytest.mark.parametrize("torn", ["", "1/c.png,1/c.p", '"1/c.png,1', "1/c.png,1/c.png,aligned,,x,1,\r\n", "\0\0\0"])
def test_an_interrupted_run_is_continued(album: Album, monkeypatch: pytest.MonkeyPatch, torn: str) -> None:
    for name in "abcd":
        album.add(f"1/{name}.png")
    photos = iter(range(4))
    original = align.read_photo

    def read(path: str, exif: bool) -> np.ndarray:
        if next(photos) == 2:
            raise KeyboardInterrupt
        return original(path, exif=exif)

    monkeypatch.setattr(align, "read_photo", read)
    with pytest.raises(KeyboardInterrupt):
        album.align()
    before = album.crops()
    assert set(before) == {"1/a.png", "1/b.png"} and not (album.out / "align.csv").exists()
    with open(album.out / ".align.partial.csv", "a") as journal:
        journal.write(torn)
    monkeypatch.setattr(align, "read_photo", original)
    rows, after = album.align(), album.crops()
    assert {name for name in after if after[name] == before.get(name)} == set(before)
    assert [row[:3] for row in rows.values()] == [(f"1/{name}.png", f"1/{name}.png", "aligned") for name in "abcd"]


def test_other_settings_need_another_directory_or_force(album: Album, capsys: pytest.CaptureFixture[str]) -> None:
    album.add("x.png")
    album.align()
    for options, names in ({"several": "all"}, "several"), ({"min_eyes": 5.0, "format": "jpg"}, "min_eyes, format"):
        with pytest.raises(UserError, match=rf"OUT .* made with other settings \({names}\); give another"):
            album.align(**options)
    album.align(several="all", force=True)
    assert "renamed to" in capsys.readouterr().err
    assert set(album.crops()) == {"x.face0.png"} and (album.directory / "out.1" / "x.png").exists()
    with pytest.raises(UserError, match=r"\(landmarks\)"):
        album.align(several="all", landmarks=str(shutil.copy(album.list, album.directory / "copy.txt")))


def test_photos_and_landmarks_that_are_new_are_aligned(album: Album, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = album.add("x.png")
    before = album.align(), album.crops()
    album.add("y.png")
    rows, crops = album.align(), album.crops()
    assert rows["x.png"] == before[0]["x.png"] and crops["x.png"] == before[1]["x.png"] and set(crops) == {*rows}
    assert "1 of the photos were aligned before" in capsys.readouterr().out
    points = draw_photo(0, 0)[1] + 3
    album.lines[0] = table(["x.png", *map(repr, map(float, points.ravel()))])
    rows = album.align()
    np.testing.assert_array_equal(album.crop("x.png"), align_face(pixels, points))
    assert album.crops()["y.png"] == crops["y.png"] and rows["x.png"].landmarks != before[0]["x.png"].landmarks


def test_a_photo_that_gives_fewer_crops_than_before_leaves_none_behind(album: Album) -> None:
    two = [face(0.5, 0, (50, 50)), face(0.6, 0, (60, 60))]
    album.add("x.png", *two, pixels=np.zeros((99, 99, 3), np.uint8))
    album.add("y.png", *two, pixels=np.zeros((99, 99, 3), np.uint8))
    album.align(several="all")
    assert set(album.crops()) == {f"{name}.face{i}.png" for name in "xy" for i in range(2)}
    del album.lines[1]  # one face of x is left
    (album.photos / "y.png").write_bytes(b"no image")
    rows = album.align(several="all")
    assert set(album.crops()) == {"x.face0.png"} and rows["y.png"].status == "unreadable"


def test_names_that_cannot_be_those_of_a_crop(album: Album) -> None:
    album.add("x.png")
    album.add(f"{'n' * 248}.png", face(0.5, 0, (50, 50)), pixels=np.zeros((99, 99, 3), np.uint8))
    rows = album.align(several="all")
    assert rows["x.png"].status == "aligned" and rows[f"{'n' * 248}.png"].status == "name"
    for name in "a.jpg", "a.png", "a.jpg.jpg":
        album.add(f"1/{name}")
    with pytest.raises(UserError, match="the photos 1/a.jpg and 1/a.jpg.jpg would have one crop; rename one of them"):
        album.align(several="all")


def test_two_runs_do_not_write_to_one_directory(album: Album) -> None:
    album.add("x.png")
    album.align()
    with open(album.out / ".align.partial.csv", "w") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        for options in {}, {"force": True}:
            with pytest.raises(UserError, match="another process is writing there"):
                album.align(**options)
    assert not (album.directory / "out.1").exists()


def test_a_photo_that_was_aligned_again_has_one_row(album: Album) -> None:
    album.add("x.png", face(0.5, 0, (50, 50)), pixels=np.zeros((99, 99, 3), np.uint8))
    row = album.align()["x.png"]
    with open(album.out / ".align.partial.csv", "w", newline="") as journal:  # as after a kill, and with a detector
        csv.writer(journal).writerows([row._replace(eyes="9"), (), row._replace(eyes="12.0")])
    assert album.align() == {"x.png": row._replace(eyes="12.0")}


def test_a_photo_whose_faces_were_not_all_written_is_aligned_again(album: Album) -> None:
    faces = [face(0.5, 0, (50, 50)), face(0.6, 0, (60, 60))]
    album.add("x.png", *faces, pixels=np.zeros((99, 99, 3), np.uint8))
    rows = album.align(several="all")
    lines = (album.out / "align.csv").read_text().splitlines(keepends=True)
    (album.out / "align.csv").write_text("".join(lines[:2]))
    assert album.align(several="all") == rows and len(rows) == 2


def test_mistakes_are_one_line_and_touch_nothing(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    album.add("a/x.png")
    album.list.write_text("".join(album.lines))
    album.out.mkdir()
    (album.out / "mine.txt").write_text("mine")
    photos, known = str(album.photos), {"landmarks": str(album.list)}
    for options, message in [
        ({"landmarks": None}, "give either --landmarks FILE, or --detector"),
        ({"detector": "mtcnn", **known}, "give either --landmarks FILE, or --detector"),
        ({"photos": ""}, "DIR is missing"), ({"out": ""}, "OUT is missing"),
        ({"photos": f"{photos}/no"}, "no such directory"), ({"photos": f"{photos}/a/x.png"}, "is a file"),
        ({"out": photos}, "is the same directory"), ({"out": f"{photos}/crops"}, "one of the two holds the other"),
        ({"out": str(album.directory)}, "one of the two holds the other"),
        ({}, "is not empty and not from this program"), ({"force": True}, "is not empty and not from this program"),
        ({"out": str(album.list), **known}, "is a file; give a directory"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            align.align(Options(**({"photos": photos, "out": str(album.out), "workers": 0, **known} | options)))
        assert "\n" not in str(caught.value)
    os.mkfifo(album.directory / "pipe")
    for bad in (".", "missing.txt", "pipe"):
        arguments = [photos, str(album.directory / "new"), "--landmarks", str(album.directory / bad)]
        monkeypatch.setattr(sys, "argv", ["align.py", *arguments])
        with pytest.raises(UserError, match=f"^--landmarks {re.escape(arguments[-1])}: cannot be read"):
            align.main()
    assert not (album.directory / "new").exists() and os.listdir(album.out) == ["mine.txt"]


@pytest.mark.parametrize("failure, message", [
    (OSError(errno.ENOSPC, "No space left on device", "OUT/x.jpg"), "OUT/x.jpg: No space left on device"),
    (BrokenProcessPool("..."), "a process that aligns has ended .*the same command continues"),
])
def test_a_failure_amid_the_work_is_one_line(
    album: Album, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    for name in "ab":
        album.add(f"{name}.png")
    album.list.write_text("".join(album.lines))
    original = align.Aligner.__call__

    def fail(self: align.Aligner, task: align.Task) -> list[Row]:
        if task.photo == "b.png":
            raise failure
        return original(self, task)

    arguments = ["align.py", str(album.photos), str(album.out), "--landmarks", str(album.list), "-j", "0"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--format", "png"])
    monkeypatch.setattr(align.Aligner, "__call__", fail)
    with pytest.raises(UserError, match=f"^{message}"):
        align.main()
    monkeypatch.undo()
    before = album.crops()
    assert [row.status for row in album.align().values()] == ["aligned"] * 2
    assert before.keys() == {"a.png"} and album.crops()["a.png"] == before["a.png"]


def test_no_crop_at_all_is_an_error_with_the_reason(album: Album) -> None:
    album.add("x.png", np.full((5, 2), np.nan))
    with pytest.raises(UserError, match=r"no photo gave a crop: 1 landmarks \(x.png: they are not finite"):
        album.align()
    assert album.rows()["x.png"].status == "landmarks"


# ---------------------------------------------------------------------------------------------------------------------
# The detector


def fake_package(monkeypatch: pytest.MonkeyPatch, detect) -> list[dict]:
    """A facenet_pytorch whose MTCNN finds what `detect(pixels)` returns: (landmarks (faces, 5, 2), scores), or None."""
    made: list[dict] = []

    class MTCNN:
        def __init__(self, **settings: object) -> None:
            made.append(settings)
            self.min_face_size = settings["min_face_size"]

        def detect(self, image: Image.Image, landmarks: bool) -> tuple:
            found = detect(np.asarray(image))
            if found is None:
                return None, np.array([None]), None
            points, scores = found  # the package returns arrays of objects
            return np.zeros((len(points), 4)), np.array(scores, dtype=object), np.array(points, dtype=object)

    package = types.ModuleType("facenet_pytorch")
    package.MTCNN = MTCNN
    monkeypatch.setitem(sys.modules, "facenet_pytorch", package)
    return made


def test_a_detector_finds_the_landmarks(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [draw_photo(0, i)[1] for i in range(3)]
    photos = [album.add(f"{i}.png") for i in range(3)]
    album.add("none.png", pixels=np.zeros((50, 50, 3), np.uint8))
    album.add("small.png", pixels=np.zeros((15, 50, 3), np.uint8))
    album.add("fails.png", pixels=np.ones((50, 50, 3), np.uint8))

    def detect(pixels: np.ndarray):
        if not pixels.any():
            return None
        if (pixels == 1).all():
            raise RuntimeError("a mistake\nof the package")
        i = next(i for i in range(3) if np.array_equal(pixels, photos[i]))
        # The weak one would be the largest face.
        return ([points[i], points[i] * 2], [0.99, 0.5]) if i else ([points[i] * 2], [0.5])

    made = fake_package(monkeypatch, detect)
    rows = album.align(detector="mtcnn", min_eyes=12.0)
    assert {(settings["min_face_size"], str(settings["device"])) for settings in made} == {(24, "cpu")}
    assert {name: (row.status, row.faces) for name, row in rows.items()} == {
        "0.png": ("no face", 0), "1.png": ("aligned", 1), "2.png": ("aligned", 1), "none.png": ("no face", 0),
        "small.png": ("no face", 0), "fails.png": ("no face", 0)}
    assert rows["fails.png"].reason == "the detector failed: a mistake of the package"
    for i in (1, 2):
        np.testing.assert_array_equal(album.crop(f"{i}.png"), align_face(photos[i], points[i]))


def test_a_missing_or_broken_detector_is_one_line(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    album.add("x.png")
    monkeypatch.setattr(align.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(UserError, match="facenet-pytorch is not installed; python3 -m pip install .*--no-deps"):
        album.align(detector="mtcnn")
    broken = types.ModuleType("facenet_pytorch")
    monkeypatch.setitem(sys.modules, "facenet_pytorch", broken)
    with pytest.raises(UserError, match=r"facenet-pytorch cannot be used \(module .* has no attribute 'MTCNN'\); "):
        album.align(detector="mtcnn")
    assert not album.out.exists()


@pytest.mark.filterwarnings("default")
def test_mtcnn_finds_drawn_faces(album: Album) -> None:
    pytest.importorskip("facenet_pytorch")
    for i in range(4):
        album.add(f"{i}.png")
    rows = album.align(detector="mtcnn")
    found = [i for i in range(4) if rows[f"{i}.png"].status == "aligned"]
    assert len(found) >= 3
    for i in found:
        eyes = np.linalg.norm(np.diff(draw_photo(0, i)[1][:2], axis=0))
        assert float(rows[f"{i}.png"].eyes) == pytest.approx(eyes, rel=0.35)
