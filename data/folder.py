"""Aligned 112x112 face images in one directory per identity: `ROOT/<identity>/<image>`.

A cache (data.cache) spares the next start the scan: the sub-directories are listed again, and each one's times of
modification and of change are compared. While they are the same, no file has been added, removed or renamed; only
directories that differ are read again. The cache also remembers which images have a good header.

Its arrays, for D directories (sorted by name, empty ones included) and N images (sorted within theirs):

    stamps           int64 (D, 2)   nanoseconds; (0, 0): unreliable, read the directory again
    first_image      int64 (D + 1)  directory d has the images first_image[d] to first_image[d + 1] - 1
    first_byte       int64 (D + 1)  and their names start at first_byte[d] of image_names
    directory_ends   int64 (D,)     where each directory's name ends in directory_names
    name_ends        uint32 (N,)    where each image's name ends, counted from its directory's first_byte
    header_is_good   uint8 (N,)
    directory_names, image_names: uint8, the names as the file system has them, without separators
"""

from __future__ import annotations

import bisect
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from data.cache import CachedArrays, cache_paths, load_caches, save_cache
from data.decode import check_header, read_bytes
from data.progress import progress_bar
from data.training_set import TrainingSet
from utils.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
INDEX_NAME = ".image-index"  # hidden: the scan does not take it for an image
_MADE_FROM = ["image folder", 1]  # kind and version of the arrays; what they were made from is in `stamps`

# A directory that changed just before it was read may change again within the same tick of its file system's clock (2 s
# with FAT, 1 s with some network disks) and keep its stamp: such a stamp is unreliable.
_SETTLED_SECONDS = 2.0

# Threads hide the latency of cold files and network disks, but for cached files they only compete for the interpreter:
# headers of 18,000 files/s with 8 threads, of 57,000 in a plain loop. The first chunk, in a loop, decides.
_THREADS = 8
_CHUNK = 256
_WAITING_RATIO = 2.0  # waiting for so many times the time of computing: a slow disk

T = TypeVar("T")


class FaceFolder(TrainingSet):
    """The images below `path/train` if that directory exists, else below `path`: `<identity>/<image>`, not deeper.

    Identities are the sorted names of the sub-directories that hold images (links to directories are followed); images
    are sorted by name within their identity. Hidden entries and files without an image extension are ignored.

    Beside its name an image costs 5 bytes, in a file that all processes of a node map, or in each process if there is
    no such file. Raises UserError if the directory is missing, has no sub-directories, or these have no images.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, index: str | os.PathLike[str] = "none", progress: bool = False
    ) -> None:
        path = os.fspath(path)
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such directory; it must hold one sub-directory of images per identity")
        train = os.path.join(path, "train")
        self.root = train if os.path.isdir(train) else path
        self._cache_paths = cache_paths(os.path.join(self.root, INDEX_NAME), os.fspath(index))
        self._use(_open_cache(self.root, self._cache_paths, progress))
        if not self._directories:
            raise UserError(f"{self.root}: has no sub-directories; images belong in {self.root}/<identity>/<image>")
        if not self._count():
            raise UserError(f"{self.root}: no images in its {len(self._directories)} sub-directories; expected "
                            f"{self.root}/<identity>/<image> with one of {', '.join(IMAGE_EXTENSIONS)}")

    @staticmethod
    def is_at(path: str) -> bool:
        return os.path.isdir(path)

    def _use(self, cache: CachedArrays) -> None:
        self._cache = cache
        # A single element comes out of a memoryview in a tenth of the time.
        self._first_image, self._first_byte, self._name_ends, self._image_names = (
            cache[name].data for name in ("first_image", "first_byte", "name_ends", "image_names")
        )
        self._directories = _directories(cache)
        has_images = np.diff(cache["first_image"]) > 0
        self._label_of = np.cumsum(has_images, dtype=np.int32) - 1  # (D,): the label of each directory with images
        self.identities = list(itertools.compress(self._directories, has_images))

    def __getstate__(self) -> dict[str, Any]:
        """Without what follows from the cache: another process maps it, or receives it once."""
        return {name: vars(self)[name] for name in ("root", "skip_bad", "_dropped", "_cache_paths", "_cache")
                if name in vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._use(self._cache)

    def path(self, i: int) -> str:
        """The file of image i."""
        return self._path(self._position(i))

    def _count(self) -> int:
        return len(self._name_ends)

    def _labels(self) -> np.ndarray:
        return np.repeat(self._label_of.astype(np.int64), np.diff(self._cache["first_image"]))

    def _label(self, position: int) -> int:
        return int(self._label_of[self._directory(position)])

    def _encoded(self, position: int) -> tuple[bytes, str]:
        path = self._path(position)
        return read_bytes(path), path

    def _directory(self, position: int) -> int:
        return bisect.bisect_right(self._first_image, position) - 1

    def _path(self, position: int) -> str:
        d = self._directory(position)
        base, ends = self._first_byte[d], self._name_ends
        start = ends[position - 1] if position > self._first_image[d] else 0
        name = os.fsdecode(bytes(self._image_names[base + start : base + ends[position]]))
        return f"{self.root}/{self._directories[d]}/{name}"

    def _find_bad(self, progress: bool) -> tuple[np.ndarray, str]:
        """The cache remembers good headers, for as long as their directory has the same files. Bad ones are checked at
        every start: repairing a file need not change its directory."""
        unchecked = np.setdiff1d(np.flatnonzero(self._cache["header_is_good"] == 0), self._dropped, assume_unique=True)

        def check(chunk: range) -> list[tuple[int, str]]:
            errors = []
            for position in unchecked[chunk.start : chunk.stop].tolist():
                try:
                    check_header(self._path(position))
                except UserError as error:
                    errors.append((position, str(error)))
            return errors

        with progress_bar("checking images", len(unchecked), progress) as bar:
            errors = list(_in_chunks(check, len(unchecked), bar))
        bad = np.array([position for position, _ in errors], dtype=np.int64)
        good = np.setdiff1d(unchecked, bad, assume_unique=True)
        if len(good):
            header_is_good = self._cache["header_is_good"].copy()
            header_is_good[good] = 1
            arrays = {**self._cache.arrays, "header_is_good": header_is_good}
            self._use(save_cache(_MADE_FROM, arrays, self._cache_paths, progress))
        return bad, errors[0][1] if errors else ""


# ---------------------------------------------------------------------------------------------------------------------
# The scan and its cache


class _Images(NamedTuple):
    """The images of one directory."""

    names: bytes
    ends: np.ndarray  # (images,): where each name ends
    header_is_good: np.ndarray  # uint8 (images,)


def _open_cache(root: str, paths: list[str], progress: bool) -> CachedArrays:
    """List the images in `root`. Valid parts come from a cache, the rest from a scan."""
    started = time.time_ns()
    names = _list(root, lambda entry: entry.is_dir())
    stamps = _stamps(root, names)
    previous = None
    for found in filter(_is_sound, load_caches(paths, _MADE_FROM, progress)):
        if _directories(found) == names and np.array_equal(found["stamps"], stamps):
            return found
        previous = previous or found
    # `started` is before the directories are read: what changes while they are read is seen at the next start.
    reliable = stamps.max(axis=1, initial=0) < started - int(_SETTLED_SECONDS * 1e9)
    images = _scan(root, names, stamps, previous, progress)
    packed, ends = _pack(names)
    return save_cache(_MADE_FROM, {
        "stamps": np.where(reliable[:, None], stamps, 0),
        "first_image": np.cumsum([0, *(len(some.ends) for some in images)], dtype=np.int64),
        "first_byte": np.cumsum([0, *(len(some.names) for some in images)], dtype=np.int64),
        "directory_ends": ends,
        "name_ends": np.concatenate([np.empty(0, np.uint32), *(some.ends.astype(np.uint32) for some in images)]),
        "header_is_good": np.concatenate([np.empty(0, np.uint8), *(some.header_is_good for some in images)]),
        "directory_names": np.frombuffer(packed, np.uint8),
        "image_names": np.frombuffer(b"".join(some.names for some in images), np.uint8),
    }, paths, progress)


def _is_sound(cache: CachedArrays) -> bool:
    """Whether the arrays fit together. Names can be wrong: who writes the index can as well write the images."""
    images, directories, letters = (
        len(cache[name]) if name in cache.arrays else 0 for name in ("name_ends", "directory_ends", "image_names"))
    return cache.has(
        stamps=("<i8", (directories, 2)), first_image=("<i8", (directories + 1,)), name_ends=("<u4", (images,)),
        first_byte=("<i8", (directories + 1,)), directory_ends=("<i8", (directories,)),
        header_is_good=("|u1", (images,)), directory_names=("|u1", (-1,)), image_names=("|u1", (letters,)),
    ) and all(starts[0] == 0 and starts[-1] == end and bool((np.diff(starts) >= 0).all())
              for starts, end in ((cache["first_image"], images), (cache["first_byte"], letters)))


def _directories(cache: CachedArrays) -> list[str]:
    names, ends = cache["directory_names"].tobytes(), cache["directory_ends"].tolist()
    return [os.fsdecode(names[start:end]) for start, end in zip([0, *ends], ends)]


def _pack(names: list[str]) -> tuple[bytes, np.ndarray]:
    """The names' bytes one after the other, and where each ends: int64."""
    encoded = [os.fsencode(name) for name in names]
    return b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64)


def _list(directory: str, is_wanted: Callable[[os.DirEntry], bool]) -> list[str]:
    """The sorted names of what is wanted, without hidden ones. Raises UserError."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and is_wanted(entry))
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read ({error.strerror})") from None


def _list_images(directory: str) -> list[str]:
    """A broken link is an image, too: it is reported as unreadable."""
    return _list(directory, lambda entry: entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.is_dir())


def _stamps(root: str, names: list[str]) -> np.ndarray:
    """int64 (D, 2): when each directory was modified and when it was changed, which no program can set back."""

    def of_chunk(chunk: range) -> list[tuple[int, int]]:
        try:
            results = [os.stat(f"{root}/{names[d]}") for d in chunk]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
        return [(result.st_mtime_ns, result.st_ctime_ns) for result in results]

    return np.array(list(_in_chunks(of_chunk, len(names))), np.int64).reshape(-1, 2)


def _scan(
    root: str, names: list[str], stamps: np.ndarray, previous: CachedArrays | None, progress: bool
) -> list[_Images]:
    """The images of each directory: of the previous cache if the stamp is the same, else of the disk."""
    known = {} if previous is None else {name: d for d, name in enumerate(_directories(previous))}

    def of_chunk(chunk: range) -> list[_Images]:
        images = []
        for d in chunk:
            old = known.get(names[d])
            if previous is not None and old is not None and np.array_equal(previous["stamps"][old], stamps[d]):
                numbers, letters = (slice(*previous[first][old : old + 2]) for first in ("first_image", "first_byte"))
                images.append(_Images(previous["image_names"][letters].tobytes(), previous["name_ends"][numbers],
                                      previous["header_is_good"][numbers]))
            else:
                packed, ends = _pack(_list_images(f"{root}/{names[d]}"))
                images.append(_Images(packed, ends, np.zeros(len(ends), np.uint8)))
        return images

    with progress_bar("scanning directories", len(names), progress) as bar:
        return list(_in_chunks(of_chunk, len(names), bar))


def _in_chunks(work: Callable[[range], list[T]], count: int, bar: tqdm | None = None) -> Iterator[T]:
    """What work(range) gives for consecutive ranges of 0..count, in order; in threads if the first waited on disk."""
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    started, computed = time.perf_counter(), time.thread_time()
    results = [work(chunk) for chunk in chunks[:1]]
    waited = time.perf_counter() - started > (1 + _WAITING_RATIO) * (time.thread_time() - computed)
    with ThreadPoolExecutor(_THREADS) as threads:
        others = (threads.map if waited else map)(work, chunks[1:])
        for chunk, found in zip(chunks, itertools.chain(results, others)):
            yield from found
            if bar is not None:
                bar.update(len(chunk))
