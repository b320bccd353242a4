"""Several training sets as one: `DIR1,DIR2`."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Sequence

import numpy as np

from data.recordio import RecordIODataset
from data.training_set import TrainingSet
from utils.errors import UserError

IDENTITIES = ("separate", "shared")


class UnionSet(TrainingSet):
    """The images of all sets, one set after the other.

    identities: "separate": each set's identities are people of their own, one set's classes after the other's. A name
    that an earlier set has too becomes NUMBER/name with the number of its set, from 1; so do all identities of a
    package without names. "shared": identities of the same name are one class. Classes have the order in which their
    names first appear, so both ways the first set keeps its labels.

    Beside what the sets hold, an identity costs 8 bytes and its place in the list of names, and an image nothing.
    Raises UserError for two sets that are the same, and for shared identities of a package without names.
    """

    def __init__(self, sets: Sequence[TrainingSet], identities: str) -> None:
        self.sets, self.root = list(sets), ", ".join(dataset.root for dataset in sets)
        for one, other in itertools.combinations(sets, 2):
            if os.path.realpath(one.root) == os.path.realpath(other.root):
                raise UserError(f"{one.root}: is given twice; give each training set once")
        self._mode = identities
        labels = dict[str, int]()
        self._label_of = []  # for each set: int64 (its identities,), the label of each
        for number, dataset in enumerate(sets, 1):
            nameless = isinstance(dataset, RecordIODataset) and all(
                name == str(label) for label, name in enumerate(dataset.identities))
            if nameless and identities == "shared":
                raise UserError(f"--identities shared: {dataset.root} has no names of identities, only label numbers; "
                                "put its train.identities.txt or train.lst beside it, or use --identities separate")
            own = np.empty(len(dataset.identities), np.int64)
            for label, name in enumerate(dataset.identities):
                if identities == "separate":
                    while name in labels or nameless and name == str(label):
                        name = f"{number}/{name}"
                own[label] = labels.setdefault(name, len(labels))
            self._label_of.append(own)
        self.identities = list(labels)
        self._count_images()

    @staticmethod
    def is_at(path: str) -> bool:
        return False  # data.formats decides

    def describe(self) -> str:
        return f"{len(self):,} of {len(self.identities):,} identities, {self._mode}: " + "; ".join(
            dataset.describe() for dataset in self.sets)

    def check_headers(self, skip_bad: bool, progress: bool) -> int:
        """Each set's own, and so are its errors."""
        self.skip_bad = skip_bad
        dropped = sum(dataset.check_headers(skip_bad, progress) for dataset in self.sets)
        self._count_images()
        return dropped

    def fingerprint(self) -> str:
        """That of the sets in their order, and of the labels of their identities."""
        formats = ",".join(type(dataset).__name__ for dataset in self.sets)
        digest = hashlib.blake2b(json.dumps([dataset.fingerprint() for dataset in self.sets]).encode(), digest_size=8)
        digest.update(json.dumps([zlib.crc32(labels.data) for labels in self._label_of]).encode())
        return f"{type(self).__name__}({formats}):{digest.hexdigest()}"

    def image_names(self, indices: np.ndarray) -> list[str]:
        """NUMBER/name, with the number of the set, from 1, and the image's name there."""
        places = [self._place(i) for i in indices.tolist()]
        names = [""] * len(places)
        for number, dataset in enumerate(self.sets):
            own = [k for k, (found, _) in enumerate(places) if found == number]
            for k, name in zip(own, dataset.image_names(np.array([places[k][1] for k in own], np.int64))):
                names[k] = f"{number + 1}/{name}"
        return names

    def find_images(self, names: Sequence[str]) -> np.ndarray:
        positions, total = np.full(len(names), -1), 0
        for number, dataset in enumerate(self.sets, 1):
            own = [k for k, name in enumerate(names) if name.startswith(f"{number}/")]
            found = dataset.find_images([names[k].partition("/")[2] for k in own])
            positions[own] = np.where(found >= 0, found + total, -1)
            total += dataset._count()
        return positions

    def drop(self, positions: np.ndarray) -> None:
        """positions: among all images of the sets."""
        total = 0
        for dataset in self.sets:
            count = dataset._count()
            dataset.drop(positions[(positions >= total) & (positions < total + count)] - total)
            total += count
        self._count_images()

    def _count_images(self) -> None:
        self._starts = [0, *itertools.accumulate(len(dataset) for dataset in self.sets)]

    def _count(self) -> int:
        return self._starts[-1]

    def _labels(self) -> np.ndarray:
        return np.concatenate([label_of[dataset.labels] for label_of, dataset in zip(self._label_of, self.sets)])

    def _label(self, position: int) -> int:
        number, i = self._place(position)
        dataset = self.sets[number]
        return int(self._label_of[number][dataset._label(dataset._position(i))])

    def _encoded(self, position: int) -> tuple[bytes, str]:
        number, i = self._place(position)
        return self.sets[number].encoded(i)

    def _find_bad(self, progress: bool) -> tuple[np.ndarray, str]:
        raise NotImplementedError("each set finds its own")

    def _place(self, position: int) -> tuple[int, int]:
        """(number of the set, number of the image in it). No set is empty."""
        number = bisect.bisect_right(self._starts, position) - 1
        return number, position - self._starts[number]
