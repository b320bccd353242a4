"""Images and identities that a training set is used without: the files of --exclude, which scripts/audit.py proposes.

A line is one of

    drop image IDENTITY/FILE
    drop identity NAME
    merge NAME into NAME

Blank lines and lines that begin with # are left out. A name is what follows, blanks included, as
TrainingSet.image_names and TrainingSet.identities have it. Names are file names: their bytes need not be text.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.training_set import TrainingSet
from utils.errors import UserError, printable
from utils.files import open_bounded

DROP_IMAGE, DROP_IDENTITY, MERGE, INTO = "drop image ", "drop identity ", "merge ", " into "
_MAX_BYTES = 2**30
_EXAMPLES = 3  # names that a message shows


@dataclass(frozen=True)
class Exclusions:
    """The lines of a file. merges: what follows `merge`: only the identities tell which of several " into " is meant.
    """

    path: str
    images: list[str]
    identities: list[str]
    merges: list[str]

    def digest(self) -> str:
        """A hash of the lines, in any order."""
        lines = json.dumps([sorted(set(kind)) for kind in (self.images, self.identities, self.merges)])
        return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()


def read_exclusions(path: str) -> Exclusions:
    """Raises UserError if the file cannot be read, or a line is none of those above."""
    found: dict[str, list[str]] = {DROP_IMAGE: [], DROP_IDENTITY: [], MERGE: []}
    try:
        with io.TextIOWrapper(open_bounded(path, _MAX_BYTES), "utf-8-sig", "surrogateescape", newline="\n") as file:
            for number, line in enumerate(file, 1):
                line = line.removesuffix("\n").removesuffix("\r")
                if not line.strip() or line.startswith("#"):
                    continue
                kind = next((kind for kind in found if line.startswith(kind) and line != kind), None)
                if kind is None or kind == MERGE and INTO not in line:
                    raise UserError(f"--exclude {path}:{number}: expected 'drop image IDENTITY/FILE', 'drop identity "
                                    f"NAME' or 'merge NAME into NAME', got {ascii(line[:120])}")
                found[kind].append(line[len(kind) :])
    except OSError as error:
        raise UserError(f"--exclude {path}: cannot be read ({error.strerror})") from None
    return Exclusions(path, found[DROP_IMAGE], found[DROP_IDENTITY], found[MERGE])


class ExcludingSet(TrainingSet):
    """`dataset` without what a file excludes. The file's images are dropped from `dataset` itself.

    Identities that are dropped or merged, or lose all their images so, get no label: later labels move up. Identities
    that had no image before keep theirs. Merged images get the label of the identity that they are merged into, which
    may be merged itself.

    merged: {identity: the identity that it is merged into, in the end}.

    Raises UserError for names that `dataset` does not have, contradictions, and if no image is left. Open it before
    check_headers: an image that is dropped may be a bad one.
    """

    def __init__(self, dataset: TrainingSet, exclusions: Exclusions) -> None:
        self.dataset, self.root, self._path = dataset, dataset.root, exclusions.path
        numbers = {name: label for label, name in enumerate(dataset.identities)}
        unknown = [f"identity {name}" for name in exclusions.identities if name not in numbers]
        dropped = {numbers[name] for name in exclusions.identities if name in numbers}
        into = self._read_merges(exclusions.merges, numbers, unknown)
        images = dataset.find_images(exclusions.images)
        unknown += [f"image {exclusions.images[k]}" for k in np.flatnonzero(images < 0)]
        if unknown:
            examples = printable(", ".join(unknown[:_EXAMPLES]))
            raise UserError(f"--exclude {self._path}: {len(unknown)} of its names are not in {self.root}, such as "
                            f"{examples}; correct the file, or give the training set that it was made for")
        label_of = self._follow(into, dropped)

        before = dataset.labels
        had_images = np.bincount(before, minlength=len(numbers)) > 0
        gone = np.isin(label_of, list(dropped))  # by old label; nothing is merged into those
        total = len(dataset)
        dataset.drop(np.union1d(images, np.flatnonzero(gone[before])))
        if not len(dataset):
            raise UserError(f"--exclude {self._path}: leaves no image of {self.root}; give another file")
        has_images = np.bincount(label_of[dataset.labels], minlength=len(numbers)) > 0
        keeps = ~gone & (label_of == np.arange(len(numbers))) & (has_images | ~had_images)
        self._label_of = np.where(keeps, np.cumsum(keeps) - 1, -1)[label_of]
        self.identities = [name for name, kept in zip(dataset.identities, keeps) if kept]
        self.merged = {dataset.identities[source]: dataset.identities[label_of[source]] for source in into}
        self._what = (f"{total - len(dataset):,} images, {len(numbers) - len(self.identities) - len(into):,} "
                      f"identities, {len(into):,} merged")

    def _read_merges(self, merges: Sequence[str], numbers: dict[str, int], unknown: list[str]) -> dict[int, int]:
        """{label: the label that it is merged into}. Names that are not known are added to `unknown`."""
        into: dict[int, int] = {}
        for text in merges:
            parts = text.split(INTO)
            pairs = [(INTO.join(parts[:k]), INTO.join(parts[k:])) for k in range(1, len(parts))]
            known = [pair for pair in pairs if pair[0] in numbers and pair[1] in numbers]
            if len(known) > 1:
                raise UserError(f"--exclude {self._path}: {MERGE}{text}: can be read in {len(known)} ways; rename an "
                                "identity")
            if not known:
                unknown += [f"identity {name}" for name in pairs[0] if name not in numbers]
                continue
            source, target = (numbers[name] for name in known[0])
            if into.setdefault(source, target) != target:
                raise UserError(f"--exclude {self._path}: {known[0][0]} is merged into two identities; keep one line")
        return into

    def _follow(self, into: dict[int, int], dropped: set[int]) -> np.ndarray:
        """int64 (identities,): where each label is merged to in the end, itself if it is not merged."""
        names, label_of = self.dataset.identities, np.arange(len(self.dataset.identities))
        for source in into:
            passed, at = {source}, into[source]
            while at in into and at not in passed and label_of[at] == at:
                passed.add(at)
                at = into[at]
            if at in passed:
                raise UserError(f"--exclude {self._path}: {names[source]} is merged into itself, over {len(passed)} "
                                "lines; remove one of them")
            at = int(label_of[at])  # of one that was followed before
            if source in dropped or at in dropped:
                raise UserError(f"--exclude {self._path}: {names[source]} is merged into {names[at]}, and "
                                f"{names[source if source in dropped else at]} is dropped; remove one of the lines")
            label_of[source] = at
        return label_of

    @staticmethod
    def is_at(path: str) -> bool:
        return False  # data.formats decides

    def describe(self) -> str:
        return (f"{len(self):,} of {len(self.identities):,} identities, without those in {self._path} ({self._what}): "
                f"{self.dataset.describe()}")

    def check_headers(self, skip_bad: bool, progress: bool) -> int:
        self.skip_bad = skip_bad
        return self.dataset.check_headers(skip_bad, progress)

    def fingerprint(self) -> str:
        """That of the data, which covers dropped images, and of the labels if they differ; the data's format."""
        if np.array_equal(self._label_of, np.arange(len(self._label_of))):
            return self.dataset.fingerprint()
        kind, _, digest = self.dataset.fingerprint().partition(":")
        return f"{kind}:{hashlib.blake2b(digest.encode() + self._label_of.tobytes(), digest_size=8).hexdigest()}"

    def image_names(self, indices: np.ndarray) -> list[str]:
        return self.dataset.image_names(indices)

    def find_images(self, names: Sequence[str]) -> np.ndarray:
        raise NotImplementedError("a file of exclusions is for the data themselves")

    def _count(self) -> int:
        return len(self.dataset)

    def _labels(self) -> np.ndarray:
        return self._label_of[self.dataset.labels]

    def _label(self, position: int) -> int:
        return int(self._label_of[self.dataset._label(self.dataset._position(position))])

    def _encoded(self, position: int) -> tuple[bytes, str]:
        return self.dataset.encoded(position)

    def _find_bad(self, progress: bool) -> tuple[np.ndarray, str]:
        raise NotImplementedError("the data find their own")
