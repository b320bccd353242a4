"""Evaluation sets in one file, such as `lfw.bin`: a pickle of (encoded images, two for each pair; is_same of each pair).

They come from the internet, and pickle.load runs whatever code such a file names. Here a machine of our own goes through
the pickle's instructions. It knows only those that such files are made of, calls nothing, and makes nothing but numbers,
lists, tuples and notes of *where* strings lie in the file. So a file of any content costs memory in proportion to its size
and no claim in it is believed, and the images stay on the disk until they are wanted: whoever gets a PairBin sent (a rank,
a loading process) gets some 50 bytes per image, and the page cache is shared.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import pickle
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from data.decode import read_bytes
from utils.errors import UserError
from utils.evaluation.lfw import usable_folds

# What the files may name: numpy's arrays of bytes and its numbers, in the spellings before and since numpy 2, and what
# Python 3 writes for bytes in the protocols of Python 2. Protocol 5 writes arrays by _frombuffer. None of it is ever called.
_STAND_INS = {
    ("_codecs", "encode"): "encode",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{
        (f"numpy.{core}.{module}", name): name
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
}
_INTEGER_TYPES = ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
_LONGEST_NAME = 200  # of what the file names, and of numbers written as text
_LATIN_1 = ("latin1", "latin-1", "iso-8859-1")


class PairBin:
    """The pairs of an evaluation set's file `path`: pair p is of its images 2·p and 2·p + 1.

    Attributes, for P pairs of U different images (equal bytes are one image):
    path: the file;
    num_images: U;
    index1, index2: int64 (P,), the numbers of pair p's images, in order of first appearance;
    is_same: bool (P,).

    Raises UserError, naming the file: it cannot be read, is no pickle or a damaged one, names anything but an array
    (which is told and not run), holds something else than images and labels, or other numbers of them, or fewer than
    two pairs of a label. What the images hold is seen when they are decoded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        data = read_bytes(self.path)
        try:
            content = _Unpickler(data).load()
            images, self.is_same = _images_and_labels(content, data)
            usable_folds(self.is_same)
        except (UserError, _Refused) as error:
            raise UserError(f"{self.path}: {error}") from None

        # By a digest: many files hold an image once for each pair that it is in, and each is embedded only once.
        number: dict[bytes, int] = {}
        index = np.empty(len(images), dtype=np.int64)
        for i, image in enumerate(images):
            digest = hashlib.blake2b(memoryview(data)[image.start : image.stop], digest_size=16).digest()
            index[i] = number.setdefault(digest, len(number))
        _, self._first = np.unique(index, return_index=True)
        self.num_images = len(number)
        self.index1, self.index2 = index[0::2].copy(), index[1::2].copy()
        kept = [images[i] for i in self._first]
        self._starts = np.array([image.start for image in kept], dtype=np.int64)
        self._stops = np.array([image.stop for image in kept], dtype=np.int64)
        self._codings = [image.coding for image in kept]
        self._descriptor: int | None = self._open()

    def __len__(self) -> int:
        return len(self.is_same)

    def image_name(self, i: int) -> str:
        """What an error calls image i: where it first stands in the file's list, from 0."""
        return f"{self.path}, image {self._first[i]}"

    def encoded(self, i: int) -> tuple[bytes, str]:
        """Image i as it was before it was decoded, and its name. Raises UserError where the file has changed."""
        start, stop = int(self._starts[i]), int(self._stops[i])
        if self._descriptor is None:  # in a process that this object was sent to
            self._descriptor = self._open()
        try:
            data = os.pread(self._descriptor, stop - start, start)  # pread: forked loading processes share the descriptor
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if len(data) < stop - start:
            raise UserError(f"{self.path}: has become shorter since it was opened")
        return _decode(data, self._codings[i]), self.image_name(i)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)


def _images_and_labels(content: Any, data: bytes) -> tuple[list[_String], np.ndarray]:
    """(images, is_same bool (P,)) of what the pickle holds. Raises _Refused."""
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise _Refused(f"holds {_kind(content)}, not (images, labels)")
    images, labels = content
    if not isinstance(images, (tuple, list)):
        raise _Refused(f"its images are {_kind(images)}, not a list")
    images = [_image(image, number) for number, image in enumerate(images)]
    is_same = _labels(labels, data)
    if len(images) != 2 * len(is_same):
        raise _Refused(f"has {len(images)} images and {len(is_same)} labels; there must be two images for each label")
    return images, is_same


def _image(image: Any, number: int) -> _String:
    """The bytes of an image: a string, or an array of bytes of any shape."""
    if isinstance(image, _Array) and image.dtype is not None:
        if image.dtype.code != "u1":
            raise _Refused(f"image {number} is an array of {image.dtype.code}, not of bytes (u1)")
        _require_length(image, f"image {number}")
        image = image.string
    if not isinstance(image, _String) or image.coding in ("text", "escaped text"):
        raise _Refused(f"image {number} is {_kind(image)}, not bytes")
    return image


def _labels(labels: Any, data: bytes) -> np.ndarray:
    """bool (P,) of a list of bools, 0 and 1 or numpy's scalars, or of an array of any integer type."""
    if isinstance(labels, _Array) and labels.dtype is not None and len(labels.shape) == 1:
        values = _numbers(labels, data, "the array of labels")
    elif isinstance(labels, (tuple, list)):
        values = [
            _numbers(label, data, f"label {number}")[0] if isinstance(label, _Array) and label.shape == () else label
            for number, label in enumerate(labels)
        ]
    else:
        raise _Refused(f"its labels are {_kind(labels)}, not a list")
    for number, value in enumerate(values):
        if not isinstance(value, (bool, int, np.bool_, np.integer)) or value not in (0, 1):
            shown = value if isinstance(value, (int, np.integer)) and abs(int(value)) < 2**63 else _kind(value)
            raise _Refused(f"label {number} is {shown}, not True, False, 1 or 0")
    return np.array(values, dtype=bool)


def _numbers(array: _Array, data: bytes, name: str) -> np.ndarray:
    if array.dtype is None or array.string is None or array.string.coding == "text":
        raise _Refused(f"{name} is incomplete")
    values = _decode(data[array.string.start : array.string.stop], array.string.coding)
    _require_length(array, name, len(values))
    return np.frombuffer(values, dtype=np.dtype(array.dtype.order + array.dtype.code))


def _require_length(array: _Array, name: str, length: int | None = None) -> None:
    """The shape must be that of the bytes that are there. Where escapes hide their number, it shows when they are decoded."""
    assert array.dtype is not None
    expected = int(array.dtype.code[1:])
    for size in array.shape:
        expected *= size
    if length is None and isinstance(array.string, _String) and array.string.coding == "bytes":
        length = array.string.stop - array.string.start
    if length is not None and length != expected:
        raise _Refused(f"{name} has the shape {_shown(array.shape)} and {length} bytes")


def _decode(data: bytes, coding: str) -> bytes:
    """The bytes meant by what stands in the file."""
    try:
        if coding == "escaped":
            return codecs.escape_decode(data)[0]
        if coding == "latin-1 of text":
            return data.decode("utf-8", "surrogatepass").encode("latin-1")
        if coding == "latin-1 of escaped text":
            return data.decode("raw-unicode-escape").encode("latin-1")
    except ValueError:
        return b""  # which is no image, and no number: the error names what it belongs to
    return data


# ---------------------------------------------------------------------------------------------------------------------
# The machine


class _Refused(Exception):
    """Why a file is not read."""


@dataclass(frozen=True, slots=True)
class _String:
    """data[start:stop] of the file. As `coding` says these are the bytes themselves, a Python 2 string with escapes, or
    text, as it is or encoded in Latin-1 afterwards: Python 3 writes bytes so for Python 2."""

    start: int
    stop: int
    coding: str  # bytes, escaped, text, escaped text, latin-1 of text, latin-1 of escaped text


@dataclass(frozen=True, slots=True)
class _Name:
    """Stands where the pickle names a function or a class."""

    name: str


@dataclass(slots=True)
class _Type:
    """A numpy dtype."""

    code: str
    order: str = "="


@dataclass(slots=True)
class _Array:
    """A numpy array, or with the shape () a scalar; empty until its state comes."""

    dtype: _Type | None = None
    shape: tuple[int, ...] = ()
    string: _String | None = None


class _Unpickler:
    """The pickle `data` -> numbers, lists and tuples of Python, _String, _Array. Raises _Refused.

    The instructions are those of the pickle module, which documents them in pickletools; sets, dicts, objects, persistent
    ids and extension codes are not among them.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        try:
            while (code := self.take_byte()) != pickle.STOP[0]:
                instruction = _INSTRUCTIONS.get(code)
                if instruction is None:
                    self.refuse_instruction(code)
                instruction(self)
            return self.stack.pop()
        except (IndexError, KeyError, ValueError, struct.error):  # an empty stack, an unknown memo, no number
            raise _Refused(f"is a damaged pickle (at byte {self.position} of {len(self.data)}); download or pack it "
                           "again") from None

    def refuse_instruction(self, code: int) -> NoReturn:
        if self.position == 1:
            raise _Refused("is not an evaluation set: it is no pickle")
        raise _Refused(f"has the instruction {bytes([code])!r} at byte {self.position - 1}, which no evaluation set needs: "
                       "it is damaged, or holds something else, and was not loaded")

    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) not in _STAND_INS:
            raise _Refused(f"names {ascii(f'{module}.{name}')}, which no evaluation set needs: it may hold code and was "
                           "not loaded; get it from where it can be trusted")
        return _Name(_STAND_INS[module, name])

    # Reading

    def take(self, length: int) -> int:
        """Go `length` bytes on; returns where they begin."""
        start = self.position
        if not 0 <= length <= len(self.data) - start:
            raise _Refused(f"is cut off or damaged: {length} bytes should follow byte {start}, and "
                           f"{len(self.data) - start} do; download or pack it again")
        self.position += length
        return start

    def take_byte(self) -> int:
        return self.data[self.take(1)]

    def take_number(self, form: str) -> int:
        start = self.take(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def take_line(self) -> tuple[int, int]:
        """(start, stop) of the bytes up to the end of the line."""
        start = self.position
        stop = self.data.find(b"\n", start)
        if stop < 0:
            raise _Refused(f"is cut off or damaged: the line at byte {start} has no end; download or pack it again")
        self.position = stop + 1
        return start, stop

    def take_short_line(self) -> str:
        start, stop = self.take_line()
        if stop - start > _LONGEST_NAME:
            raise ValueError("no name and no number is so long")
        return self.data[start:stop].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_string(self, form: str, coding: str) -> None:
        length = self.take_number(form)
        start = self.take(length)
        self.push(_String(start, start + length, coding))

    def pop_to_mark(self) -> list[Any]:
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def text(self, value: Any) -> str:
        """A short string: a name, the code of a dtype."""
        if not isinstance(value, _String) or value.stop - value.start > _LONGEST_NAME:
            raise ValueError("not a short string")
        return _decode(self.data[value.start : value.stop], value.coding).decode("utf-8")

    # Instructions

    def do_nothing(self) -> None:
        pass

    def protocol(self) -> None:
        version = self.take_byte()
        if version > pickle.HIGHEST_PROTOCOL:
            raise _Refused(f"is a pickle of protocol {version}, which is unknown, or damaged")

    def line_string(self) -> None:
        """'...' or "..." with escapes: a string of Python 2."""
        start, stop = self.take_line()
        if stop - start < 2 or self.data[start] != self.data[stop - 1] or self.data[start] not in b"'\"":
            raise ValueError("no quotes")
        # Without escapes, as short names are, these are the bytes themselves.
        escaped = self.data.find(b"\\", start, stop) >= 0
        self.push(_String(start + 1, stop - 1, "escaped" if escaped else "bytes"))

    def line_text(self) -> None:
        start, stop = self.take_line()
        self.push(_String(start, stop, "escaped text"))

    def line_integer(self) -> None:
        text = self.take_short_line()
        self.push({"00": False, "01": True}[text] if text in ("00", "01") else int(text.removesuffix("L")))

    def long_integer(self) -> None:
        length = self.take_byte()
        start = self.take(length)
        self.push(int.from_bytes(self.data[start : start + length], "little", signed=True))

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def tuple_from_mark(self) -> None:
        self.push(tuple(self.pop_to_mark()))

    def list_from_mark(self) -> None:
        self.push(self.pop_to_mark())

    def short_tuple(self, length: int) -> None:
        if len(self.stack) < length:
            raise IndexError("pop from an empty stack")
        items = tuple(self.stack[-length:])
        del self.stack[-length:]
        self.push(items)

    def append(self) -> None:
        self.extend_list([self.stack.pop()])

    def extend_list(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("append to what is no list")
        self.stack[-1].extend(items)

    def get(self, number: int) -> None:
        self.push(self.memo[number])

    def put(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def named(self) -> None:
        module = self.take_short_line()
        self.push(self.find_class(module, self.take_short_line()))

    def named_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(self.find_class(self.text(module), self.text(name)))

    def reduce(self) -> None:
        """What Python would do by calling `name(*arguments)`."""
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of what is no name")
        match name.name, arguments:
            case "encode", (_String(start, stop, "text" | "escaped text" as coding), encoding):
                if self.text(encoding).lower() not in _LATIN_1:
                    raise ValueError("another encoding than bytes are written in")
                self.push(_String(start, stop, f"latin-1 of {coding}"))
            case "_reconstruct", (_Name("ndarray"), *_):
                self.push(_Array())
            case "dtype", (_String() as code, *_):
                self.push(_Type(self.text(code)))
            case "scalar", (_Type() as dtype, _String() as string):
                self.push(_array(dtype, (), string))
            case "_frombuffer", (_String() as string, _Type() as dtype, tuple() as shape, _):
                self.push(_array(dtype, shape, string))
            case _:
                raise ValueError("a call with other arguments than numpy writes")

    def build(self) -> None:
        """What Python would do by `__setstate__`."""
        state, value = self.stack.pop(), self.stack[-1]
        match value, state:
            case _Type(), (int(), _String() as order, *_):  # (version, byte order, ...)
                value.order = self.text(order).replace("|", "=")
                if value.order not in ("=", "<", ">"):
                    raise ValueError("no byte order")
            case _Array(), (int(), tuple() as shape, _Type() as dtype, _, _String() as string):
                array = _array(dtype, shape, string)
                value.dtype, value.shape, value.string = array.dtype, array.shape, array.string
            case _Array(), (int(), tuple(), _Type() as dtype, _, list()):
                raise _Refused(f"holds an array of {_shown(dtype.code)}, not of bytes or integers")
            case _:
                raise ValueError("the state of what has none")


def _array(dtype: _Type, shape: tuple, string: _String) -> _Array:
    if dtype.code not in _INTEGER_TYPES:
        raise _Refused(f"holds an array of {_shown(dtype.code)}, not of bytes or integers")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError("no shape")
    return _Array(dtype, shape, string)


_INSTRUCTIONS = {
    code[0]: instruction
    for code, instruction in {
        pickle.PROTO: _Unpickler.protocol,
        pickle.FRAME: lambda m: m.take(8),  # how much to read ahead: nothing to us
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.INT: _Unpickler.line_integer,
        pickle.LONG: _Unpickler.line_integer,
        pickle.BININT: lambda m: m.push(m.take_number("<i")),
        pickle.BININT1: lambda m: m.push(m.take_byte()),
        pickle.BININT2: lambda m: m.push(m.take_number("<H")),
        pickle.LONG1: _Unpickler.long_integer,
        pickle.STRING: _Unpickler.line_string,
        pickle.SHORT_BINSTRING: lambda m: m.push_string("<B", "bytes"),
        pickle.BINSTRING: lambda m: m.push_string("<i", "bytes"),
        pickle.SHORT_BINBYTES: lambda m: m.push_string("<B", "bytes"),
        pickle.BINBYTES: lambda m: m.push_string("<I", "bytes"),
        pickle.BINBYTES8: lambda m: m.push_string("<Q", "bytes"),
        pickle.BYTEARRAY8: lambda m: m.push_string("<Q", "bytes"),
        pickle.UNICODE: _Unpickler.line_text,
        pickle.SHORT_BINUNICODE: lambda m: m.push_string("<B", "text"),
        pickle.BINUNICODE: lambda m: m.push_string("<I", "text"),
        pickle.BINUNICODE8: lambda m: m.push_string("<Q", "text"),
        pickle.READONLY_BUFFER: _Unpickler.do_nothing,
        pickle.MARK: _Unpickler.mark,
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.LIST: _Unpickler.list_from_mark,
        pickle.APPEND: _Unpickler.append,
        pickle.APPENDS: lambda m: m.extend_list(m.pop_to_mark()),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.TUPLE: _Unpickler.tuple_from_mark,
        pickle.TUPLE1: lambda m: m.short_tuple(1),
        pickle.TUPLE2: lambda m: m.short_tuple(2),
        pickle.TUPLE3: lambda m: m.short_tuple(3),
        pickle.GET: lambda m: m.get(int(m.take_short_line())),
        pickle.BINGET: lambda m: m.get(m.take_byte()),
        pickle.LONG_BINGET: lambda m: m.get(m.take_number("<I")),
        pickle.PUT: lambda m: m.put(int(m.take_short_line())),
        pickle.BINPUT: lambda m: m.put(m.take_byte()),
        pickle.LONG_BINPUT: lambda m: m.put(m.take_number("<I")),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
        pickle.GLOBAL: _Unpickler.named,
        pickle.STACK_GLOBAL: _Unpickler.named_on_stack,
        pickle.REDUCE: _Unpickler.reduce,
        pickle.BUILD: _Unpickler.build,
    }.items()
}


def _kind(value: Any) -> str:
    """What a value is, in words."""
    match value:
        case _Name():
            return "a name"
        case _Array():
            return "an array"
        case _Type():
            return "a dtype"
        case _String(coding="text" | "escaped text"):
            return "text"
        case _String():
            return "bytes"
        case None:
            return "None"
        case _:
            return f"a {type(value).__name__}"


def _shown(value: Any) -> str:
    return ascii(value)[:60]
