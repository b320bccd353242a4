import io
import os
import pickle
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import JPEG_KINDS, REAL_FACES, encode, make_folder, smooth_image, smooth_pixels, touch
from PIL import Image

from data.decode import decode_image, decode_into, read_bytes, read_image
from data.folder import IMAGE_EXTENSIONS, FaceFolder
from utils.errors import UserError

# read_image


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 40_000_000])
def test_read_bytes_of_any_size(tmp_path, monkeypatch, size):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    calls, read = [], os.read
    monkeypatch.setattr("data.decode.os.read", lambda *arguments: calls.append(1) or read(*arguments))
    assert read_bytes(str(tmp_path / "file"), at_most=10**9) == data
    assert len(calls) <= 5  # a .bin in pieces of the size of a face would take minutes
    assert read_bytes(str(tmp_path / "file"), 10, at_most=10**9) == data[:10]


@pytest.mark.parametrize("format, extension", [
    ("PNG", "png"), ("BMP", "bmp"), ("WEBP", "webp"), ("TIFF", "tif"), ("PPM", "ppm"), ("JPEG2000", "jp2")])
def test_lossless_formats_give_the_exact_pixels(tmp_path, format, extension):
    path = tmp_path / f"face.{extension}"
    path.write_bytes(encode(smooth_image(), format, **({"lossless": True} if format == "WEBP" else {})))
    image = read_image(path)
    assert image.shape == (3, 112, 112) and image.dtype == torch.uint8 and image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0), smooth_pixels())


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_jpeg_gives_what_pillow_gives(tmp_path, kind):
    path = tmp_path / "face.jpg"
    path.write_bytes(JPEG_KINDS[kind]())
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(read_image(path).permute(1, 2, 0), expected)


def decoded_into(data: bytes) -> torch.Tensor:
    pixels = torch.empty(112, 112, 3, dtype=torch.uint8).permute(2, 0, 1)
    decode_into(data, "face", pixels)
    return pixels


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_the_loaders_decoder_gives_the_same_pixels(kind):
    data = JPEG_KINDS[kind]()
    assert torch.equal(decoded_into(data), decode_image(data, "face"))


def test_the_loaders_decoder_with_other_formats_and_colours():
    for image, format in (
        (smooth_image(), "PNG"),
        (smooth_image().convert("L"), "JPEG"),
        (smooth_image().convert("CMYK"), "JPEG"),
    ):
        data = encode(image, format)
        assert torch.equal(decoded_into(data), decode_image(data, "face"))


@pytest.mark.slow
def test_the_loaders_decoder_on_damaged_data(capfd):
    """The same pixels or the same error as decode_image."""
    rng = np.random.default_rng(0)
    whole = encode(smooth_image(), "JPEG")
    outcomes = []
    for case in range(600):
        data = bytearray(whole)
        if case % 3 == 0:
            del data[rng.integers(1, len(data)):]
        elif case % 3 == 1:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        else:
            position = rng.integers(500, len(data))
            data[position:position] = rng.bytes(20)
        try:
            expected = decode_image(bytes(data), "face")
        except UserError as error:
            with pytest.raises(UserError) as caught:
                decoded_into(bytes(data))
            assert str(caught.value) == str(error)
            outcomes.append("error")
        else:
            assert torch.equal(decoded_into(bytes(data)), expected)
            outcomes.append("image")
    assert min(outcomes.count("error"), outcomes.count("image")) > 150
    capfd.readouterr()  # libjpeg's messages


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP"])
def test_gray_becomes_three_equal_channels(tmp_path, format):
    path = tmp_path / "gray"
    path.write_bytes(encode(smooth_image().convert("L"), format, **({"quality": 95} if format == "JPEG" else {})))
    image = read_image(path)
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    assert np.abs(image[0].numpy().astype(int) - np.asarray(smooth_image().convert("L"))).max() <= 8


def test_other_modes_become_rgb(tmp_path):
    rgb = smooth_image()
    opaque_rgba = rgb.convert("RGBA")
    opaque_rgba.putalpha(10)  # nearly transparent: dropped, not blended
    sixteen_bits = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 256 + 77)
    palette = rgb.convert("P")
    cases = {
        "rgba": (encode(opaque_rgba, "PNG"), rgb),
        "gray and alpha": (encode(rgb.convert("LA"), "PNG"), rgb.convert("L").convert("RGB")),
        "palette": (encode(palette, "PNG"), palette.convert("RGB")),
        "palette with transparency": (encode(palette, "PNG", transparency=bytes(range(256))), palette.convert("RGB")),
        "black and white": (encode(rgb.convert("1"), "PNG"), rgb.convert("1").convert("RGB")),
        "16-bit gray": (encode(sixteen_bits, "PNG"), rgb.convert("L").convert("RGB")),
        "16-bit gray PPM": (encode(sixteen_bits, "PPM"), rgb.convert("L").convert("RGB")),
        "16-bit gray TIFF": (encode(sixteen_bits, "TIFF"), rgb.convert("L").convert("RGB")),
        "GIF": (gif := encode(rgb, "GIF"), Image.open(io.BytesIO(gif)).convert("RGB")),
    }
    for kind, (data, expected) in cases.items():
        path = tmp_path / f"{kind}.png"
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = read_image(path)
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(expected)), kind


def test_a_tiff_of_tiles(tmp_path):
    assert not decode_image(tiff_of_one_tile(112), "face").any()


def test_cmyk_jpeg_has_the_right_colours(tmp_path):
    path = tmp_path / "cmyk.jpg"
    path.write_bytes(encode(smooth_image().convert("CMYK"), "JPEG", quality=98))
    assert np.abs(read_image(path).permute(1, 2, 0).numpy().astype(int) - smooth_pixels()).mean() < 4


def tiff_of_one_tile(size: int) -> bytes:
    """Gray, 112x112, in one tile of zeros: of another size, and compressed, it would take that memory."""
    data = zlib.compress(bytes(112 * 112))
    tags = {256: 112, 257: 112, 258: 8, 259: 8, 262: 1, 277: 1, 322: size, 323: size, 324: 134, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "text": (b"these are not the pixels you are looking for\n" * 50, "not a JPEG, PNG, BMP, WEBP"),
    "jpeg start only": (b"\xff\xd8\xff\xe0", "not a JPEG, PNG, BMP, WEBP"),
    "jpeg without frame": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(300), "not a JPEG, PNG, BMP, WEBP"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 112 112\n", "not a JPEG, PNG, BMP, WEBP"),
    "icon": (encode(smooth_image(size=64), "ICO"), "not a JPEG, PNG, BMP, WEBP"),
    "jpeg 250": (encode(smooth_image(size=250), "JPEG"), "the image is 250x250, not 112x112; align and resize"),
    "32 bits": (encode(smooth_image().convert("F"), "TIFF"), "the image is damaged or truncated (32-bit values"),
    "tiles of 1 GB": (tiff_of_one_tile(1 << 15), "not a JPEG"),
    "gray jpeg 64": (encode(smooth_image(size=64).convert("L"), "JPEG"), "the image is 64x64, not 112x112"),
    "png 113": (encode(smooth_image(size=113), "PNG"), "the image is 113x113, not 112x112"),
    "jpeg 112x96": (encode(smooth_image().crop((0, 0, 112, 96)), "JPEG"), "the image is 112x96, not 112x112"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_give_one_line_that_names_them(tmp_path, kind):
    path = tmp_path / "bad.jpg"
    data, expected = BAD_FILES[kind]
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value).startswith(f"{path}: {expected}") and "\n" not in str(caught.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere.jpg: cannot be read .No such file or directory"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        read_image(tmp_path)


TRUNCATED_KINDS = {
    "baseline jpeg": lambda: encode(smooth_image(), "JPEG"),
    "progressive jpeg": lambda: encode(smooth_image(), "JPEG", progressive=True),
    "gray jpeg": lambda: encode(smooth_image().convert("L"), "JPEG"),
    "bmp": lambda: encode(smooth_image(), "BMP"),
    "webp": lambda: encode(smooth_image(), "WEBP"),
    "png": lambda: encode(smooth_image(), "PNG"),
}


@pytest.mark.parametrize("kind", TRUNCATED_KINDS)
def test_truncated_files_are_errors_not_half_an_image(tmp_path, kind):
    path = tmp_path / "cut"
    data = TRUNCATED_KINDS[kind]()
    path.write_bytes(data)
    whole = read_image(path)
    for keep in [*range(1, len(data), max(len(data) // 40, 1)), *range(len(data) - 64, len(data))]:
        path.write_bytes(data[:keep])
        try:
            image = read_image(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # the checksum of a PNG's end mark, which has no content
            assert kind == "png" and len(data) - keep <= 4 and torch.equal(image, whole), keep


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_zeros_in_place_of_the_second_half_are_an_error(tmp_path, format):
    path = tmp_path / "zeros"
    data = encode(smooth_image(), format)
    path.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
    with pytest.raises(UserError, match="damaged"):
        read_image(path)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP"])
def test_random_damage_gives_an_image_or_a_user_error(tmp_path, format):
    path = tmp_path / "damaged"
    data = encode(smooth_image(), format)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, min(len(data), 2000), 4):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header that claims gigapixels makes Pillow warn
            try:
                assert read_image(path).shape == (3, 112, 112)
            except UserError as error:
                assert "\n" not in str(error)


# FaceFolder


def test_labels_follow_sorted_identity_names(tmp_path):
    make_folder(tmp_path, {"b": 2, "a": 3, "Z": 1})
    folder = FaceFolder(tmp_path)
    assert folder.root == str(tmp_path)
    assert folder.identities == ["Z", "a", "b"]
    assert len(folder) == 6
    assert folder.labels.dtype == np.int64 and folder.labels.tolist() == [0, 1, 1, 1, 2, 2]
    names = ["Z/000.jpg", "a/000.jpg", "a/001.jpg", "a/002.jpg", "b/000.jpg", "b/001.jpg"]
    assert [folder.path(i) for i in range(6)] == [f"{tmp_path}/{name}" for name in names]
    image, label = folder[3]
    assert label == 1 and isinstance(label, int) and torch.equal(image, read_image(tmp_path / "a/002.jpg"))
    with pytest.raises(IndexError):
        folder[6]


def test_train_directory_is_used_if_there_is_one(tmp_path):
    make_folder(tmp_path / "train", {"a": 1, "b": 1})
    make_folder(tmp_path / "lfw", {"c": 1})
    folder = FaceFolder(str(tmp_path))
    assert folder.root == str(tmp_path / "train") and folder.identities == ["a", "b"]
    assert FaceFolder(tmp_path / "train").identities == ["a", "b"]


def test_what_is_ignored(tmp_path):
    kept = [f"a/{k}{extension}" for k, extension in enumerate(IMAGE_EXTENSIONS)] + ["b/X.JPG", "b/y.Png"]
    ignored = ["a/.hidden.jpg", "a/notes.txt", "a/noextension", "a/.jpg", ".cache/1.jpg", "empty/readme.md", "top.jpg"]
    for name in kept + ignored:
        touch(tmp_path / name)
    (tmp_path / "a" / "directory.jpg").mkdir()
    (tmp_path / "nothing").mkdir()
    folder = FaceFolder(tmp_path)
    assert folder.identities == ["a", "b"]
    assert [folder.path(i) for i in range(len(folder))] == [f"{tmp_path}/{name}" for name in sorted(kept)]


@pytest.mark.parametrize("index", ["none", "auto"])
def test_what_is_not_used_is_told_at_every_start(tmp_path, capsys, index):
    make_folder(tmp_path, {"b": 1, "d": 1})
    for name in ("1.jpg", "2.JPG", "readme.txt", "a/1.heic", "a/2.HEIC", "b/noextension", "b/2019/1.tif",
                 "b/2019/2.tif", "c/1.jpg/readme.txt", "c/Thumbs.db", "b/.DS_Store", "b/boxes.txt", "d/.hidden/1.jpg"):
        touch(tmp_path / name)
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    told = set()
    for _ in range(2):
        folder = FaceFolder(tmp_path, index=index, progress=True)
        assert folder.identities == ["b", "d"] and len(folder) == 2
        told.add(capsys.readouterr().err)
    assert told == {f"warning: {tmp_path}: not used: files of other kinds: 2 .heic, 1 without extension; 2 images one "
                    f"directory deeper, such as below {tmp_path}/b; 2 images in {tmp_path} itself; 2 "
                    "sub-directories without an image, which get no label: a, c\n"}
    with pytest.raises(UserError, match="no images in its 1 sub-dir.*; found: files of other kinds: 1 .heic; 1"):
        touch(tmp_path / "other" / "a" / "1.heic")
        FaceFolder(tmp_path / "other")
    assert FaceFolder(make_folder(tmp_path / "clean", {"a": 1}), progress=True).identities == ["a"]
    assert capsys.readouterr().err == ""


def test_an_identity_called_train(tmp_path, capsys):
    make_folder(tmp_path / "names", {"anna": 1, "train": 2})
    assert FaceFolder(tmp_path / "names", progress=True).identities == ["anna", "train"]
    assert "names/train holds images and no sub-directories: it is an identity" in capsys.readouterr().err
    make_folder(tmp_path / "both" / "train", {"a": 1})
    make_folder(tmp_path / "both", {"anna": 1, "val": 0})
    assert FaceFolder(tmp_path / "both", progress=True).identities == ["a"]
    assert "the training set is " in (told := capsys.readouterr().err) and "both/anna are not used" in told


def test_links_are_followed(tmp_path):
    make_folder(tmp_path / "elsewhere", {"a": 2})
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "train" / "own").mkdir()
    (tmp_path / "train" / "own" / "1.jpg").symlink_to(tmp_path / "elsewhere" / "a" / "000.jpg")
    folder = FaceFolder(tmp_path)
    assert folder.identities == ["linked", "own"] and folder.labels.tolist() == [0, 0, 1]
    assert folder.check_headers(skip_bad=False, progress=False) == 0
    assert torch.equal(folder[2][0], folder[0][0])


def test_a_linked_train_directory_and_a_broken_link_to_an_image(tmp_path):
    make_folder(tmp_path / "elsewhere", {"a": 2})
    (tmp_path / "elsewhere" / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    folder = FaceFolder(tmp_path / "data")
    assert len(folder) == 3
    with pytest.raises(UserError, match="gone.jpg: cannot be read .No such file"):
        folder.check_headers(skip_bad=False, progress=False)


def test_unusual_file_names(tmp_path):
    names = ["with space.jpg", "Gökçe.jpg", "line\nbreak.jpg", "x" * 240 + ".jpg", os.fsdecode(b"\xff\xfe.jpg")]
    for name in names:
        touch(tmp_path / "Zoë 1" / name)
    folder = FaceFolder(tmp_path)
    assert [folder.path(i) for i in range(len(names))] == [f"{tmp_path}/Zoë 1/{name}" for name in sorted(names)]


def test_wrong_directories(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        FaceFolder(tmp_path / "nowhere")
    touch(tmp_path / "flat" / "1.jpg")
    with pytest.raises(UserError, match="flat: has no sub-directories; .* its 1 images lie in it directly"):
        FaceFolder(tmp_path / "flat")
    with pytest.raises(UserError, match="1.jpg: is a file; give a directory"):
        FaceFolder(tmp_path / "flat" / "1.jpg")
    for root, images in (("deep", "deep/images"), ("deeper", "deeper/data/images")):
        touch(tmp_path / images / "a" / "1.jpg")
        with pytest.raises(UserError, match=f"{root}: no images in its 1 sub-dir.*: give {tmp_path}/{images}$"):
            FaceFolder(tmp_path / root)


def test_a_link_that_leads_to_itself(tmp_path):
    make_folder(tmp_path, {"a": 1})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop: cannot be read"):
        FaceFolder(tmp_path)


def test_the_object_is_small_and_survives_pickling(tmp_path):
    for identity in range(20):
        for k in range(100):
            touch(tmp_path / f"identity-{identity:02d}" / f"{k:06d}.jpg")
    folder = FaceFolder(tmp_path)
    data = pickle.dumps(folder)
    assert len(data) < 2000 * (10 + 5) + 2000  # the names, 5 bytes beside each, and little more
    copy = pickle.loads(data)
    assert copy.identities == folder.identities and np.array_equal(copy.labels, folder.labels)
    assert [copy.path(i) for i in range(2000)] == [folder.path(i) for i in range(2000)]


# check_headers


def add_bad_files(root: Path) -> list[str]:
    """Seven files that a header tells; in the order of the folder."""
    (root / "a" / "empty.jpg").touch()
    (root / "a" / "text.jpg").write_text("hello " * 100)
    smooth_image(size=100).save(root / "b" / "small.png")
    smooth_image(size=128).save(root / "b" / "wide.jpg")
    (root / "c").mkdir()
    (root / "c" / "gone.jpg").symlink_to(root / "nowhere")
    (root / "c" / "header.png").write_bytes(encode(smooth_image(), "PNG")[:20])
    (root / "c" / "text.webp").write_text("RIFF")
    return ["a/empty.jpg", "a/text.jpg", "b/small.png", "b/wide.jpg", "c/gone.jpg", "c/header.png", "c/text.webp"]


def test_good_folder_passes_the_header_check(tmp_path, capsys):
    make_folder(tmp_path, {"a": 2, "b": 1})
    for name, data in (("gray.jpg", JPEG_KINDS["big comment first"]()), ("1.png", encode(smooth_image(), "PNG"))):
        (tmp_path / "b" / name).write_bytes(data)
    (tmp_path / "b" / "named.jpg").write_bytes(encode(smooth_image(), "WEBP"))  # the content counts, not the name
    folder = FaceFolder(tmp_path)
    assert folder.check_headers(skip_bad=False, progress=True) == 0
    assert len(folder) == 6 and capsys.readouterr() == ("", "")


def test_bad_headers_are_an_error(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2, "d": 1})
    bad = add_bad_files(tmp_path)
    folder = FaceFolder(tmp_path)
    with pytest.raises(UserError) as caught:
        folder.check_headers(skip_bad=False, progress=False)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/{bad[0]}: the file is empty")
    assert "7 of 12 images are bad" in message and "--skip-bad-images" in message and "\n" not in message


def test_bad_headers_are_dropped_on_request_and_labels_stay(tmp_path, capsys):
    make_folder(tmp_path, {"a": 2, "b": 2, "d": 1})
    add_bad_files(tmp_path)
    folder = FaceFolder(tmp_path)
    assert folder.identities == ["a", "b", "c", "d"] and not folder.skip_bad
    assert folder.check_headers(skip_bad=True, progress=True) == 7
    assert folder.skip_bad
    assert folder.identities == ["a", "b", "c", "d"]
    assert folder.labels.tolist() == [0, 0, 1, 1, 3]
    kept = ["a/000.jpg", "a/001.jpg", "b/000.jpg", "b/001.jpg", "d/000.jpg"]
    assert [folder.path(i) for i in range(5)] == [f"{tmp_path}/{name}" for name in kept]
    assert all(image.shape == (3, 112, 112) for image, _ in folder)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "7 of 12 images are bad and skipped" in err and "a/empty.jpg" in err and "labels: 1" in err
    assert folder.check_headers(skip_bad=True, progress=True) == 0
    assert FaceFolder(tmp_path).check_headers(skip_bad=True, progress=False) == 7
    assert capsys.readouterr() == ("", "")


def test_a_folder_of_bad_files_only(tmp_path):
    touch(tmp_path / "a" / "1.jpg")
    with pytest.raises(UserError, match="1 of 1 images is bad; --skip-bad-images"):
        FaceFolder(tmp_path).check_headers(skip_bad=False, progress=False)
    with pytest.raises(UserError, match="no image can be used.*1.jpg: the file is empty"):
        FaceFolder(tmp_path).check_headers(skip_bad=True, progress=False)


@pytest.mark.parametrize("waiting_ratio", [-1, float("inf")], ids=["threads", "loop"])
def test_first_bad_file_is_named_and_all_are_counted_over_many_chunks(tmp_path, monkeypatch, waiting_ratio):
    monkeypatch.setattr("data.folder._CHUNK", 7)
    monkeypatch.setattr("data.folder._WAITING_RATIO", waiting_ratio)
    make_folder(tmp_path, {"a": 30, "b": 30})
    for name in ("a/017.jpg", "a/018.jpg", "b/000.jpg", "b/029.jpg"):
        (tmp_path / name).write_bytes(b"")
    folder = FaceFolder(tmp_path)
    with pytest.raises(UserError, match="a/017.jpg: .*4 of 60 images are bad"):
        folder.check_headers(skip_bad=False, progress=False)
    assert folder.check_headers(skip_bad=True, progress=False) == 4
    assert len(folder) == 56 and len({folder.path(i) for i in range(56)}) == 56


# Real faces


@pytest.mark.skipif(not REAL_FACES, reason="ARCFACE_REAL_FACES names no folder of aligned faces")
def test_real_faces_are_checked_fast_and_decode_as_pillow_does():
    folder = FaceFolder(REAL_FACES)
    started = time.perf_counter()
    assert folder.check_headers(skip_bad=False, progress=False) == 0
    seconds = time.perf_counter() - started
    print(f"\n{len(folder) / seconds:,.0f} headers/s")
    assert seconds < 2 + len(folder) / 5000
    started = time.perf_counter()
    sample = range(0, len(folder), max(len(folder) // 500, 1))
    images = [folder[i][0] for i in sample]
    print(f"{len(images) / (time.perf_counter() - started):,.0f} images/s decoded")
    for i, image in zip(sample, images):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(folder.path(i)).convert("RGB")))


def test_a_list_of_images_that_is_truncated_in_use_is_an_error(tmp_path):
    make_folder(tmp_path / "data", {"a": 2, "b": 2})
    index = tmp_path / "index"
    FaceFolder(tmp_path / "data", index=index)
    folder = FaceFolder(tmp_path / "data", index=index)
    os.truncate(index, 100)  # what is left of the page that is mapped reads as zeros
    with pytest.raises(UserError, match="was truncated; start the run again"):
        folder.path(0)
