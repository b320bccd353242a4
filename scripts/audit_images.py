"""The images that audit.py reads: those of test sets, what their pixels are, and their embeddings."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from data.decode import decode_image
from data.insightface_bin import PairBin
from data.pairs import PairImages, PairList
from data.progress import progress_bar
from scripts.embed import ImageFiles, find_images
from utils.checkpoint.weights import Weights
from utils.dist.context import DistContext
from utils.errors import UserError, printable
from utils.evaluation.embed import embed_images
from utils.evaluation.ijb import open_ijb
from utils.evaluation.neighbours import in_blocks
from utils.evaluation.protocol import Source
from utils.files import atomic_write, open_bounded

EMBED_IMAGES = 16_384  # between two places from which an interrupted run continues
THREADS = 8  # the decoders release the GIL


@dataclass
class TestSet:
    """Images that should not be in the training set. groups: int64 (T,), images of one number are of one person."""

    name: str
    images: Any  # what `picture` takes
    groups: np.ndarray
    image_name: Callable[[int], str]

    def read(self) -> None:
        """Decode all: hashes, uint64 (T,), of the pixels; usable, int64 (n,), images. Raises UserError if none is."""
        self.hashes, self.usable = hash_images(self.images, self.name)


def picture(images: Any, i: int) -> Tensor:
    """uint8 (3, 112, 112): image i of a training set or of files, or of a set that aligns when it reads."""
    return decode_image(*images.encoded(i)) if hasattr(images, "encoded") else images[i][0]


class Subset:
    """The images `indices`, int64 (n,), of `images`."""

    def __init__(self, images: Any, indices: np.ndarray) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return picture(self.images, int(self.indices[i])), 0


class EncodedSubset(Subset):
    """A Subset whose images the loading processes decode themselves, which is faster, and warns of damage."""

    def encoded(self, i: int) -> tuple[bytes, str]:
        return self.images.encoded(int(self.indices[i]))


def subset(images: Any, indices: np.ndarray) -> Subset:
    return (EncodedSubset if hasattr(images, "encoded") else Subset)(images, indices)


def open_tests(
    pair_lists: Sequence[str], imgs_root: str | None, bins: Sequence[str], ijb: Sequence[str], images: Sequence[str]
) -> list[TestSet]:
    """The sets of --test-pairs with --imgs-root, --test-bin, --test-ijb and --test-images. Raises UserError."""
    tests = []
    for path in pair_lists:
        root = imgs_root or os.path.join(os.path.dirname(path), "imgs")
        pairs = PairList(root, path, flag="--test-pairs", skip_missing=True)
        if pairs.skipped:
            print(f"warning: {path}: {pairs.skipped} pairs lack an image and are left out", file=sys.stderr)
        tests.append(TestSet(path, PairImages(pairs), components(
            pairs.num_images, pairs.index1[pairs.is_same], pairs.index2[pairs.is_same]), pairs.image_name))
    for path in bins:
        packed = PairBin(path, flag="--test-bin")
        tests.append(TestSet(path, PairImages(packed), components(
            packed.num_images, packed.index1[packed.is_same], packed.index2[packed.is_same]), packed.image_name))
    for path in ijb:
        faces = open_ijb(path, Source("ijb", path, "--test-ijb"))
        tests.append(TestSet(path, faces.images, faces.people(), faces.images.path))
    for path in images:
        if os.path.isdir(path):
            paths = find_images([path])
            people = [directory if (directory := os.path.dirname(one)) != path.rstrip("/") else one for one in paths]
        else:
            try:
                with io.TextIOWrapper(open_bounded(path, 2**30), "utf-8-sig", "surrogateescape") as file:
                    paths = [os.path.join(os.path.dirname(path), line.rstrip("\r\n")) for line in file if line.strip()]
            except OSError as error:
                raise UserError(f"--test-images {path}: cannot be read ({error.strerror})") from None
            people = paths
        if not paths:
            raise UserError(f"--test-images {path}: names no image; give a directory of images, or a list of paths")
        tests.append(TestSet(path, ImageFiles(paths), np.unique(people, return_inverse=True)[1], paths.__getitem__))
    return tests


def components(count: int, first: Iterable[int], second: Iterable[int]) -> np.ndarray:
    """int64 (count,): the smallest number that each of 0..count is connected with by the pairs (first, second)."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for one, other in zip(first, second):
        low, high = sorted((root(int(one)), root(int(other))))
        parent[high] = low
    return np.array([root(i) for i in range(count)], np.int64)


def hash_images(images: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Decode every image: (uint64 (N,) hashes of pixels, int64 (n,) images that can be used)."""
    count = len(images)
    hashes, errors = np.zeros(count, np.uint64), dict[int, str]()

    def work(chunk: tuple[int, int]) -> int:
        for i in range(*chunk):
            try:
                pixels = picture(images, i).numpy()
                hashes[i] = int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "little")
            except UserError as error:
                errors[i] = str(error)
        return chunk[1] - chunk[0]

    with ThreadPoolExecutor(THREADS) as threads, progress_bar(f"reading {what}", count, unit="image") as bar:
        for batch in in_blocks(count, 64 * 1024):  # a queue of all chunks would take memory
            chunks = [(batch[0] + start, batch[0] + stop) for start, stop in in_blocks(batch[1] - batch[0], 64)]
            for done in threads.map(work, chunks):
                bar.update(done)
    usable = np.delete(np.arange(count), list(errors))
    first = errors[min(errors)] if errors else ""
    if errors:
        print(f"warning: {what}: {len(errors)} of {count} images cannot be read and are left out; the first error: "
              f"{printable(first)}", file=sys.stderr)
    if not len(usable):
        raise UserError(f"{what}: no image can be used" + (f"; the first error: {first}" if first else ""))
    return hashes, usable


def embed(
    weights: Weights, source: str, images: Subset, hashes: np.ndarray, path: str, context: DistContext, what: str, *,
    batch_size: int, workers: int, flip: bool
) -> np.ndarray:
    """The unit embeddings of the images, float16 (n, d), mapped from the file `path`, zero where one is unusable.

    source: the file of the weights. what: the images, in messages. batch_size, workers, flip: as for embed_images.
    An interrupted run continues after its last EMBED_IMAGES images; a run over the same pixels embeds none.
    """
    state = os.stat(source)
    made_from = [os.path.realpath(source), state.st_size, state.st_mtime_ns, weights.arch,
                 weights.channel_order, flip, len(images), hashlib.blake2b(hashes.tobytes()).hexdigest()]
    width, note = int(weights.backbone.embedding_size), f"{path}.json"  # type: ignore[arg-type]
    done = 0
    try:
        with open(note, encoding="utf-8") as file:
            found = json.load(file)
        if found["made_from"] == made_from:
            rows, done = np.load(path, mmap_mode="r+"), found["done"]
            if rows.shape != (len(images), width) or rows.dtype != np.float16:
                done = 0
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        done = 0
    if not done:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note)  # before the rows that it is about
        rows = np.lib.format.open_memmap(path, "w+", np.float16, (len(images), width))
    elif done < len(images):
        print(f"{what}: continuing after {done:,} embeddings", flush=True)
    for start, stop in in_blocks(len(images), EMBED_IMAGES):
        if start < done:
            continue
        rows[start:stop] = embed_images(
            weights.backbone, subset(images.images, images.indices[start:stop]), context,
            batch_size=batch_size, workers=workers, flip=flip, name=what,
            mean_face=weights.mean_face if start == 0 else None)
        rows.flush()
        with atomic_write(note) as out:
            out.write(json.dumps({"made_from": made_from, "done": stop}).encode())
    return rows
