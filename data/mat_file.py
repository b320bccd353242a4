"""MATLAB's .mat files, version 5 (also written by `save -v7`): strings, numbers, and cell arrays of them.

"MAT-File Format" (MathWorks, 2023), chapter 1. A file comes from the internet: nothing in it is executed, and memory
is bounded.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import open_bounded

_MAX_BYTES = _MAX_INFLATED = 2**26  # a list of a million file names has less
_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15  # types of data elements
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _CHAR, _NUMERIC = 1, 4, range(6, 16)  # classes of arrays


def read_mat(path: str, flag: str) -> dict[str, Any]:
    """The file's variables by name. A cell array is a list of its cells, and a char array of one row a string.

    Numbers are an array (n,) of all values in MATLAB's order, the first dimension fastest. Variables of other kinds
    (structures, objects, sparse matrices) are left out. Raises UserError.
    """
    try:
        with open_bounded(path, _MAX_BYTES) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{flag}: {path}: cannot be read ({error.strerror})") from None
    if data.startswith((b"\x89HDF", b"MATLAB 7.3")):
        raise UserError(f"{flag}: {path}: is of MATLAB's version 7.3; save it with `save -v7`")
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise UserError(f"{flag}: {path}: is no .mat file of version 5")
    try:
        return _variables(data[_HEADER_BYTES:], order)
    except KeyError as error:
        raise UserError(f"{flag}: {path}: is damaged (a value of type {error})") from None
    except (ValueError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{flag}: {path}: is damaged ({' '.join(str(error).split())[:80] or 'it ends early'})"
                        ) from None


def _variables(data: bytes, order: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    at = room = 0
    while at < len(data):
        kind, part, at = _element(data, at, order)
        if kind == _COMPRESSED:
            if room >= _MAX_INFLATED:  # zlib takes 0 for no limit
                raise ValueError("its compressed data are larger than 64 MiB")
            inflater = zlib.decompressobj()
            part = inflater.decompress(part, _MAX_INFLATED - room)
            if not inflater.eof:
                raise ValueError("its compressed data are larger than 64 MiB, or end early")
            room += len(part)
            kind, part, _ = _element(part, 0, order)
        if kind != _MATRIX:
            raise ValueError(f"a data element of type {kind}")
        name, value = _matrix(part, order)
        if value is not None:
            found[name] = value
    return found


def _element(data: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """(type, content, where the next one begins) of the data element at `at`."""
    kind, size = struct.unpack_from(order + "II", data, at)
    if kind >> 16:  # four bytes or fewer stand in the tag itself
        size, kind = kind >> 16, kind & 0xFFFF
        start, end = at + 4, at + 8
        if size > 4:
            raise ValueError(f"a small data element of {size} bytes")
    else:
        start = at + 8
        end = start + size + (-size % 8 if kind != _COMPRESSED else 0)
    if start + size > len(data):
        raise ValueError("it ends early")
    return kind, data[start : start + size], end


def _matrix(data: bytes, order: str, nested: bool = False) -> tuple[str, Any]:
    """(name, value) of an array; the value is None if it is of another kind."""
    _, flags, at = _element(data, 0, order)
    array_class = struct.unpack_from(order + "I", flags)[0] & 0xFF
    _, sizes, at = _element(data, at, order)
    _, name, at = _element(data, at, order)
    if array_class == _CELL and not nested:
        cells = []
        while at < len(data):
            kind, part, at = _element(data, at, order)
            if kind != _MATRIX:
                raise ValueError(f"a cell of type {kind}")
            cells.append(_matrix(part, order, nested=True)[1] if part else "")
        return name.decode("latin-1"), cells
    if array_class == _CHAR:
        rows = int(np.frombuffer(sizes, order + "i4")[0])
        kind, part, _ = _element(data, at, order)
        coding = _TEXTS[kind]
        text = part.decode(coding + ("-le" if order == "<" else "-be") if coding in ("utf-16", "utf-32") else coding)
        return name.decode("latin-1"), text if rows <= 1 else None
    if array_class in _NUMERIC:
        kind, part, _ = _element(data, at, order)
        dtype = np.dtype(order + _NUMBERS[kind])
        return name.decode("latin-1"), np.frombuffer(part, dtype).astype(dtype.newbyteorder("="))
    return name.decode("latin-1"), None
