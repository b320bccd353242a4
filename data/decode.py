"""An encoded 112x112 face image -> uint8 pixels. `name` is what errors call the image: a path, or a record of a file.

read_photo is for images of other sizes, before they are aligned.

Pillow decides what an image is (decode_image). The loader uses decode_into, which decodes most JPEGs with torchvision's
operator: the same pixels at 1.8 times the speed (11,000 images/s on one core). Pillow decodes whatever the operator
refuses, and everything if there is no operator. torchvision's Python functions for it are deprecated since 0.29.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features

from utils.errors import UserError

IMAGE_SIZE = 112
# Without a list Pillow tries every plugin it has on an unknown file, among them one that starts Ghostscript. It may be
# too old for AVIF.
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000",
                   *(["AVIF"] if "avif" in features.modules else []))
_TIFF_TILE_SIZE = (322, 323)  # the tags of a tile's width and length

# Pillow warns about large dimensions, and raises an error for larger ones: check_encoded refuses both before they are
# decoded.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_READ_BYTES = 64 * 1024  # more than nearly every face crop has
MAX_IMAGE_BYTES = 2**24  # far more than an image of 112x112 has, with all its metadata
MAX_PHOTO_BYTES, MAX_PHOTO_PIXELS = 2**28, 2**27  # more than any camera makes; the pixels take 400 MB
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_HEADER_BYTES = 4096  # one disk page holds the frame header of nearly every face crop

# Start-of-frame markers of JPEG: 0xC0 to 0xCF without DHT (0xC4), JPG (0xC8) and DAC (0xCC).
JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# No length follows these. Whoever takes what follows for one finds other dimensions than libjpeg does.
JPEG_BARE_MARKERS = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def read_image(path: str | os.PathLike[str]) -> torch.Tensor:
    """`decode_image` of a file. Also raises UserError if it cannot be read."""
    path = os.fspath(path)
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, name: str) -> torch.Tensor:
    """The image's RGB pixels: uint8 (3, 112, 112).

    JPEG, PNG, BMP, WebP, GIF (its first frame), TIFF, PPM, JPEG 2000 and AVIF. Gray, palette and CMYK images are
    converted, transparency is dropped, and 16-bit values keep their high byte. Raises UserError, naming the image, if
    it is not an image, damaged, truncated, of 32-bit values, or not 112x112.
    """
    frame = _jpeg_frame(data)
    check_encoded(data, name)
    try:
        if frame is not None and frame[2] == 3:
            # The codec that Image.open would choose, without its Python header parser: 4,400 images/s instead of 3,200.
            image = Image.frombytes("RGB", frame[:2], data, "jpeg", "RGB", "")
        else:
            image = _decode_any(data)
    except Exception as error:  # Pillow raises many types for damaged data: OSError, SyntaxError, zlib.error, ...
        raise UserError(f"{name}: the image is damaged or truncated ({_one_line(error)})") from None
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def read_photo(path: str | os.PathLike[str], *, exif: bool = True) -> np.ndarray:
    """The RGB pixels of an image file of any size: uint8 (H, W, 3).

    Formats and conversions are decode_image's. exif: turn a JPEG, WebP or AVIF as its EXIF orientation says, as viewers
    and OpenCV's imread do; Pillow always turns TIFF. Raises UserError, naming the file, as decode_image, and for
    an image of more than MAX_PHOTO_PIXELS or MAX_PHOTO_BYTES.
    """
    path = os.fspath(path)
    data = read_bytes(path, at_most=MAX_PHOTO_BYTES)
    width, height = _size_of_image(data, path)
    if width * height > MAX_PHOTO_PIXELS:
        raise UserError(f"{path}: the image is {width}x{height}, and should have {MAX_PHOTO_PIXELS:,} pixels at most")
    try:
        image = _decode_any(data)
    except Exception as error:  # see decode_image
        raise UserError(f"{path}: the image is damaged or truncated ({_one_line(error)})") from None
    if exif:
        with contextlib.suppress(Exception):  # damaged EXIF data raise many types too: the pixels are as they are
            image = ImageOps.exif_transpose(image)
    return np.array(image)


def decode_into(data: bytes, name: str, pixels: torch.Tensor) -> None:
    """Write decode_image's pixels to `pixels`: uint8 (3, 112, 112), fastest if the channels are next to each other.

    libjpeg writes a line to file descriptor 2 if JPEG data is damaged but can be decoded to the end.
    """
    decode = jpeg_operator()
    if decode is not None and _jpeg_frame(data) == (IMAGE_SIZE, IMAGE_SIZE, 3):
        try:
            pixels.copy_(decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB, False))
            return
        except RuntimeError:
            pass  # decode_image reports what is wrong
    pixels.copy_(decode_image(data, name))


@functools.cache
def jpeg_operator() -> Callable[[torch.Tensor, int, bool], torch.Tensor] | None:
    """torchvision's JPEG operator: (uint8 (bytes,), mode, apply Exif orientation) -> uint8 (3, h, w). None without it.

    Only its library is loaded. Importing the package takes as long as importing torch.
    """
    package = importlib.util.find_spec("torchvision")
    for directory in (package.submodule_search_locations or ()) if package else ():
        for library in ("image_stable.so", "image.so"):  # since torchvision 0.29, and before
            try:
                torch.ops.load_library(os.path.join(directory, library))
                return torch.ops.image.decode_jpeg
            except (OSError, AttributeError):
                continue
    return None


@contextlib.contextmanager
def codec_messages(messages: list[str]) -> Iterator[None]:
    """Append what libraries write to file descriptor 2 in the block to `messages`, in one line, instead of showing it.

    For processes with one thread: the descriptor is that of all threads.
    """
    with open(os.memfd_create("codec-messages"), "r+b") as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        if text := file.read():
            messages.append(" ".join(text.decode(errors="replace").split()))


def _open(data: bytes) -> Image.Image:
    """Reads the header only."""
    image = Image.open(io.BytesIO(_without_metadata(data)), formats=_PILLOW_FORMATS)
    if image.format == "TIFF" and max(image.tag_v2.get(tag, 0) for tag in _TIFF_TILE_SIZE) > 1024:  # type: ignore[attr-defined]
        raise ValueError("tiles much larger than the image")  # a few kilobytes would take gigabytes of memory
    return image


def _without_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that do not make its pixels: texts and profiles inflate to a thousand times their size.

    Other data as they are.
    """
    if not data.startswith(_PNG_MAGIC):
        return data
    kept, at = [_PNG_MAGIC], len(_PNG_MAGIC)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, type, as many bytes, checksum
        if data[at + 4 : at + 5].isupper():  # a critical chunk
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _decode_any(data: bytes) -> Image.Image:
    """RGB. Raises almost anything for damaged data."""
    image = _open(data)
    if image.format == "PNG":  # its checksums are checked by verify alone, after which an image cannot be used
        image.verify()
        image = _open(data)
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM: 16 bits too
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit values, which have no known range")
    elif image.mode == "P":  # through RGBA, because Pillow warns if there is transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def check_header(path: str) -> None:
    """Raise read_image's UserError if the file's first bytes show: unreadable, empty, not an image, wrong size."""
    data = read_bytes(path, _HEADER_BYTES)
    check_encoded(data if _jpeg_frame(data) else read_bytes(path), path)


def check_encoded(data: bytes, name: str) -> None:
    """Raise decode_image's UserError if the image's header shows: not an image, wrong size."""
    width, height = _size_of_image(data, name)
    if (width, height) != (IMAGE_SIZE, IMAGE_SIZE):
        size = f"{IMAGE_SIZE}x{IMAGE_SIZE}"
        raise UserError(f"{name}: the image is {width}x{height}, not {size}; align and resize to {size} first")


def _size_of_image(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) from the header. Raises UserError."""
    frame = _jpeg_frame(data)
    try:
        return frame[:2] if frame else _open(data).size
    except Exception as error:
        # For an unknown format Pillow's message only names a BytesIO object.
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({_one_line(error)})"
        known = ", ".join(_PILLOW_FORMATS[:-1]) + " or " + _PILLOW_FORMATS[-1]
        raise UserError(f"{name}: not a {known} image, or its header is damaged{reason}") from None


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(width, height, components) from a JPEG's frame header; None if `data` is not a JPEG or ends before it."""
    if not data.startswith(_JPEG_MAGIC):
        return None
    position = 2
    while position + 9 < len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in JPEG_BARE_MARKERS:
            return None
        elif marker in JPEG_FRAME_MARKERS:
            height = data[position + 5] << 8 | data[position + 6]
            width = data[position + 7] << 8 | data[position + 8]
            return width, height, data[position + 9]
        else:
            position += 2 + (data[position + 2] << 8 | data[position + 3])
    return None


def read_bytes(path: str, limit: int | None = None, *, at_most: int = MAX_IMAGE_BYTES) -> bytes:
    """The file's bytes, or its first `limit`.

    Raises UserError if it cannot be read, is empty, is no regular file, or has more than `at_most` bytes.
    """
    # Not open(), whose file object takes half of the time. O_NONBLOCK: a pipe would wait for somebody who writes to it.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            first = limit or _READ_BYTES
            data = os.read(descriptor, first)
            if not data or len(data) == first:  # else these are all the bytes of a file
                size = _size(descriptor, path, at_most)
                # os.read gives 2 GiB at most.
                while limit is None and (more := os.read(descriptor, max(size - len(data), 0))):
                    data += more
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not data:
        raise UserError(f"{path}: the file is empty")
    return data


def _size(descriptor: int, path: str, at_most: int) -> int:
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        raise UserError(f"{path}: cannot be read (it is a device or a pipe, not a file)")
    if state.st_size > at_most:
        raise UserError(f"{path}: has {state.st_size:,} bytes, and should have {at_most:,} at most")
    return state.st_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
