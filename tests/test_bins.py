"""Evaluation sets in one file: every form is read; what is wrong is named, and no code is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.decode import decode_image
from data.insightface_bin import PairBin
from data.pairs import PairImages, PairList
from utils.errors import UserError

# Each file is read hundreds of times, and the file system may take any time for it: no deadline.
FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


def encoded(colour: int, size: tuple[int, int] = (112, 112), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 255 - colour, colour // 2)).save(file, form)
    return file.getvalue()


IMAGES = [encoded(20 * i, form="JPEG" if i % 2 else "PNG") for i in range(8)]
LABELS = [True, False, True, False]


def written(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "lfw.bin"
    path.write_bytes(data)
    return str(path)


def python_2(images: list[bytes], labels: list[bool], protocol: int) -> bytes:
    """What Python 2's cPickle makes of (list of str, list of bool), by hand; protocol 0 or 2."""
    if protocol == 0:
        strings = [b"S" + repr(image).removeprefix("b").encode() + b"\np%d\na" % i for i, image in enumerate(images, 4)]
        flags = [b"I0%d\na" % label for label in labels]
        return b"((lp1\n" + b"".join(strings) + b"(lp2\n" + b"".join(flags) + b"tp3\n."
    strings = [
        b"T" + struct.pack("<i", len(image)) + image + b"r" + struct.pack("<I", i) for i, image in enumerate(images, 4)
    ]
    flags = [b"\x88" if label else b"\x89" for label in labels]
    return b"\x80\x02]q\x01(" + b"".join(strings) + b"e]q\x02(" + b"".join(flags) + b"e\x86q\x03."


def python_2_arrays(images: list[bytes], labels: list[bool]) -> bytes:
    """Arrays as numpy under Python 2 writes them: protocol 2, with str for the bytes and for the dtype's names."""
    out = b"\x80\x02]q\x01("
    for image in images:
        out += (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M"
            + struct.pack("<H", len(image))
            + b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
            + struct.pack("<i", len(image))
            + image
            + b"tb"
        )
    return out + b"e]q\x02(" + b"".join(b"\x88" if label else b"\x89" for label in labels) + b"e\x86."


ARRAYS = [np.frombuffer(image, dtype=np.uint8) for image in IMAGES]
FORMS = {
    **{f"bytes, protocol {p}": pickle.dumps((IMAGES, LABELS), p) for p in range(6)},
    **{f"arrays, protocol {p}": pickle.dumps((ARRAYS, LABELS), p) for p in range(6)},
    **{f"writable arrays, protocol {p}": pickle.dumps(([a.copy() for a in ARRAYS], LABELS), p) for p in (2, 5)},
    **{f"numpy's bools, protocol {p}": pickle.dumps((IMAGES, [np.bool_(x) for x in LABELS]), p) for p in range(6)},
    **{f"an array of bools, protocol {p}": pickle.dumps((IMAGES, np.array(LABELS)), p) for p in range(6)},
    "integers": pickle.dumps((IMAGES, [int(x) for x in LABELS]), 2),
    "numpy's integers": pickle.dumps((IMAGES, [np.int64(x) for x in LABELS]), 4),
    "big-endian integers": pickle.dumps((IMAGES, np.array(LABELS, dtype=">i4")), 4),
    "tuples in a list": pickle.dumps([tuple(IMAGES), tuple(LABELS)], 4),
    "two dimensions": pickle.dumps(([a.reshape(1, -1) for a in ARRAYS], LABELS), 4),
    "Python 2, protocol 0": python_2(IMAGES, LABELS, 0),
    "Python 2, protocol 2": python_2(IMAGES, LABELS, 2),
    "Python 2, arrays": python_2_arrays(IMAGES, LABELS),
}
OLD_NUMPY = {  # since protocol 4 the length of a name is written before it
    f"{name}, numpy 1": data.replace(b"\x16numpy._core", b"\x15numpy._core")
    .replace(b"\x13numpy._core", b"\x12numpy._core")
    .replace(b"numpy._core", b"numpy.core")
    for name, data in FORMS.items()
    if b"numpy._core" in data
}


@pytest.mark.parametrize("form", [*FORMS, *OLD_NUMPY])
def test_every_form_is_read(tmp_path: Path, form: str) -> None:
    data = {**FORMS, **OLD_NUMPY}[form]
    pairs = PairBin(written(tmp_path, data))
    assert len(pairs) == 4 and pairs.num_images == 8
    assert pairs.is_same.tolist() == LABELS and pairs.is_same.dtype == bool
    assert pairs.index1.tolist() == [0, 2, 4, 6] and pairs.index2.tolist() == [1, 3, 5, 7]
    assert pairs.index1.dtype == pairs.index2.dtype == np.int64
    assert [pairs.encoded(i)[0] for i in range(8)] == IMAGES
    assert pairs.encoded(3)[1] == f"{tmp_path}/lfw.bin, image 3"
    assert [len(image) for image, _ in (PairImages(pairs)[i] for i in range(8))] == [3] * 8


def test_the_forms_are_what_pickle_reads() -> None:
    """Check the hand-written forms against the real unpickler."""
    for name, data in FORMS.items():
        images, labels = pickle.loads(data, encoding="bytes") if "Python 2" in name else pickle.loads(data)
        assert [bytes(np.asarray(image)) if isinstance(image, np.ndarray) else image for image in images] == IMAGES, (
            name
        )
        assert list(map(bool, labels)) == LABELS, name


def test_an_image_of_several_pairs_is_one(tmp_path: Path) -> None:
    pairs = PairBin(written(tmp_path, pickle.dumps(([IMAGES[i] for i in (3, 1, 2, 3, 1, 1, 0, 2)], LABELS))))
    assert pairs.num_images == 4
    assert pairs.index1.tolist() == [0, 2, 1, 3] and pairs.index2.tolist() == [1, 0, 1, 2]
    assert [pairs.encoded(i)[0] for i in range(4)] == [IMAGES[i] for i in (3, 1, 2, 0)]
    assert pairs.image_name(3).endswith("image 6")


def test_the_object_is_small_when_sent_to_another_process(tmp_path: Path) -> None:
    images = [encoded(i % 256, form="BMP") for i in range(64)]
    sent = pickle.dumps(PairImages(PairBin(written(tmp_path, pickle.dumps((images, [True, False] * 16))))))
    assert len(sent) < 6000 and os.path.getsize(tmp_path / "lfw.bin") > 2_000_000
    received = pickle.loads(sent)
    for i in (0, 63):
        assert (received[i][0] == decode_image(images[i], "")).all()


class Attack:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


ATTACKS = {
    "os.system": pickle.dumps(Attack()),
    "os.system as an image": pickle.dumps(([Attack(), *IMAGES[1:]], LABELS)),
    "builtins.eval": b"cbuiltins\neval\n(S'open(\"executed\", \"w\")'\ntR.",
    "instance": b"(S'touch executed'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch executed'\no.",
    "protocol 4": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch executed\x85R.",
    "attribute of an allowed module": b"\x80\x02cnumpy\nload\nU\x08executed\x85R.",
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
    "state of a stand-in": b"\x80\x02cnumpy\nndarray\n}U\x01xK\x01sb.",
    "call of a stand-in": b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",
    "call of a number": b"\x80\x02K\x01K\x01\x85R.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "persistent id": b"\x80\x02U\x01aQ.",
    "extension": b"\x80\x02\x82\x01.",
    "another codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
    "array of objects": pickle.dumps((np.array([None, {}], dtype=object), LABELS)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, ATTACKS[attack])
    with pytest.raises(UserError) as caught:
        PairBin(path)
    assert str(caught.value).startswith(f"--bin {path}: ") and str(caught.value).isprintable()
    assert os.listdir(tmp_path) == ["lfw.bin"]
    if attack.startswith("os.system"):
        assert "'posix.system'" in str(caught.value) and "not loaded" in str(caught.value)
    if attack == "builtins.eval":
        assert "'builtins.eval'" in str(caught.value)


def image_number(number: int, data: bytes) -> bytes:
    return pickle.dumps(([*IMAGES[:number], data, *IMAGES[number + 1 :]], LABELS))


@pytest.mark.parametrize("data, message", [
    (b"", "the file is empty"),
    (b"PK\x03\x04 an archive", "not an evaluation set"),
    (b"a/1.jpg a/2.jpg 1\n", "is text; give a list of pairs with --pair-list"),
    (b"\x80\x63.", "protocol: 99"),
    (b"\x80\x02.", "not an evaluation set, or a damaged"),
    (b"\x80\x02h\x00.", "not an evaluation set, or a damaged"),
    (b"\x80\x02K\x01\x85\x86.", "not an evaluation set, or a damaged"),
    (pickle.dumps(IMAGES), "not an evaluation set"),
    (pickle.dumps((1, 2)), "does not hold a list of images .* but .1, 2"),
    (pickle.dumps((IMAGES, "yes")), "does not hold a list of images and a list of labels"),
    (pickle.dumps((IMAGES[:7], LABELS)), "has 7 images and 4 labels; there must be two images for each label"),
    (pickle.dumps((IMAGES, LABELS[:3])), "has 8 images and 3 labels"),
    (pickle.dumps((IMAGES, [True, False, 2, True])), "label 2 is 2, not True, False, 1 or 0"),
    (pickle.dumps((IMAGES, [True, False, None, True])), "label 2 is None, not True"),
    (pickle.dumps((["a.jpg", *IMAGES[1:]], LABELS)), "image 0 is 'a.jpg', not bytes"),
    (pickle.dumps(([*IMAGES[:5], None, *IMAGES[6:]], LABELS)), "image 5 is None, not bytes"),
    (pickle.dumps(([*ARRAYS[:7], ARRAYS[7].astype(np.int16)], LABELS)), "image 7 is array.*, not bytes"),
    (pickle.dumps(([*ARRAYS[:7], ARRAYS[7].astype(np.float32)], LABELS)), "an array of 'f4', not of bytes"),
    (pickle.dumps((IMAGES, [1.0, 0.0, 1.0, 0.0])), "not an evaluation set"),
    (pickle.dumps({"images": IMAGES}), "not an evaluation set"),
    (FORMS["bytes, protocol 4"][:-300], "truncated"),
    (python_2_arrays(IMAGES, LABELS).replace(b"K\x01M", b"K\x01K", 1), "damaged"),
])
def test_what_is_wrong_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PairBin(written(tmp_path, data))
    assert f"{tmp_path}/lfw.bin: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data, message", [
    (image_number(2, IMAGES[2][:60]), "lfw.bin, image 2: .*damaged"),
    (image_number(3, b""), "lfw.bin, image 3: not a JPEG"),
    (image_number(5, b"no image"), "lfw.bin, image 5: not a JPEG"),
    (image_number(7, encoded(9, (112, 111))), "lfw.bin, image 7: the image is 112x111, not 112x112"),
])
def test_images_that_do_not_decode_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        images = PairImages(PairBin(written(tmp_path, data)))
        for i in range(len(images)):
            images[i]


def test_missing_and_shrinking_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.bin: cannot be read \(No such file"):
        PairBin(tmp_path / "none.bin")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        PairBin(tmp_path)
    pairs = PairBin(written(tmp_path, FORMS["bytes, protocol 4"]))
    os.truncate(tmp_path / "lfw.bin", 500)
    with pytest.raises(UserError, match="has become shorter"):
        pairs.encoded(7)


BOMBS = {
    "bytes": b"\x80\x04B\xff\xff\xff\xff.",
    "long bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "bytearray": b"\x80\x05\x96" + b"\x00" * 4 + b"\x01\x00\x00\x00.",
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    "text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "negative": b"\x80\x02T\xff\xff\xff\xff.",
    "memo": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "number": b"I" + b"9" * 100_000 + b"\n.",
    "shape": pickle.dumps((IMAGES, np.array(LABELS)), 2).replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
    "marks": b"(" * 100_000 + b"t" * 100_000 + b".",
    "lists": b"]" * 100_000 + b".",
    "text encoded again and again": b"\x80\x02X"
    + struct.pack("<I", 100_000)
    + b"a" * 100_000
    + b"q\x000]("
    + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 3_000
    + b"e.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_memory_is_bounded_by_the_size_of_the_file(tmp_path: Path, bomb: str) -> None:
    path = written(tmp_path, BOMBS[bomb])
    tracemalloc.start()
    with pytest.raises(UserError):
        PairBin(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 + 100 * len(BOMBS[bomb])


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def check_read(path: Path, read) -> None:
    """Reading gives a consistent set, or an error of one line that names the file."""
    try:
        pairs = read()
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600 + len(str(path))
        return
    assert len(pairs.index1) == len(pairs.index2) == len(pairs.is_same) == len(pairs)
    assert (
        not len(pairs)
        or 0 <= min(pairs.index1.min(), pairs.index2.min())
        and max(pairs.index1.max(), pairs.index2.max()) < pairs.num_images
    )
    for i in range(pairs.num_images):
        try:
            assert PairImages(pairs)[i][0].shape == (3, 112, 112)
        except UserError as error:
            assert str(error).startswith(pairs.image_name(i)) and "\n" not in str(error)


# Small images, so that most damage hits the pickle.
SMALL = [encoded(30 * i) for i in range(8)]
SEEDS = [
    pickle.dumps((SMALL, LABELS), 2),
    pickle.dumps((SMALL, LABELS), 4),
    python_2(SMALL, LABELS, 0),
    python_2(SMALL, LABELS, 2),
    python_2_arrays(SMALL, LABELS),
    pickle.dumps((SMALL, np.array(LABELS)), 5),
    pickle.dumps(([np.frombuffer(image, dtype=np.uint8) for image in SMALL], [np.bool_(x) for x in LABELS]), 4),
]


def damaged(data: bytes, draw: st.DrawFn) -> bytes:
    """Truncated, with bits flipped, or with bytes removed, inserted or repeated."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("truncate", "flip", "flip", "remove", "insert", "repeat", "overwrite")))
        # Half of the damage is at the ends, where structure is dense.
        place = draw(
            st.one_of(st.integers(0, max(len(content) - 1, 0)), st.integers(0, min(200, max(len(content) - 1, 0))))
        )
        if draw(st.booleans()):
            place = max(len(content) - 1 - place, 0)
        if not content:
            break
        if kind == "truncate":
            del content[place:]
        elif kind == "flip":
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "remove":
            del content[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 200))]
        else:
            content[place : place + 4] = draw(st.binary(min_size=4, max_size=4))
    return bytes(content)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # Python's, of a damaged string
@settings(FUZZ, max_examples=700)
@given(st.data())
def test_damaged_sets(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    path.write_bytes(damaged(data.draw(st.sampled_from(SEEDS)), data.draw))
    check_read(path, lambda: PairBin(path))


@settings(FUZZ, max_examples=150)
@given(st.binary(max_size=300), st.sampled_from((b"", b"\x80\x02", b"\x80\x04\x95")))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.bin"
    path.write_bytes(start + content)
    check_read(path, lambda: PairBin(path))


@settings(FUZZ, max_examples=250)
@given(st.data())
def test_damaged_pair_lists(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    if not root.exists():
        (root / "imgs").mkdir(parents=True)
        for i in range(4):
            (root / "imgs" / f"{i}.png").write_bytes(SMALL[i])
    lines = b"".join(b"%d.png %d.png %d\n" % (i % 4, j % 4, i % 2) for i, j in zip(range(12), range(1, 13)))
    (root / "pair.list").write_bytes(damaged(lines, data.draw))
    check_read(root / "pair.list", lambda: PairList(root / "imgs", root / "pair.list"))
