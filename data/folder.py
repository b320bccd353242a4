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
    unused           uint8, JSON: {d: {extension: files that directory d has and that are not read}}
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from data.cache import CachedArrays, cache_paths, load_caches, save_cache
from data.decode import check_header, read_bytes
from data.progress import progress_bar
from data.training_set import TrainingSet
from utils.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
                    ".pbm", ".pnm", ".jp2", ".avif")
# What lies beside images and is no image. Any other file may be an image of a kind that is not read: it is mentioned.
_NO_IMAGES = (".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml", ".log", ".lst", ".list", ".db",
              ".ini", ".npy", ".npz", ".mat", ".pkl", ".pts")
INDEX_NAME = ".image-index"  # hidden: the scan does not take it for an image
_MADE_FROM = ["image folder", 2]  # kind and version of the arrays; what they were made from is in `stamps`
_DEEPER = "/"  # the extension, in `unused`, of images one directory deeper
_HINT_DIRECTORIES = 10_000  # where a message looks for the images that the user may have meant

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
    are sorted by name within their identity. Hidden entries and files without an image extension are ignored. A `train`
    that holds images and no sub-directories, beside other sub-directories, is an identity.

    progress: report on stderr, also what is not used: files of other kinds, images elsewhere, identities without any.

    Beside its name an image costs 5 bytes, in a file that all processes of a node map, or in each process if there is
    no such file. Raises UserError if the directory is missing, has no sub-directories, or these have no images.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, index: str | os.PathLike[str] = "none", progress: bool = False
    ) -> None:
        path = os.fspath(path)
        if not os.path.isdir(path):
            what = "is a file" if os.path.exists(path) else "no such directory"
            raise UserError(f"{path}: {what}; give a directory that holds one sub-directory of images per identity")
        self.root = _choose_root(path, progress)
        names, in_root = _list_root(self.root)
        if not names:
            flat = (f"; its {in_root} images lie in it directly: if they are of one person, give the directory above"
                    if in_root else "")
            raise UserError(f"{self.root}: has no sub-directories; images belong in {self.root}/<identity>/<image>"
                            + flat)
        self._cache_paths = cache_paths(os.path.join(self.root, INDEX_NAME), os.fspath(index))
        self._use(_open_cache(self.root, names, self._cache_paths, progress))
        unused = self._describe_unused(in_root)
        if not self._count():
            raise UserError(f"{self.root}: no images in its {len(names)} sub-directories; " + (_hint(self.root) or (
                f"expected {self.root}/<identity>/<image> with one of {', '.join(IMAGE_EXTENSIONS)}; found: {unused}")))
        if unused and progress:
            print(f"warning: {self.root}: not used: {unused}", file=sys.stderr)

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
        names = ("root", "skip_bad", "_dropped", "_left_before", "_cache_paths", "_cache")
        return {name: vars(self)[name] for name in names if name in vars(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._use(self._cache)

    def _describe_unused(self, in_root: int) -> str:
        """What the folder holds beside its images; "" for nothing worth a line. in_root: images in the root itself."""
        unused = _unused(self._cache)
        files = Counter[str]()
        for counts in unused.values():
            files.update(counts)
        deeper, parts = files.pop(_DEEPER, 0), []
        if files:
            parts.append(f"files of other kinds: {describe_files(files)}")
        if deeper:
            first = next(self._directories[d] for d, counts in unused.items() if _DEEPER in counts)
            parts.append(f"{deeper} image{'s' * (deeper > 1)} one directory deeper, such as below {self.root}/{first}")
        if in_root:
            parts.append(f"{in_root} image{'s' * (in_root > 1)} in {self.root} itself")
        empty = [name for name, count in zip(self._directories, np.diff(self._cache["first_image"])) if not count]
        if empty:
            names = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            parts.append(f"{len(empty)} sub-directories without an image, which get no label: {names}")
        return "; ".join(parts)

    def path(self, i: int) -> str:
        """The file of image i."""
        return self._path(self._position(i))

    def image_names(self, indices: np.ndarray) -> list[str]:
        return [self.path(i)[len(self.root) + 1 :] for i in indices.tolist()]

    def find_images(self, names: Sequence[str]) -> np.ndarray:
        positions, wanted = np.full(len(names), -1), dict[str, list[int]]()
        for k, name in enumerate(names):
            wanted.setdefault(name.partition("/")[0], []).append(k)
        for d, directory in enumerate(self._directories):
            if directory in wanted:
                there = {self._path(position)[len(self.root) + 1 :]: position
                         for position in range(self._first_image[d], self._first_image[d + 1])}
                for k in wanted[directory]:
                    positions[k] = there.get(names[k], -1)
        return positions

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
        d = bisect.bisect_right(self._first_image, position) - 1
        if not 0 <= d < len(self._directories):  # the mapped file was truncated, and its last page reads as zeros
            raise UserError(f"{self.root}: the list of its images, in a file that this run reads, was truncated; start "
                            "the run again with --resume auto")
        return d

    def _path(self, position: int) -> str:
        d = self._directory(position)
        base, ends = self._first_byte[d], self._name_ends
        start = ends[position - 1] if position > self._first_image[d] else 0
        name = os.fsdecode(bytes(self._image_names[base + start : base + ends[position]]))
        return f"{self.root}/{self._directories[d]}/{name}"

    def _identify(self) -> list[int]:
        """Without directories that have no image: those change nothing."""
        counts = np.diff(self._cache["first_image"])
        return [*(self._cache.checksum(name) for name in ("image_names", "name_ends")),
                zlib.crc32(counts[counts > 0].tobytes()), zlib.crc32(b"\0".join(map(os.fsencode, self.identities)))]

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
    unused: dict[str, int]  # how many files are not read, by extension


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def unused_extension(name: str) -> str | None:
    """The extension of a file that is not read, though it may be an image; None if it is read, hidden or surely none.

    "" for a name without an extension.
    """
    extension = os.path.splitext(name)[1].lower()
    return None if name.startswith(".") or extension in IMAGE_EXTENSIONS + _NO_IMAGES else extension


def describe_files(counts: Mapping[str, int]) -> str:
    """Counts by extension as text, such as "12 .heic, 3 without extension"."""
    common = Counter(counts).most_common()
    shown = [f"{count} {extension if len(extension) <= 12 else ascii(extension[:12])}" if extension else
             f"{count} without extension" for extension, count in common[:5]]
    others = sum(count for _, count in common[5:])
    return ", ".join(shown + [f"{others} others"] * (others > 0))


def _choose_root(path: str, progress: bool) -> str:
    """`path/train` if it is a directory of identities, else `path`. progress: say on stderr what is not obvious."""
    train = os.path.join(path, "train")
    if not os.path.isdir(train):
        return path
    others = [name for name in _list_root(path)[0] if name != "train"]
    below, images = _list_root(train)
    if images and others and not below:
        if progress:
            print(f"note: {train} holds images and no sub-directories: it is an identity of {path}", file=sys.stderr)
        return path
    if progress:
        other = next((name for name in others if _count_images(os.path.join(path, name))), None)
        if other is not None:
            print(f"warning: {path}: the training set is {train}; images such as those in {os.path.join(path, other)} "
                  "are not used", file=sys.stderr)
    return train


def _hint(root: str) -> str:
    """Where images lie deeper than <identity>/<image>: what to give instead of `root`."""
    for directory, _, files in itertools.islice(os.walk(root), 1, _HINT_DIRECTORIES):
        if any(map(is_image, files)):
            return f"there are images in {directory}: give {os.path.dirname(directory)}"
    return ""


def _open_cache(root: str, names: list[str], paths: list[str], progress: bool) -> CachedArrays:
    """List the images in the directories `names` of `root`. Valid parts come from a cache, the rest from a scan."""
    started = time.time_ns()
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
        "unused": np.frombuffer(json.dumps({d: some.unused for d, some in enumerate(images) if some.unused}).encode(),
                                np.uint8),
    }, paths, progress)


def _is_sound(cache: CachedArrays) -> bool:
    """Whether the arrays fit together. Names can be wrong: who writes the index can as well write the images."""
    images, directories, letters = (
        len(cache[name]) if name in cache.arrays else 0 for name in ("name_ends", "directory_ends", "image_names"))
    return cache.has(
        stamps=("<i8", (directories, 2)), first_image=("<i8", (directories + 1,)), name_ends=("<u4", (images,)),
        first_byte=("<i8", (directories + 1,)), directory_ends=("<i8", (directories,)),
        header_is_good=("|u1", (images,)), directory_names=("|u1", (-1,)), image_names=("|u1", (letters,)),
        unused=("|u1", (-1,)),
    ) and all(starts[0] == 0 and starts[-1] == end and bool((np.diff(starts) >= 0).all())
              for starts, end in ((cache["first_image"], images), (cache["first_byte"], letters)))


def _directories(cache: CachedArrays) -> list[str]:
    names, ends = cache["directory_names"].tobytes(), cache["directory_ends"].tolist()
    return [os.fsdecode(names[start:end]) for start, end in zip([0, *ends], ends)]


def _unused(cache: CachedArrays) -> dict[int, dict[str, int]]:
    """The cache's array of this name. Nothing if it is malformed: it only decides what is said."""
    with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError, RecursionError):
        unused = {int(d): {str(extension): int(count) for extension, count in counts.items()}
                  for d, counts in json.loads(cache["unused"].tobytes()).items()}
        if all(0 <= d < len(cache["directory_ends"]) for d in unused):
            return unused
    return {}


def _pack(names: list[str]) -> tuple[bytes, np.ndarray]:
    """The names' bytes one after the other, and where each ends: int64."""
    encoded = [os.fsencode(name) for name in names]
    return b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64)


def _list_root(directory: str) -> tuple[list[str], int]:
    """(the sorted names of the sub-directories, without hidden ones; how many images lie beside them).

    Raises UserError.
    """
    names, images = [], 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        names.append(entry.name)
                else:
                    images += is_image(entry.name)
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read ({error.strerror})") from None
    return sorted(names), images


def _list_images(directory: str) -> tuple[list[str], dict[str, int]]:
    """(the sorted names of the images, how many other files there are by extension). Raises UserError.

    A broken link is an image, too: it is reported as unreadable.
    """
    images, unused = [], Counter[str]()
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        unused[_DEEPER] += _count_images(entry.path)
                elif is_image(entry.name):
                    images.append(entry.name)
                elif (extension := unused_extension(entry.name)) is not None:
                    unused[extension] += 1
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read ({error.strerror})") from None
    return sorted(images), dict(+unused)


def _count_images(directory: str) -> int:
    """The images in a directory that is not one of an identity; 0 if it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return sum(is_image(entry.name) and not entry.is_dir() for entry in entries)
    except OSError:
        return 0


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
    unused = {} if previous is None else _unused(previous)

    def of_chunk(chunk: range) -> list[_Images]:
        images = []
        for d in chunk:
            old = known.get(names[d])
            if previous is not None and old is not None and np.array_equal(previous["stamps"][old], stamps[d]):
                numbers, letters = (slice(*previous[first][old : old + 2]) for first in ("first_image", "first_byte"))
                images.append(_Images(previous["image_names"][letters].tobytes(), previous["name_ends"][numbers],
                                      previous["header_is_good"][numbers], unused.get(old, {})))
            else:
                listed, others = _list_images(f"{root}/{names[d]}")
                packed, ends = _pack(listed)
                images.append(_Images(packed, ends, np.zeros(len(ends), np.uint8), others))
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
