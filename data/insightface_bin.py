"""Evaluation sets in one file, such as insightface's `lfw.bin`: a pickle of (encoded images, two per pair; labels).

These files come from the internet, and `pickle.load` runs whatever code a file names. Here a restricted unpickler
accepts only the instructions that such files consist of, and replaces the few numpy names in them by inert stand-ins.
No code of the file runs, and memory is bounded by a small multiple of the file's size.

Images stay on disk: a PairBin keeps where they lie, so sending it to another process costs about 20 bytes per image.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.decode import read_bytes
from utils.errors import UserError

_INTEGER_TYPES = ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
_MAX_DIGITS = 200  # of a number written as text
_MAX_DIMS = 64  # of an array, as in numpy
# Between two images lie a few instructions, at most a numpy header.
_MAX_GAP = 1024


class PairBin:
    """The pairs of the evaluation set `path`: pair p consists of the file's images 2·p and 2·p + 1.

    Attributes, for P pairs of U different images (equal bytes are one image):
    path: the file
    flag: the flag that named it, for errors
    num_images: U
    index1, index2: int64 (P,), the image numbers of each pair, in order of first appearance
    is_same: bool (P,)

    Raises UserError, naming the flag and the file, if the file cannot be read, is not a pickle or a damaged one, names
    anything but arrays, or holds anything but images and labels. Images are not decoded here.
    """

    def __init__(self, path: str | os.PathLike[str], *, flag: str = "--bin") -> None:
        self.path, self.flag = os.fspath(path), flag
        data = read_bytes(self.path)
        try:
            images, self.is_same = _images_and_labels(_load(data))
        except _Refused as error:
            raise UserError(f"{flag} {self.path}: {error}") from None

        # Many files repeat an image for each of its pairs: images with equal digests are embedded once. A tiny file can
        # refer to one object millions of times, so each object is hashed once.
        number_of_digest: dict[bytes, int] = {}
        number_of_object: dict[int, int] = {}
        index = np.empty(len(images), dtype=np.int64)
        first: list[int] = []
        starts: list[int] = []
        lengths: list[int] = []
        self._in_memory: dict[int, bytes] = {}
        position = 0
        for i, image in enumerate(images):
            number = number_of_object.get(id(image))
            if number is None:
                start = data.find(image, position, position + len(image) + _MAX_GAP)
                position = start + len(image) if start >= 0 else position
                digest = hashlib.blake2b(image, digest_size=16).digest()
                number = number_of_object[id(image)] = number_of_digest.setdefault(digest, len(number_of_digest))
                if number == len(first):
                    first.append(i)
                    starts.append(start)
                    lengths.append(len(image))
                    if start < 0:  # written as text, as protocols 0 to 2 do: not in the file as it is
                        self._in_memory[number] = image
            index[i] = number
        self.num_images = len(first)
        self.index1, self.index2 = index[0::2].copy(), index[1::2].copy()
        self._first, self._starts, self._lengths = np.array(first), np.array(starts), np.array(lengths)
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self.is_same)

    def image_name(self, i: int) -> str:
        """What errors call image i: its first position in the file's list, from 0."""
        return f"{self.path}, image {self._first[i]}"

    def encoded(self, i: int) -> tuple[bytes, str]:
        """(image i before decoding, its name). Raises UserError if the file has changed."""
        if i in self._in_memory:
            return self._in_memory[i], self.image_name(i)
        length = int(self._lengths[i])
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            # pread, because forked loader workers share the descriptor and its position
            data = os.pread(self._descriptor, length, int(self._starts[i]))
        except OSError as error:
            raise UserError(f"{self.flag} {self.path}: cannot be read ({error.strerror})") from None
        if len(data) < length:
            raise UserError(f"{self.flag} {self.path}: the file has become shorter since it was opened; start again")
        return data, self.image_name(i)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]  # not None: checked by getattr, as __init__ may have failed


# ---------------------------------------------------------------------------------------------------------------------
# What the pickle must hold


def _images_and_labels(content: Any) -> tuple[list[bytes], np.ndarray]:
    """(images, is_same bool (P,)). Raises _Refused. Nothing here recurses: a file may nest lists without end."""
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise _Refused(f"holds {_kind(content)}, not (images, labels)")
    images, labels = content
    if not isinstance(images, (tuple, list)):
        raise _Refused(f"its images are {_kind(images)}, not a list")
    encoded = [_image(image, number) for number, image in enumerate(images)]
    is_same = _labels(labels)
    if len(encoded) != 2 * len(is_same):
        raise _Refused(f"has {len(encoded)} images and {len(is_same)} labels; there must be two images for each label")
    return encoded, is_same


def _image(image: Any, number: int) -> bytes:
    """The bytes of an image: a string, or an array of bytes of any shape."""
    if isinstance(image, _Array):
        if image.numbers(f"image {number}").dtype != np.uint8:
            raise _Refused(f"image {number} is an array of numbers, not of bytes (u1)")
        image = image.data
    if not isinstance(image, bytes):
        raise _Refused(f"image {number} is {_kind(image)}, not bytes")
    return image


def _labels(labels: Any) -> np.ndarray:
    """bool (P,) from a list of bools, of 0 and 1 or of numpy's scalars, or from an array of any integer type."""
    if isinstance(labels, _Array) and len(labels.shape) == 1:
        values = labels.numbers("the array of labels").tolist()
    elif isinstance(labels, (tuple, list)):
        values = [
            label.numbers(f"label {number}").item() if isinstance(label, _Array) and label.shape == () else label
            for number, label in enumerate(labels)
        ]
    else:
        raise _Refused(f"its labels are {_kind(labels)}, not a list")
    for number, value in enumerate(values):
        if not isinstance(value, int) or value not in (0, 1):
            shown = value if isinstance(value, int) and abs(value) < 2**63 else _kind(value)
            raise _Refused(f"label {number} is {shown}, not True, False, 1 or 0")
    return np.array(values, dtype=bool)


def _kind(value: Any) -> str:
    names = {_Array: "an array", _Dtype: "a dtype", str: "text", bytes: "bytes", type(None): "None"}
    return names.get(type(value), f"a {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# The restricted unpickler


class _Refused(Exception):
    """Why a file is not read."""


@dataclass
class _Dtype:
    """Stands in for a numpy dtype."""

    code: str  # such as "u1"
    order: str = "="

    def set_state(self, state: tuple) -> None:
        _, order, *_ = state  # version, byte order, ...
        self.order = _text(order).replace("|", "=")
        if self.order not in ("=", "<", ">"):
            raise ValueError("not a byte order")


@dataclass
class _Array:
    """Stands in for a numpy array, or for a scalar if the shape is (). It is empty until its state is set."""

    dtype: _Dtype | None = None
    shape: tuple[int, ...] = ()
    data: bytes = b""

    def set_state(self, state: tuple) -> None:
        _, shape, dtype, _, data = state  # version, shape, dtype, is Fortran order, data
        self.fill(dtype, shape, data)

    def fill(self, dtype: _Dtype, shape: tuple[int, ...], data: bytes) -> _Array:
        if dtype.code not in _INTEGER_TYPES:
            raise _Refused(f"holds an array of {ascii(dtype.code)[:60]}, not of bytes or integers")
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMS:
            raise ValueError("not a shape")
        if not all(isinstance(size, int) and 0 <= size < 2**63 for size in shape):
            raise ValueError("not a shape")
        self.dtype, self.shape, self.data = dtype, shape, _bytes(data)
        return self

    def numbers(self, name: str) -> np.ndarray:
        """Its elements, one-dimensional. Raises _Refused if the data are not as long as the shape says."""
        if self.dtype is None:
            raise _Refused(f"{name} is an array without data")
        if len(self.data) != math.prod(self.shape) * int(self.dtype.code[1:]):
            raise _Refused(f"{name} has the shape {ascii(self.shape)[:60]} and {len(self.data)} bytes")
        return np.frombuffer(self.data, np.dtype(self.dtype.order + self.dtype.code))


_NDARRAY = object()  # stands in for the class: not callable


def _text(value: Any) -> str:
    """A str, which Python 2 writes as bytes."""
    return value if isinstance(value, str) else _bytes(value).decode("utf-8")


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("not bytes")
    return value


def _stand_ins() -> dict[tuple[str, str], Any]:
    """What replaces the names in a file: numpy's arrays, before and since numpy 2, and how Python 3 writes bytes for 2.

    They refer to no unpickler: a cycle would keep all images in memory until the garbage collector runs.
    """
    encoded: dict[int, tuple[str, bytes]] = {}

    def encode(text: str, encoding: Any) -> bytes:
        """Each text is encoded once, however often the file asks for it."""
        if _text(encoding).lower() not in ("latin1", "latin-1", "iso-8859-1"):
            raise ValueError("not the encoding that bytes are written in")
        if id(text) not in encoded:
            encoded[id(text)] = text, text.encode("latin-1")
        return encoded[id(text)][1]

    def reconstruct(kind: Any, *_: Any) -> _Array:
        if kind is not _NDARRAY:
            raise ValueError("not numpy's ndarray")
        return _Array()

    stand_ins = {
        ("_codecs", "encode"): encode,
        ("numpy", "ndarray"): _NDARRAY,
        ("numpy", "dtype"): lambda code, *_: _Dtype(_text(code)),
    }
    for core in ("numpy.core", "numpy._core"):
        stand_ins[f"{core}.multiarray", "_reconstruct"] = reconstruct
        stand_ins[f"{core}.multiarray", "scalar"] = lambda dtype, data: _Array().fill(dtype, (), data)
        stand_ins[f"{core}.numeric", "_frombuffer"] = lambda data, dtype, shape, _: _Array().fill(dtype, shape, data)
    return stand_ins


_PythonUnpickler: Any = pickle._Unpickler  # Any: its attributes have no types


class _Instructions(dict[int, Callable[["_Unpickler"], None]]):
    """What the unpickler does by instruction; refuses all others."""

    def __missing__(self, code: int) -> Callable[[_Unpickler], None]:
        raise _Refused(f"has the pickle instruction {bytes([code])!r}, which evaluation sets do not contain: the file "
                       "is damaged or holds something else, and was not loaded")


class _Unpickler(_PythonUnpickler):
    """The pickle -> numbers, strings, lists and tuples of Python, _Array, _Dtype. Raises _Refused, or almost anything.

    This is Python's own unpickler in Python, not the one in C: that one allocates whatever memo index or length a file
    claims (in Python 3.11 ten bytes make it take 16 GiB), and cannot leave out instructions.
    """

    # All that files of evaluation sets contain. Sets, dicts, objects, persistent ids and extension codes are missing.
    dispatch = _Instructions({
        code[0]: _PythonUnpickler.dispatch[code[0]]
        for code in (
            pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
            pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING,
            pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8, pickle.UNICODE, pickle.BINUNICODE,
            pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.MARK, pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND,
            pickle.APPENDS, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.GET,
            pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
            pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE,
        )
    })

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._stand_ins = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._stand_ins[module, name]
        except KeyError:
            raise _Refused(f"names {ascii(f'{module}.{name}')[:80]}, which evaluation sets do not contain: it may hold "
                           "code and was not loaded; get it from a source that you trust") from None

    def load_bytearray8(self) -> None:
        """As bytes. The inherited method first allocates the length that the file claims."""
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_integer(self) -> None:
        """A number as text. Parsing takes quadratic time."""
        line = self.readline()[:-1]
        if len(line) > _MAX_DIGITS:
            raise ValueError("too many digits")
        self.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.removesuffix(b"L")))

    def load_build(self) -> None:
        """Only stand-ins have a state."""
        state = self.stack.pop()
        self.stack[-1].set_state(state)

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.READONLY_BUFFER[0]] = lambda self: None
    dispatch[pickle.INT[0]] = dispatch[pickle.LONG[0]] = load_integer
    dispatch[pickle.BUILD[0]] = load_build


def _load(data: bytes) -> Any:
    """What the pickle holds. Raises _Refused."""
    if data[0] not in _Unpickler.dispatch:
        raise _Refused("is not an evaluation set: it is not a pickle")
    try:
        return _Unpickler(data).load()
    except _Refused:
        raise
    except Exception as error:  # the unpickler raises exceptions of almost any type for damaged data
        reason = ascii(str(error))[1:-1][:80] or type(error).__name__
        raise _Refused(f"is a damaged pickle, or a truncated one ({reason}); download or pack it again") from None
