"""What an image folder holds, as one compact buffer that is also the index file kept between runs.

An index file spares the next start the scan: the names of the sub-directories are listed again and each one's stamp (time
of modification, time of change) is compared; while they are the same, no file has been added, removed or renamed. Only
directories that differ are read again. Per image it also tells whether its header was seen to be good.

The file, little-endian, D directories (sorted by name, without images as well) and N images (sorted within theirs):

    magic 8 bytes, version uint32, checksum uint32 (CRC-32 of all, itself taken as 0), D, N, bytes of the names of
    directories, bytes of the names of images: uint64 each
    stamps           int64 (D, 2)   nanoseconds; 0, 0: not to be relied on, read the directory again
    first_image      int64 (D + 1)  directory d has the images first_image[d] up to first_image[d + 1]
    first_byte       int64 (D + 1)  and their names these bytes of the names of images
    directory_ends   int64 (D)      where each directory's name ends among the names of directories
    name_ends        uint32 (N)     where each image's name ends, counted from its directory's first_byte
    header_is_good   uint8 (N)
    names of directories, names of images: as the file system has them, without separators
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import struct
import sys
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from utils.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
INDEX_NAME = ".image-index"  # hidden: the scan does not take it for an image

_MAGIC = b"\x89faces\r\n"  # like PNG's: a transfer that takes it for text is noticed
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQ")

# A directory that changed just before it was read may change again within the same tick of its file system's clock (2 s
# with FAT, 1 s with some network disks) and keep its stamp: such a stamp is not relied on.
_SETTLED_SECONDS = 2.0

# Threads hide the latency of cold files and network disks, but for cached files they only fight over the interpreter:
# headers of 18,000 files/s with 8 threads, of 57,000 in a plain loop. So the first chunk, in a loop, decides.
_THREADS = 8
_CHUNK = 256
_WAITING_RATIO = 2.0  # waited so many times longer than computed: a slow disk

T = TypeVar("T")


class PackedNames(Sequence[str]):
    """A list of names in the bytes that they have: 8 bytes beside each, where a Python string costs 50."""

    def __init__(self, names: memoryview | bytes, ends: np.ndarray) -> None:
        self._names, self._ends = names, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        start = int(self._ends[i - 1]) if i else 0
        return os.fsdecode(bytes(self._names[start : int(self._ends[i])]))

    def where(self, mask: np.ndarray) -> PackedNames:
        """Those that the mask, bool (len,), is true for."""
        return PackedNames(*_pack([self[k] for k in np.flatnonzero(mask).tolist()]))

    def __reduce__(self) -> tuple[type[PackedNames], tuple]:
        return PackedNames, (bytes(self._names), self._ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"PackedNames({list(self[:3])}, {len(self)} in all)"


class FolderIndex:
    """Views of the parts of `buffer` (see this file's head), which may be a mapped file.

    path: the file that it is mapped from; None: it is in this process's memory. Sent to another process, the former
    opens the file there, the latter is copied. Raises ValueError, with a reason, for a buffer that is damaged.
    """

    def __init__(self, buffer: bytes | bytearray | mmap.mmap, path: str | None = None) -> None:
        self.path = path
        self._buffer = buffer
        if len(buffer) < _HEADER.size:
            raise ValueError("it is cut off")
        magic, version, self.checksum, directories, images, directory_bytes, name_bytes = _HEADER.unpack_from(buffer)
        if magic != _MAGIC:
            raise ValueError("it is no image index")
        if version != _VERSION:
            raise ValueError(f"it has version {version}, not {_VERSION}")
        sizes = (16 * directories, 8 * (directories + 1), 8 * (directories + 1), 8 * directories, 4 * images, images,
                 directory_bytes, name_bytes)
        if _HEADER.size + sum(sizes) != len(buffer):
            raise ValueError("it is cut off, or too long")
        parts, position = [], _HEADER.size
        for dtype, size in zip(("<i8", "<i8", "<i8", "<i8", "<u4", "u1", "u1", "u1"), sizes):
            parts.append(np.frombuffer(buffer, dtype, size // np.dtype(dtype).itemsize, position))
            position += size
        stamps, self.first_image, self.first_byte, directory_ends, self._name_ends, self.header_is_good = parts[:6]
        self.stamps = stamps.reshape(-1, 2)
        # A single element comes out of these in a tenth of the time.
        self._first_image, self._name_ends_view = memoryview(self.first_image), memoryview(self._name_ends)
        self._directory_bytes, self._name_bytes = memoryview(parts[6]), memoryview(parts[7])
        self._directory_ends = directory_ends
        self._flags_start = len(buffer) - name_bytes - directory_bytes - images
        self.directories = PackedNames(self._directory_bytes, directory_ends)

    def __len__(self) -> int:
        """How many images."""
        return len(self._name_ends)

    def __reduce__(self) -> tuple[Callable[..., FolderIndex], tuple]:
        if self.path is None:
            return FolderIndex, (bytes(self._buffer),)
        return _map_again, (self.path, self.checksum)

    def directory_of(self, i: int) -> int:
        """The number of the directory that image i lies in."""
        return bisect.bisect_right(self._first_image, i) - 1

    def name(self, i: int, directory: int) -> str:
        """The file name of image i, which lies in that directory."""
        base, ends = int(self.first_byte[directory]), self._name_ends_view
        start = ends[i - 1] if i > self._first_image[directory] else 0
        return os.fsdecode(bytes(self._name_bytes[base + start : base + ends[i]]))

    def verify(self) -> None:
        """Raise ValueError unless the checksum and what it cannot know are right."""
        if _checksum(self._buffer) != self.checksum:
            raise ValueError("its checksum is wrong")
        for bounds, end in ((self.first_image, len(self)), (self.first_byte, len(self._name_bytes)),
                            (self._directory_ends, len(self._directory_bytes))):
            if len(bounds) and (bounds[0] < 0 or bounds[-1] != end or (np.diff(bounds) < 0).any()):
                raise ValueError("its parts do not fit together")
        if self._buffer.find(b"/", self._flags_start + len(self)) != -1:
            raise ValueError("it has names that no file can have")

    def same_directories(self, names: list[str]) -> bool:
        packed, ends = _pack(names)
        return packed == bytes(self._directory_bytes) and np.array_equal(ends, self._directory_ends)

    def same_images(self, other: FolderIndex) -> bool:
        """Whether they differ in the headers at most."""
        flags = slice(self._flags_start, self._flags_start + len(self))
        return (
            len(self) == len(other) and self._flags_start == other._flags_start
            and self._buffer[_HEADER.size : flags.start] == other._buffer[_HEADER.size : flags.start]
            and self._buffer[flags.stop :] == other._buffer[flags.stop :]
        )

    def with_good_headers(self, images: np.ndarray) -> FolderIndex:
        """A copy, in memory, that has the headers of these images as good ones too."""
        buffer = bytearray(self._buffer)
        np.frombuffer(buffer, np.uint8, len(self), self._flags_start)[images] = 1
        return FolderIndex(_sealed(buffer))

    def taken_from(self, d: int) -> tuple[bytes, np.ndarray, np.ndarray]:
        """(names, their ends, header_is_good) of the images of directory d."""
        images = slice(int(self.first_image[d]), int(self.first_image[d + 1]))
        names = self._name_bytes[int(self.first_byte[d]) : int(self.first_byte[d + 1])]
        return bytes(names), self._name_ends[images], self.header_is_good[images]


# ---------------------------------------------------------------------------------------------------------------------
# The file


def index_paths(root: str, index: str) -> list[str]:
    """Where the index of `root` may lie, best first: for `--index auto`, `none` or a file."""
    if index == "none":
        return []
    if index != "auto":
        return [index]
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32] + INDEX_NAME
    return [os.path.join(root, INDEX_NAME), os.path.join(caches, "arcface", name)]


def open_index(root: str, index: str, progress: bool) -> FolderIndex:
    """The index of the images in the sub-directories of `root`: from its file if that is still right, else by a scan.

    index: "auto": the file lies in `root`, or if that cannot be written among the user's caches; "none": no file; else
    the file. Processes that start at the same time wait for the first one, and then take what it has written.
    progress: tell on stderr about an index that is not used, about waiting, and with a bar if that is a terminal.

    Raises UserError where a directory cannot be read, and where the file that was asked for is something else or cannot
    be written.
    """
    paths = index_paths(root, index)
    named = index not in ("auto", "none")
    if named:
        _require_own_file(index)
    started = time.time_ns()
    names = list_directories(root)
    stamps = _stamps(root, names)
    current, previous = _load_first(paths, names, stamps, progress)
    if current is not None:
        return current
    with locked(paths, progress):
        if paths:  # perhaps another process has just done it
            current, previous = _load_first(paths, names, stamps, progress=False)
            if current is not None:
                return current
        if named:
            _require_writable(index)
        # Only now, and before the directories are read: what changes while they are is seen at the next start.
        relied_on = stamps.max(axis=1, initial=0) < started - int(_SETTLED_SECONDS * 1e9)
        scanned = FolderIndex(_scan(root, names, np.where(relied_on[:, None], stamps, 0), stamps, previous, progress))
        return save_index(scanned, paths, progress)


def reload_index(index: FolderIndex) -> FolderIndex:
    """What its file holds now, if that differs in the headers at most; else `index` as it is."""
    if index.path is not None:
        with contextlib.suppress(OSError, ValueError):
            now = _map(index.path)
            now.verify()
            if now.same_images(index):
                return now
    return index


def save_index(index: FolderIndex, paths: list[str], progress: bool) -> FolderIndex:
    """Write it to the first of `paths` that can be written, and return it mapped from there; else as it is.

    The file appears whole or not at all; it is not flushed to the disk first, as a damaged one is found by its checksum.
    """
    reason = ""
    for path in paths:
        temporary = f"{path}.{secrets.token_hex(8)}.tmp"
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(index._buffer)
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(temporary)
                raise
            return _map(path)
        except OSError as error:
            reason = reason or f"{path}: cannot be written ({error.strerror})"
    if reason and progress:
        print(f"note: {reason}; what was found out about the images is not kept for the next start", file=sys.stderr)
    return index


@contextlib.contextmanager
def locked(paths: list[str], progress: bool) -> Iterator[None]:
    """Alone among the processes that use the index at `paths`; where no lock can be had, together with them.

    Without a lock the same work is done more than once, and the last result stays.
    """
    descriptor = None
    for path in paths:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            # A file of its own: the index itself is replaced, and a lock would stay with the old one.
            descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            break
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if progress:
                    print(f"note: waiting for another process, which makes the image index {path}", file=sys.stderr)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _load_first(
    paths: list[str], names: list[str], stamps: np.ndarray, progress: bool
) -> tuple[FolderIndex | None, FolderIndex | None]:
    """(an index that is right, one that is out of date but has parts to be used), each of them None if there is none."""
    previous = None
    for path in paths:
        try:
            found = _map(path)
            found.verify()
        except OSError:  # missing, as a rule
            continue
        except ValueError as error:
            if progress:
                print(f"note: the image index {path} is not used, {error}: scanning again", file=sys.stderr)
            continue
        if found.same_directories(names) and np.array_equal(found.stamps, stamps):
            return found, None
        previous = previous or found
    return None, previous


def _map(path: str) -> FolderIndex:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError("it is empty")
        return FolderIndex(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)


def _map_again(path: str, checksum: int) -> FolderIndex:
    """In another process of the run: the file that the first one has verified."""
    with contextlib.suppress(OSError, ValueError):
        index = _map(path)
        if index.checksum == checksum:
            return index
    raise UserError(f"{path}: the image index was changed while this run was starting; start it again")


def _require_own_file(path: str) -> None:
    """What --index names is replaced: it must be an index, even a damaged one, or nothing yet. Raises UserError."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--index {path}: cannot be read ({error.strerror})") from None
    if start and start != _MAGIC:
        raise UserError(f"--index {path}: is something else than an image index, and would be replaced; give another file")


def _require_writable(path: str) -> None:
    """Known before a scan of minutes. Raises UserError."""
    directory = os.path.dirname(path) or "."
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"--index {path}: cannot be written ({error.strerror}); give another file, or --index none") from None


def _checksum(buffer: bytes | bytearray | mmap.mmap) -> int:
    header = bytearray(buffer[: _HEADER.size])
    header[12:16] = bytes(4)
    with memoryview(buffer) as view:
        return zlib.crc32(view[_HEADER.size :], zlib.crc32(header))


def _sealed(buffer: bytearray) -> bytearray:
    """With the right checksum in its place."""
    buffer[12:16] = _checksum(buffer).to_bytes(4, "little")
    return buffer


# ---------------------------------------------------------------------------------------------------------------------
# The scan


def list_directories(root: str) -> list[str]:
    """The sorted names of the sub-directories; hidden ones are left out, links to directories are followed."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from None


def _list_images(directory: str) -> list[str]:
    """The sorted names of the images; hidden ones are left out. A broken link stays: it is reported as unreadable."""
    try:
        with os.scandir(directory) as entries:
            return sorted(
                entry.name for entry in entries
                if entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith(".") and not entry.is_dir()
            )
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read ({error.strerror})") from None


def _stamps(root: str, names: list[str]) -> np.ndarray:
    """int64 (D, 2): when each directory was modified and, which no program can set back, changed."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def of_chunk(chunk: range) -> array:
        values = array("q")
        for name in names[chunk.start : chunk.stop]:
            try:
                status = os.stat(name, dir_fd=descriptor)  # a shorter way than from the root
            except OSError as error:
                raise UserError(f"{root}/{name}: cannot be read ({error.strerror})") from None
            values.append(status.st_mtime_ns)
            values.append(status.st_ctime_ns)
        return values

    try:
        values = array("q")
        for part in in_chunks(of_chunk, len(names)):
            values.extend(part)
    finally:
        os.close(descriptor)
    return np.frombuffer(values, np.int64).reshape(-1, 2) if values else np.empty((0, 2), np.int64)


def _scan(
    root: str, names: list[str], kept_stamps: np.ndarray, stamps: np.ndarray, previous: FolderIndex | None, progress: bool
) -> bytearray:
    """Read the directories, but for those that `previous` has with the same stamp."""
    known: dict[str, int] = {}
    if previous is not None:
        known = {name: d for d, name in enumerate(previous.directories)}

    def of_chunk(chunk: range) -> list[tuple[bytes, np.ndarray, np.ndarray]]:
        parts = []
        for d in chunk:
            old = known.get(names[d])
            if old is not None and np.array_equal(previous.stamps[old], stamps[d]):
                parts.append(previous.taken_from(old))
            else:
                packed, ends = _pack(_list_images(f"{root}/{names[d]}"))
                parts.append((packed, ends.astype("<u4"), np.zeros(len(ends), np.uint8)))
        return parts

    parts: list[tuple[bytes, np.ndarray, np.ndarray]] = []
    with progress_bar("scanning directories", len(names), progress) as bar:
        for some in in_chunks(of_chunk, len(names)):
            parts += some
            bar.update(len(some))
    directory_bytes, directory_ends = _pack(names)
    first_byte = np.cumsum([0, *(len(packed) for packed, _, _ in parts)], dtype="<i8")
    first_image = np.cumsum([0, *(len(ends) for _, ends, _ in parts)], dtype="<i8")
    header = _HEADER.pack(_MAGIC, _VERSION, 0, len(names), first_image[-1], len(directory_bytes), first_byte[-1])
    empty = np.empty(0, np.uint8)
    buffer = bytearray().join((
        header, kept_stamps.astype("<i8").tobytes(), first_image.tobytes(), first_byte.tobytes(),
        directory_ends.astype("<i8").tobytes(), np.concatenate([empty.astype("<u4"), *(ends for _, ends, _ in parts)]).tobytes(),
        np.concatenate([empty, *(good for _, _, good in parts)]).tobytes(), directory_bytes, *(packed for packed, _, _ in parts),
    ))
    return _sealed(buffer)


def _pack(names: list[str]) -> tuple[bytes, np.ndarray]:
    """The names' bytes one after the other, and where each ends: int64."""
    text = "".join(names)
    packed = os.fsencode(text)
    # As many bytes as characters: then so it is in each name.
    lengths = map(len, names) if len(packed) == len(text) else (len(os.fsencode(name)) for name in names)
    return packed, np.cumsum(np.fromiter(lengths, np.int64, len(names)))


def in_chunks(work: Callable[[range], T], count: int) -> Iterator[T]:
    """work(range) for consecutive ranges of 0..count, in order; in threads where the first one waited for the disk."""
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    if not chunks:
        return
    started, computed = time.perf_counter(), time.thread_time()
    first = work(chunks[0])
    computed, elapsed = time.thread_time() - computed, time.perf_counter() - started
    yield first
    if elapsed > (1 + _WAITING_RATIO) * computed:
        with ThreadPoolExecutor(_THREADS) as threads:
            yield from threads.map(work, chunks[1:])
    else:
        yield from map(work, chunks[1:])


def progress_bar(what: str, total: int, progress: bool) -> tqdm:
    """On a terminal, for what takes longer than a second."""
    return tqdm(total=total, desc=what, delay=1.0, leave=False, disable=not (progress and sys.stderr.isatty()))
