"""Evaluation sets in one file, such as insightface's `lfw.bin`: a pickle of (encoded images, two per pair; labels).

These files come from the internet, and `pickle.load` runs whatever code a file names. Here a restricted unpickler
accepts only the instructions that such files consist of, and replaces the few names in them by inert stand-ins.
No code of the file runs, and memory is bounded by a small multiple of the file's size.

Images stay on disk: a PairBin keeps where they lie, so sending it to another process costs about 20 bytes per image.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import reprlib
from typing import Any

import numpy as np

from data.decode import read_bytes
from utils.errors import UserError

_MAX_BYTES = 2**31  # the published sets have up to 200 MB
# Between two images lie a few instructions, at most a numpy header.
_MAX_GAP = 1024

# All that files of evaluation sets contain. Sets, dicts, objects, persistent ids and extension codes are missing.
_INSTRUCTIONS = """
    PROTO FRAME STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING SHORT_BINSTRING
    BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 MARK EMPTY_LIST LIST APPEND
    APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL
    STACK_GLOBAL REDUCE BUILD
""".split()

# What stands for numpy's arrays in a file, before and since numpy 2, and for bytes that Python 3 wrote for Python 2.
_NAMES = {("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"{core}.{module}", name) for core in ("numpy.core", "numpy._core")
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
}


class PairBin:
    """The pairs of the evaluation set `path`: pair p consists of the file's images 2·p and 2·p + 1.

    Attributes, for P pairs of U different images (equal bytes are one image):
    path: the file
    flag: the flag that named it, for errors
    num_images: U
    index1, index2: int64 (P,), the image numbers of each pair, in order of first appearance
    is_same: bool (P,)
    skipped: 0

    Raises UserError, naming the flag and the file, if the file cannot be read, is not a pickle or a damaged one, names
    anything but arrays, or holds anything but images and labels. Images are not decoded here.
    """

    def __init__(self, path: str | os.PathLike[str], *, flag: str = "--bin") -> None:
        self.path, self.flag, self.skipped = os.fspath(path), flag, 0
        data = read_bytes(self.path, at_most=_MAX_BYTES)
        try:
            images, self.is_same = _images_and_labels(_Unpickler(data).load())
        except Exception as error:  # the unpickler raises exceptions of almost any type for damaged data
            reason = str(error) if isinstance(error, _Refused) else (
                "is not an evaluation set, or a damaged or truncated one: it was not loaded; download or pack it again "
                f"({ascii(f'{type(error).__name__}: {error}')[1:-1][:80]})")
            if not isinstance(error, _Refused) and data.isascii() and min(data) >= ord("\t"):
                reason = f"is text; give a list of pairs with {'--val-pairs' if flag == '--val-bin' else '--pair-list'}"
            raise UserError(f"{flag} {self.path}: {reason}") from None

        # Many files repeat an image for each of its pairs: equal images are embedded once. A tiny file can refer to one
        # object millions of times, so each object is searched once. bytes keep their hash.
        numbers: dict[bytes, int] = {}
        starts: list[int] = []
        position = 0
        for image in {id(image): image for image in images}.values():
            start = data.find(image, position, position + len(image) + _MAX_GAP)
            if start >= 0:
                position = start + len(image)
            if numbers.setdefault(image, len(starts)) == len(starts):
                starts.append(start)
        index = np.array([numbers[image] for image in images], dtype=np.int64)
        self.num_images = len(numbers)
        self.index1, self.index2 = index[0::2].copy(), index[1::2].copy()
        self._first = np.unique(index, return_index=True)[1]
        self._starts, self._lengths = np.array(starts), np.array([len(image) for image in numbers])
        # Written as text, as protocols 0 to 2 do: not in the file as they are.
        self._in_memory = {number: image for image, number in numbers.items() if starts[number] < 0}

    def __len__(self) -> int:
        return len(self.is_same)

    def image_name(self, i: int) -> str:
        """What errors call image i: its first position in the file's list, from 0."""
        return f"{self.path}, image {self._first[i]}"

    def encoded(self, i: int) -> tuple[bytes, str]:
        """(image i before decoding, its name). Raises UserError if the file has changed."""
        if i in self._in_memory:
            return self._in_memory[i], self.image_name(i)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(int(self._starts[i]))
                data = file.read(int(self._lengths[i]))
        except OSError as error:
            raise UserError(f"{self.flag} {self.path}: cannot be read ({error.strerror})") from None
        if len(data) < self._lengths[i]:
            raise UserError(f"{self.flag} {self.path}: the file has become shorter since it was opened; start again")
        return data, self.image_name(i)


class _Refused(Exception):
    """Why a file is not read."""


class _Name(str):
    """Stands in for what a file names. Calling it notes the arguments."""

    def __call__(self, *arguments: Any) -> _Call:
        if len(arguments) > 4:  # numpy needs no more; bytes as arguments would become a tuple of as many numbers
            raise ValueError("not a call of numpy")
        return _Call(self, arguments)


class _Call:
    """What a file would have had a function make."""

    def __init__(self, name: str, arguments: tuple) -> None:
        self.name, self.arguments = name, arguments
        self.state: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array or the scalar, one-dimensional, over the file's bytes. Raises _Refused, or almost anything."""
        if self.name == "scalar":
            (dtype, data), shape = self.arguments, (1,)
        elif self.name == "_frombuffer":
            data, dtype, shape, _ = self.arguments
        elif self.name == "_reconstruct" and self.state is not None:
            _, shape, dtype, _, data = self.state  # version, shape, dtype, is Fortran order, data
        else:
            raise ValueError("an array without data")
        code, order = _text(dtype.arguments[0]), _text(dtype.state[1])  # state: version, byte order, ...
        if code not in ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"):
            raise _Refused(f"holds an array of {ascii(code)[:60]}, not of bytes or integers")
        array = np.frombuffer(data, np.dtype(order.replace("|", "=") + code))
        # The shape comes from the file too: a list in it would be repeated by the product.
        if not all(type(size) is int for size in shape) or array.size != math.prod(shape):
            raise ValueError("an array whose data do not have its shape")
        return array


class _Encoder:
    """Stands in for _codecs.encode, for so many characters: a tiny file can ask for one text again and again.

    It is no method of the unpickler, because a cycle would keep all images in memory until the garbage collector runs.
    """

    def __init__(self, characters: int) -> None:
        self._left = characters

    def __call__(self, text: str, encoding: str | bytes) -> bytes:
        self._left -= len(text)
        if self._left < 0 or _text(encoding) not in ("latin1", "latin-1"):
            raise ValueError("not what bytes are written as")
        return text.encode("latin-1")


_PythonUnpickler: Any = pickle._Unpickler  # Any: its attributes have no types


class _Unpickler(_PythonUnpickler):
    """The pickle -> numbers, strings, lists and tuples of Python, and _Call. Raises _Refused, or almost anything.

    This is Python's own unpickler in Python, not the one in C: that one allocates whatever memo index or length a file
    claims (in Python 3.11 ten bytes make it take 16 GiB), and cannot leave out instructions.
    """

    dispatch = {code: _PythonUnpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _INSTRUCTIONS)}

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._encoder = _Encoder(len(data))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"names {ascii(f'{module}.{name}')[:80]}, which evaluation sets do not contain: it may hold "
                           "code and was not loaded; get it from a source that you trust")
        return self._encoder if name == "encode" else _Name(name)

    def load_bytearray8(self) -> None:
        """As bytes. The inherited method first allocates the length that the file claims."""
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.READONLY_BUFFER[0]] = lambda self: None


def _text(value: str | bytes) -> str:
    """A str, which Python 2 writes as bytes."""
    return value if isinstance(value, str) else value.decode()


def _images_and_labels(content: Any) -> tuple[list[bytes], np.ndarray]:
    """(images, is_same bool (P,)). Raises _Refused, or almost anything. Does not recurse: lists may nest deeply."""
    images, labels = content
    if not isinstance(images, (tuple, list)) or not isinstance(labels, (tuple, list, _Call)):
        raise _Refused(f"does not hold a list of images and a list of labels, but {reprlib.repr(content)}")
    encoded = [_image(image, number) for number, image in enumerate(images)]
    if isinstance(labels, _Call):
        labels = labels.array().tolist()
    else:
        labels = [label.array().item() if isinstance(label, _Call) else label for label in labels]
    for number, label in enumerate(labels):
        if not isinstance(label, int) or label not in (0, 1):
            raise _Refused(f"label {number} is {reprlib.repr(label)}, not True, False, 1 or 0")
    if len(encoded) != 2 * len(labels):
        raise _Refused(f"has {len(encoded)} images and {len(labels)} labels; there must be two images for each label")
    return encoded, np.array(labels, dtype=bool)


def _image(image: Any, number: int) -> bytes:
    """The bytes of an image: a string, or an array of bytes of any shape."""
    if isinstance(image, _Call):
        array = image.array()
        image = array.base if array.dtype == np.uint8 else array
    if not isinstance(image, bytes):
        raise _Refused(f"image {number} is {reprlib.repr(image)}, not bytes")
    return image
