"""Pair lists: what is read, and one clear line for each way in which they can be wrong."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pairs import PairImages, PairList
from utils.errors import UserError

GOOD = ["a/1.jpg a/2.jpg 1", "b/1.jpg b/2.jpg 1", "a/1.jpg b/1.jpg 0", "a/2.jpg b/1.jpg 0"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
        path = tmp_path / "imgs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (112, 112), (10 * ord(name[0]) % 256, 20 * int(name[2]), 0)).save(path, quality=95)
    return tmp_path


def read(root: Path, lines: list[str] | bytes) -> PairList:
    content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
    (root / "pair.list").write_bytes(content)
    return PairList(str(root / "imgs"), str(root / "pair.list"))


def test_each_image_is_listed_once(root: Path) -> None:
    pairs = read(root, GOOD)
    assert pairs.paths == [str(root / "imgs" / name) for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg")]
    assert pairs.index1.tolist() == [0, 2, 0, 1] and pairs.index1.dtype == np.int64
    assert pairs.index2.tolist() == [1, 3, 2, 2] and pairs.index2.dtype == np.int64
    assert pairs.is_same.tolist() == [True, True, False, False] and pairs.is_same.dtype == bool
    assert len(pairs) == 4


def test_blank_lines_windows_line_ends_tabs_and_a_byte_order_mark(root: Path) -> None:
    pairs = read(root, b"\xef\xbb\xbf" + "\r\n".join(["", *GOOD, "  ", ""]).replace(" ", "\t").encode())
    assert pairs.index1.tolist() == [0, 2, 0, 1]
    assert pairs.paths[0].endswith("imgs/a/1.jpg")


def test_paths_need_not_be_utf8(root: Path) -> None:
    try:
        os.rename(root / "imgs" / "a", os.fsencode(root / "imgs") + b"/\xe9")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    pairs = read(root, "\n".join(GOOD).encode().replace(b"a/", b"\xe9/"))
    assert PairImages(pairs)[0][0].shape == (3, 112, 112)


FORMS = {
    "tabs": ["a/1.jpg\ta/2.jpg\t1", "b/1 a, x.jpg\ta/2.jpg\t0"],
    "CSV with names of columns": ["path1,path2,same", "a/1.jpg,a/2.jpg,1", '"b/1 a, x.jpg",a/2.jpg,0,'],
    "semicolons, blanks after them": ["a/1.jpg; a/2.jpg; True", '"b/1 a, x.jpg"; a/2.jpg; False'],
    "-1, the label in front, comments": ["# of today", "1,a/1.jpg,a/2.jpg", "", "  # b", '-1,"b/1 a, x.jpg",a/2.jpg'],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_list(root: Path, form: str) -> None:
    (root / "imgs/b/1.jpg").rename(root / "imgs/b/1 a, x.jpg")
    pairs = read(root, FORMS[form])
    assert [path.removeprefix(f"{root}/imgs/") for path in pairs.paths] == ["a/1.jpg", "a/2.jpg", "b/1 a, x.jpg"]
    assert pairs.is_same.tolist() == [True, False] and pairs.index1.tolist() == [0, 2] and not pairs.skipped


def test_blanks_separate_where_commas_make_no_sense(root: Path) -> None:
    (root / "imgs/a/1.jpg").rename(root / "imgs/a/1,1.jpg")
    assert read(root, ["a/1,1.jpg a/2.jpg 1", "b/1.jpg a/1,1.jpg 0"]).paths[0].endswith("a/1,1.jpg")


@pytest.mark.parametrize("lines", [
    ["2\t1", "a\t1\t2", "a\t1\tb\t2"],
    ["name,imagenum1,imagenum2,", "a,1,2,", "a,1,b,2"],
    ["a 1 2", "a 1 b 2"],
], ids=["pairs.txt", "CSV", "blanks"])
def test_lfws_own_list(root: Path, lines: list[str]) -> None:
    for image in ("a/1.jpg", "a/2.jpg", "b/2.jpg"):
        name = root / "imgs" / image
        name.rename(name.with_name(f"{name.parent.name}_000{image[2]}" + (".png" if image == "a/2.jpg" else ".jpg")))
    pairs = read(root, lines)
    assert [os.path.basename(path) for path in pairs.paths] == ["a_0001.jpg", "a_0002.png", "b_0002.jpg"]
    assert pairs.is_same.tolist() == [True, False]


@pytest.mark.parametrize("numbers", [(1, 1, 1, 0, 0), (1, 1, 10, 0, 0)], ids=["CPLFW", "CALFW"])
def test_two_lines_a_pair(root: Path, numbers: tuple[int, ...]) -> None:
    """CPLFW has 1 for the same person. CALFW has the number of the fold, 1 to 10. Both have 0 for others."""
    names = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "a/1.jpg", "a/2.jpg", "a/1.jpg", "b/1.jpg", "b/2.jpg",
             "a/2.jpg"]
    pairs = read(root, [f"{name} {numbers[k // 2]}" for k, name in enumerate(names)])
    assert pairs.is_same.tolist() == [True] * 3 + [False] * 2
    assert pairs.index1.tolist() == [0, 2, 0, 0, 3] and pairs.index2.tolist() == [1, 3, 1, 2, 1]


def test_xqlfws_list_is_that_of_lfw(root: Path) -> None:
    """xqlfw_pairs.txt has LFW's form, and its images LFW's names."""
    for image in ("a/1.jpg", "a/2.jpg", "b/2.jpg"):
        name = root / "imgs" / image
        name.rename(name.with_name(f"{name.parent.name}_000{image[2]}.jpg"))
    assert read(root, ["10\t1", "a\t1\t2", "a\t1\tb\t2", "a\t2\t1"]).is_same.tolist() == [True, False, True]


def test_pairs_without_an_image_are_skipped_on_demand(root: Path) -> None:
    (root / "pair.list").write_text("\n".join([*GOOD, "a/1.jpg c/1.jpg 0", "c/1.jpg d/1.jpg 1"]))
    with pytest.raises(UserError, match="list:5: there is no image .*c/1.jpg .2 of 6 .*--skip-missing-pairs"):
        PairList(root / "imgs", root / "pair.list")
    pairs = PairList(root / "imgs", root / "pair.list", skip_missing=True)
    assert pairs.skipped == 2 and len(pairs) == 4 and len(pairs.paths) == 4
    (root / "pair.list").write_text("c/1.jpg d/1.jpg 1")
    with pytest.raises(UserError, match="2 of 2 images are missing.; check --imgs-root$"):
        PairList(root / "imgs", root / "pair.list", skip_missing=True)


@pytest.mark.parametrize("imgs_root, path, hint", [
    (".", "a/1.jpg", "it is in .*/imgs: give --imgs-root"), ("imgs/a", "a/1.jpg", "it is in .*/imgs: give --imgs-root"),
    ("imgs", "imgs/a/1.jpg", "it is in .*: give"), ("imgs", "a/1.png", "there is a/1.jpg: correct the list"),
])
def test_where_the_images_are_instead(root: Path, imgs_root: str, path: str, hint: str) -> None:
    (root / "pair.list").write_text(f"{path} {path} 1")
    with pytest.raises(UserError, match=hint):
        PairList(root / imgs_root, root / "pair.list")


def test_images(root: Path) -> None:
    images = PairImages(read(root, GOOD))
    assert len(images) == 4
    image, label = pickle.loads(pickle.dumps(images))[3]
    assert image.shape == (3, 112, 112) and str(image.dtype) == "torch.uint8" and label == 0
    np.testing.assert_allclose(image[:, 50, 50], [10 * ord("b") % 256, 40, 0], atol=6)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([*GOOD, "a/1.jpg a/2.jpg"], r"pair\.list:5: expected 'path1 path2 0\|1', as in .*, got 'a/1\.jpg a/2\.jpg'"),
        (["", "a/1.jpg a/2.jpg 1 1", *GOOD], r"pair\.list:2: expected"),
        ([*GOOD[:2], "x", *GOOD[2:]], r"pair\.list:3: expected .* got 'x'"),
        ([GOOD[0], "a/1.jpg b/1.jpg 2"], r"pair\.list:2: expected 'path1 path2 0\|1', as .* got '.* 2'"),
        ([GOOD[0], "a/1.jpg b/1.jpg -1", GOOD[2]], r"pair\.list:3: expected 'path1 path2 -1\|1'"),
        ([GOOD[0], "a/1.jpg b/1.jpg yes"], r"pair\.list:2: expected"),
        ([*GOOD, "a/1.jpg a/3.jpg 1"], r"pair\.list:5: there is no image .*imgs/a/3\.jpg \(1 of 5 .* --imgs-root"),
        (["c/1.jpg d/1.jpg 1", *GOOD], r"pair\.list:1: there is no image .*c/1\.jpg \(2 of 6 images are missing\)"),
        (["a b/1.jpg 1", *GOOD], r"pair\.list:1: there is no image .*imgs/a \(1 of 5 images"),
        ([], r"pair\.list: the pair list is empty"),
        (["", "  "], r"pair\.list: the pair list is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", r"pair\.list:1: expected .* got '.*PNG'"),
        (b"a\x00 b 1\n", r"pair\.list:1: expected .* got 'a\\x00 b 1'"),
        (["a/1.jpg " * 100], r"pair\.list:1: expected lines of 'path1 path2 0\|1' .* LFW's .*, got 'a.{119}'$"),
        (["10\t300", "Anna\t1\t2", "Anna\t1\tBob"], r"pair\.list:3: expected LFW's 'name n1 n2' or"),
        (["Anna 1 2", "Anna 1 Bob 2"], r"pair\.list:1: there is no image .*imgs/Anna/Anna_0001.jpg"),
        (["a/1.jpg 1", "a/2.jpg 1", "b/1.jpg 0", "b/2.jpg 1"], r"pair\.list:3: two lines with the same number are"),
        (["a/1.jpg 1", "a/2.jpg 1", "b/1.jpg 0"], r"pair\.list:3: two lines .*'b/1.jpg 0' has another .* missing"),
        (["a/1.jpg 1", "a/2.jpg 1", "b/1.jpg b/2.jpg 0"], r"pair\.list:1: expected"),
        (["path1,path2,same"], r"pair\.list:1: expected"),
        (b"\x80\x04\x95", r"--pair-list .*pair\.list: is no list of pairs; .*--bin"),
    ],
)
def test_bad_lists(root: Path, lines: list[str] | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(root, lines)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_missing_list_and_directory(root: Path) -> None:
    with pytest.raises(UserError, match=r"--pair-list .*nothing: cannot be read \(No such file"):
        PairList(str(root / "imgs"), str(root / "nothing"))
    with pytest.raises(UserError, match=r"--pair-list .*imgs: cannot be read \(Is a directory"):
        PairList(str(root / "imgs"), str(root / "imgs"))
    (root / "pair.list").write_text("\n".join(GOOD))
    with pytest.raises(UserError, match=r"--imgs-root .*nothing: no such directory"):
        PairList(str(root / "nothing"), str(root / "pair.list"))


def test_a_bad_image_is_named_when_it_is_read(root: Path) -> None:
    (root / "imgs/a/2.jpg").write_bytes(b"no image")
    images = PairImages(read(root, GOOD))
    assert images[0][1] == 0
    with pytest.raises(UserError, match=r"imgs/a/2\.jpg"):
        images[1]
