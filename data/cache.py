"""A file of named arrays that all processes map: what a scan of the training data found, kept for the next start.

    magic      8 bytes
    checksum   uint32: CRC-32 of the header
    length     uint32: of the header
    header     JSON: {"made_from": [...], "arrays": {name: [dtype, shape, CRC-32]}}, padded with spaces to 8 bytes
    arrays     in the order of the header, the widest first, so that all are aligned; little-endian

`made_from` describes the data (kind and version first), so that the cache of other data, or of another version of this
program, is recognised and replaced. Files are written atomically and without a lock: processes that start together on
one disk may all scan, and the last one to finish leaves its file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write, open_regular, require_directory

_MAGIC = b"\x89faces2\n"
_ANY_VERSION = _MAGIC[:6]
_HEAD = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 2**20
_DTYPE = re.compile("[<|][biuf][1248]")
# What is known about the images, not which they are. Another process may replace the file by one that knows more.
_VOLATILE = ("stamps", "header_is_good", "unused")


class CachedArrays:
    """Arrays by name: mapped from the file `path`, or in memory if it is None.

    made_from: what they were made from, a JSON list.
    checksums: of the arrays in the file that tell which images there are.
    Another process that gets this object sent maps the file again, or receives a copy of what is in memory.
    """

    def __init__(self, made_from: list, arrays: dict[str, np.ndarray], path: str | None = None) -> None:
        self.made_from, self.arrays, self.path = made_from, arrays, path
        self.checksums: dict[str, int] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def has(self, **arrays: tuple[str, tuple[int, ...]]) -> bool:
        """Whether it has arrays of these types and shapes (-1: any length). A checksum does not say what was written.
        """
        return all(
            name in self.arrays and self[name].dtype == dtype and self[name].ndim == len(shape)
            and all(size in (-1, found) for size, found in zip(shape, self[name].shape))
            for name, (dtype, shape) in arrays.items())

    def checksum(self, name: str) -> int:
        """The CRC-32 of an array's bytes in the file, which are little-endian."""
        if name not in self.checksums:
            array = self.arrays[name]
            self.checksums[name] = zlib.crc32(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
        return self.checksums[name]

    def __reduce__(self) -> tuple[Callable[..., CachedArrays], tuple]:
        if self.path is None:
            return CachedArrays, (self.made_from, self.arrays)
        return _map_again, (self.path, self.checksums)


def cache_paths(beside: str, index: str) -> list[str]:
    """Where the cache may lie, best first, for `--index auto`, `none` or a file. `beside`: its place beside the data.

    The second place is among the user's caches, for data that cannot be written to. Raises UserError if a file that
    --index names is something else, or cannot be written.
    """
    if index == "none":
        return []
    if index != "auto":
        _require_usable(index)
        return [index]
    directory, name = os.path.split(beside)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(os.fsencode(os.path.join(os.path.realpath(directory), name))).hexdigest()[:32]
    return [beside, os.path.join(caches, "arcface", digest + ".index")]


def load_caches(paths: list[str], made_from: list, progress: bool) -> Iterator[CachedArrays]:
    """The caches at `paths` that are intact and made from this. progress: report damaged and other ones on stderr."""
    for path in paths:
        try:
            found = read_cache(path)
            if found.made_from != made_from:
                raise ValueError("it is of other data, or of another version")
            yield found
        except OSError:
            continue
        except ValueError as error:
            if progress:
                print(f"note: the index {path} is not used ({error}): scanning again", file=sys.stderr)


def save_cache(made_from: list, arrays: dict[str, np.ndarray], paths: list[str], progress: bool) -> CachedArrays:
    """Write to the first of `paths` that can be written and map it from there. Without one, the arrays stay in memory.

    progress: report on stderr if no path can be written.
    """
    reason = ""
    for path in paths:
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with atomic_write(path) as file:
                checksums = _write(file, made_from, arrays)
            written = read_cache(path, verify=False)
        except OSError as error:
            reason = reason or f"{path}: cannot be written ({error.strerror})"
            continue
        if written.checksums == checksums:
            return written
        break  # another process has replaced it since, by the index of other data
    if reason and progress:
        print(f"note: {reason}; every start scans the images again, and every process holds its own index",
              file=sys.stderr)
    return CachedArrays(made_from, arrays)


def _write(file: BinaryIO, made_from: list, arrays: dict[str, np.ndarray]) -> dict[str, int]:
    """Write the file's contents. Returns the arrays' checksums, without the volatile ones."""
    columns = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    columns = dict(sorted(columns.items(), key=lambda item: -item[1].itemsize))
    described = {name: [array.dtype.str, array.shape, zlib.crc32(array.data)] for name, array in columns.items()}
    header = json.dumps({"made_from": made_from, "arrays": described}).encode()
    header += b" " * (-len(header) % 8)
    file.write(_HEAD.pack(_MAGIC, zlib.crc32(header), len(header)) + header)
    for array in columns.values():
        file.write(array.data)
    return {name: checksum for name, (_, _, checksum) in described.items() if name not in _VOLATILE}


def read_cache(path: str, verify: bool = True) -> CachedArrays:
    """Map the file. Raises OSError, or ValueError with the reason if it is damaged. verify: check all of its bytes."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size < _HEAD.size:
            raise ValueError("it is truncated")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    magic, checksum, length = _HEAD.unpack_from(content)
    if magic != _MAGIC:
        raise ValueError("it is of another version" if magic.startswith(_ANY_VERSION) else "it is not an index")
    if length > _MAX_HEADER_BYTES:
        raise ValueError("its header is damaged")
    text = content[_HEAD.size : _HEAD.size + length]
    if zlib.crc32(text) != checksum:
        raise ValueError("its header has a wrong checksum")
    try:
        header = json.loads(text)
        cache = CachedArrays(header["made_from"], {}, path)
        described = []
        for name, (dtype, shape, checksum) in header["arrays"].items():
            if not _DTYPE.fullmatch(dtype) or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError
            described.append((name, np.dtype(dtype), shape, checksum))
        expected = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape, _ in described)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("its header is damaged") from None
    position = _HEAD.size + length
    if position + expected != len(content):  # before all bytes are read
        raise ValueError("it is truncated" if position + expected > len(content) else "it is too long")
    for name, dtype, shape, checksum in described:
        array = np.frombuffer(content, dtype, math.prod(shape), position).reshape(shape)
        if verify and zlib.crc32(array.data) != checksum:
            raise ValueError(f"its {name} have a wrong checksum")
        position += array.nbytes
        cache.arrays[name] = array
        if name not in _VOLATILE:
            cache.checksums[name] = checksum
    return cache


def _map_again(path: str, checksums: dict[str, int]) -> CachedArrays:
    """In another process of the run: the file that the first one has verified."""
    with contextlib.suppress(OSError, ValueError):
        cache = read_cache(path, verify=False)
        if cache.checksums == checksums:
            return cache
    raise UserError(f"{path}: the index of the images has changed since this run started; start it again")


def _require_usable(path: str) -> None:
    """The file that --index names will be replaced: it must be an index, even a damaged one, or not exist yet."""
    try:
        with open_regular(path) as file:
            start = file.read(len(_ANY_VERSION))
    except FileNotFoundError:
        start = b""
    except OSError as error:
        raise UserError(f"--index {path}: cannot be read ({error.strerror}); give another file") from None
    if start and start != _ANY_VERSION:
        raise UserError(f"--index {path}: is not an index of images, and would be replaced; give another file")
    require_directory(f"--index {path}:", os.path.dirname(os.path.abspath(path)))
