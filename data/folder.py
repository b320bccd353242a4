"""Aligned 112x112 face images in one directory per identity: `ROOT/<identity>/<image>`."""

from __future__ import annotations

import os
import sys
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from data.decode import check_header, read_image
from utils.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Threads hide the latency of cold files and network disks, but for cached files they only fight over the interpreter:
# 18,000 files/s with 8 threads, 57,000 with a plain loop. So the first chunk, in a loop, decides.
_HEADER_THREADS = 8
_HEADER_CHUNK = 256
_SLOW_FILE_SECONDS = 100e-6


class FaceFolder(Dataset):
    """The images below `root/train` if that directory exists, else below `root`: `<identity>/<image>`, not deeper.

    Identities are the sorted names of the sub-directories that hold images (links to directories are followed) and get
    the labels 0, 1, ...; images are sorted by name within their identity. Hidden entries and files without an image
    extension are ignored. folder[i] is (uint8 (3, 112, 112), label); read_image tells what it raises.

    Attributes: root (the directory really used), identities (their names, by label), skip_bad (False: a bad image is
    an error; True: the training loader replaces it by the next readable one).

    Beside its name an image costs 14 bytes, so the object is cheap to send to other processes.
    Raises UserError where the directory is missing, has no sub-directories, or these have no images.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        root = os.fspath(root)
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such directory; it must hold one sub-directory of images per identity")
        train = os.path.join(root, "train")
        self.root = train if os.path.isdir(train) else root
        self.identities: list[str] = []
        self.skip_bad = False

        names = bytearray()  # all file names without a separator: a list of a million strings costs 60 MB more
        ends = array("q")
        counts = []
        directories = _sorted_entries(self.root, directories=True)
        for identity in directories:
            images = _sorted_entries(os.path.join(self.root, identity), directories=False)
            if images:
                self.identities.append(identity)
                counts.append(len(images))
            for image in images:
                names += os.fsencode(image)
                ends.append(len(names))

        if not directories:
            raise UserError(f"{self.root}: has no sub-directories; images belong in {self.root}/<identity>/<image>")
        if not counts:
            raise UserError(
                f"{self.root}: no images in its {len(directories)} sub-directories; "
                f"expected {self.root}/<identity>/<image> with one of {', '.join(IMAGE_EXTENSIONS)}"
            )
        self._names = bytes(names)
        boundaries = np.concatenate([[0], np.frombuffer(ends, dtype=np.int64)])
        self._starts = boundaries[:-1]
        self._lengths = np.diff(boundaries).astype(np.uint16)
        self._labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @property
    def labels(self) -> np.ndarray:
        """int64 (len,), made anew on each access."""
        return self._labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def path(self, i: int) -> str:
        """Where image i lies."""
        start = int(self._starts[i])
        name = os.fsdecode(self._names[start : start + int(self._lengths[i])])
        return f"{self.root}/{self.identities[self._labels[i]]}/{name}"

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return read_image(self.path(i)), int(self._labels[i])

    def check_headers(self, skip_bad: bool, progress: bool) -> int:
        """Open every file and look at its header, before training does; returns how many images were dropped.

        A bad file is unreadable, empty, no image, or not 112x112 (damage beyond the header shows when it is decoded).
        skip_bad False: bad files raise one UserError, which names the first of them. True: they are dropped, and
        training will replace what turns out bad later (the attribute skip_bad). An identity that loses all its images
        keeps its label, so that labels do not depend on which files could be read.
        progress: tell on stderr, with a bar if that is a terminal and the check takes longer than a second, and with
        one line about dropped images. One process of a run does that; the others give False.
        """
        self.skip_bad = skip_bad
        bad: list[int] = []
        first_error = ""
        visible = progress and sys.stderr.isatty()
        with tqdm(total=len(self), desc="checking images", delay=1.0, leave=False, disable=not visible) as bar:
            for checked, errors in self._header_errors():
                for i, error in errors:
                    first_error = first_error or error
                    bad.append(i)
                bar.update(checked)
        if not bad:
            return 0
        count = f"{len(bad)} of {len(self)} images are bad" if len(bad) > 1 else f"1 of {len(self)} images is bad"
        if not skip_bad:
            raise UserError(f"{first_error} ({count}; --skip-bad-images trains without them)")
        if len(bad) == len(self):
            raise UserError(f"{self.root}: no image can be used; the first one: {first_error}")
        self._drop(bad)
        if progress:
            empty = len(self.identities) - len(np.unique(self._labels))
            note = f"; identities that have no image left and keep their label: {empty}" if empty else ""
            print(f"warning: {count} and skipped, the first one: {first_error}{note}", file=sys.stderr)
        return len(bad)

    def _header_errors(self) -> Iterator[tuple[int, list[tuple[int, str]]]]:
        """Walk all images in order; yields (images checked, [(bad image, its error)]) chunk by chunk."""
        chunks = [range(start, min(start + _HEADER_CHUNK, len(self))) for start in range(0, len(self), _HEADER_CHUNK)]
        started = time.perf_counter()
        errors = self._chunk_errors(chunks[0])
        slow = time.perf_counter() - started > _SLOW_FILE_SECONDS * len(chunks[0])
        yield len(chunks[0]), errors
        with ThreadPoolExecutor(_HEADER_THREADS) as threads:
            run = threads.map if slow else map
            for chunk, errors in zip(chunks[1:], run(self._chunk_errors, chunks[1:])):
                yield len(chunk), errors

    def _chunk_errors(self, chunk: range) -> list[tuple[int, str]]:
        errors = []
        for i in chunk:
            try:
                check_header(self.path(i))
            except UserError as error:
                errors.append((i, str(error)))
        return errors

    def _drop(self, bad: list[int]) -> None:
        keep = np.ones(len(self), dtype=bool)
        keep[bad] = False
        self._starts, self._lengths, self._labels = self._starts[keep], self._lengths[keep], self._labels[keep]


def _sorted_entries(directory: str, *, directories: bool) -> list[str]:
    """The names of the sub-directories, or of the images, in `directory`; hidden entries are left out."""
    names = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                wanted = directories or os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS
                # is_dir follows links; a broken link to an image stays in the list, to be reported as unreadable.
                if wanted and not entry.name.startswith(".") and entry.is_dir() == directories:
                    names.append(entry.name)
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read ({error.strerror})") from None
    return sorted(names)
