"""Pairs of images scored by the LFW protocol: a pair list, or one of insightface's .bin files.

Shapes: U images, P pairs, d embedding size.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from data.insightface_bin import PairBin
from data.pairs import PairImages, PairList, PairSet
from utils.errors import UserError
from utils.evaluation.lfw import TARGET_FAR, evaluate_distances, squared_distance, usable_folds
from utils.evaluation.operating_points import PairScores
from utils.evaluation.plots import MONTAGE_COLUMNS
from utils.evaluation.protocol import MontageSection, Result, RocCurve, Source

FOLDS = 10
MONTAGE_PAIRS = 2 * MONTAGE_COLUMNS  # of each kind of error


class PairEvalSet:
    """An EvalSet (see protocol.py) of image pairs. Raises UserError if a label has fewer than two."""

    fingerprint = None

    def __init__(self, name: str, pairs: PairSet) -> None:
        self.name, self.source, self.pairs, self.images = name, pairs.path, pairs, PairImages(pairs)
        try:
            self.folds = usable_folds(pairs.is_same, FOLDS)
        except UserError as error:
            raise UserError(f"{pairs.flag} {pairs.path}: {error}") from None
        skipped = f", {pairs.skipped:,} skipped for missing images" if pairs.skipped else ""
        self.size = f"{len(pairs):,} pairs{skipped}"
        self.contents = (f"{len(pairs)} pairs of {pairs.path}, {np.count_nonzero(pairs.is_same)} of them same, "
                         f"{pairs.num_images} images{skipped}")

    def score(self, embeddings: np.ndarray) -> Result:
        """Apply the LFW protocol to (U, d) embeddings."""
        pairs = self.pairs
        distance = squared_distance(embeddings[pairs.index1], embeddings[pairs.index2])
        result = evaluate_distances(distance, pairs.is_same, FOLDS)
        self._warn(embeddings, result.far)
        rates = ", ".join(f"{far} {tar:.5f}" for far, tar in result.tar_at_far.items())
        return Result(
            headline=result.accuracy,
            summary=f"{100 * result.accuracy:.2f}% +- {100 * result.accuracy_std:.2f}",
            metrics={**{name: value for name, value in vars(result).items() if isinstance(value, (int, float))},
                     **{f"tar_at_far_{far}": tar for far, tar in result.tar_at_far.items()}},
            report=str(result),
            details=f"accuracy at exact thresholds {result.exact_accuracy:.5f}+-{result.exact_accuracy_std:.5f}; "
                    + (f"TAR at FAR {rates}" if rates else "too few different pairs for a TAR at FAR 1e-1"),
            json=result.to_json_dict(),
            curves=[RocCurve(self.name, result.fpr, result.tpr, result.accuracy, result.auc)],
            montage=lambda: self.montage(distance, result.threshold),
            scores=lambda: self.scores(distance),
        )

    def scores(self, distance: np.ndarray) -> PairScores:
        """The cosines of the pairs' embeddings, and whose images they are. distance: as for `montage`."""
        pairs = self.pairs
        identity, how = identities_of(pairs)
        return PairScores(1 - distance / 2, pairs.is_same, identity[pairs.index1], identity[pairs.index2], how)

    def _warn(self, embeddings: np.ndarray, far: float) -> None:
        """Print what makes the numbers doubtful to stderr."""
        pairs = self.pairs
        if self.folds < FOLDS:
            print(f"warning: too few pairs of a label for {FOLDS} folds; using {self.folds}", file=sys.stderr)
        with_itself = np.count_nonzero(pairs.index1 == pairs.index2)
        if with_itself:
            print(f"warning: {with_itself} of {len(pairs)} pairs are an image with itself; they count, as in the "
                  "protocol, but their distance is 0 with any model", file=sys.stderr)
        unusable = np.logical_not(embeddings.any(axis=1))
        if unusable.any():
            affected = np.count_nonzero(unusable[pairs.index1] | unusable[pairs.index2])
            print(f"warning: {affected} of {len(pairs)} pairs lack a usable embedding and count as errors; "
                  f"the first such image: {pairs.image_name(int(np.argmax(unusable)))}", file=sys.stderr)
        # With few pairs the measured FAR is coarse, and a few false accepts are no sign of trouble.
        if far > 10 * TARGET_FAR and far * np.count_nonzero(~pairs.is_same) > 10:
            print(f"warning: the validation rate means little: the false accept rate is {far:.5f}, "
                  f"not {TARGET_FAR:g} (do many distances coincide?)", file=sys.stderr)

    def montage(self, distance: np.ndarray, threshold: float) -> list[MontageSection]:
        """The worst false accepts and false rejects. distance: float64 (P,), NaN where a pair has none."""
        pairs, images, sections = self.pairs, self.images, []
        for label, kind, meaning in ((False, "false accepts", "different people, distance below"),
                                     (True, "false rejects", "one person, distance at least")):
            of_label, undecidable = pairs.is_same == label, np.isnan(distance)
            wrong = np.flatnonzero(of_label & ~undecidable & ((distance < threshold) != label))
            worst = wrong[np.argsort(-distance[wrong] if label else distance[wrong], kind="stable")][:MONTAGE_PAIRS]
            count, left_out = np.count_nonzero(of_label), np.count_nonzero(of_label & undecidable)
            title = (f"{self.name}: {len(wrong)} {kind} of {count} pairs ({meaning} {threshold:.2f})"
                     + ("; the worst ones" if len(wrong) > len(worst) else "")
                     + (f"; {left_out} without a distance" if left_out else ""))
            sections.append(MontageSection(title, [
                (images[pairs.index1[p]][0].numpy(), images[pairs.index2[p]][0].numpy(),
                 f"pair {p + 1}: distance {distance[p]:.3f}") for p in worst]))
        return sections


def identities_of(pairs: PairSet) -> tuple[np.ndarray, str]:
    """(the number of each image's identity, int64 (U,); how they are known).

    Images that same pairs join, directly or through others, are of one identity. Images of a directory are too, unless
    a different pair has both its images in one: then the directories are no identities.
    """
    group, how = np.arange(pairs.num_images), "images that same pairs join"
    if isinstance(pairs, PairList):
        directories = [os.path.dirname(path) for path in pairs.paths]
        number = np.array([*map({name: i for i, name in enumerate(dict.fromkeys(directories))}.get, directories)])
        if not np.any(~pairs.is_same & (number[pairs.index1] == number[pairs.index2])):
            group, how = number, "the images' directories"
    first, second = group[pairs.index1][pairs.is_same], group[pairs.index2][pairs.is_same]
    label = np.arange(group.max() + 1)  # of each group: the smallest that is known to be the same person
    while True:
        smaller = label.copy()
        np.minimum.at(smaller, label[first], label[second])
        np.minimum.at(smaller, label[second], label[first])
        smaller = smaller[smaller]
        if np.array_equal(smaller, label):
            return label[group], how
        label = smaller


def open_pair_list(name: str, source: Source) -> PairEvalSet:
    """Open a pair list (see data.pairs). The images are in source.imgs_root, or in imgs/ beside the list.

    source.skip_missing: leave out pairs of which an image is missing. Raises UserError.
    """
    path, imgs_root = source.path, source.imgs_root
    if imgs_root is None:
        imgs_root = os.path.join(os.path.dirname(path), "imgs")
        if not os.path.isfile(path):
            raise UserError(f"{source.flag} {path}: no such file")
        if not os.path.isdir(imgs_root):
            raise UserError(f"{source.flag} {path}: its images should be in {imgs_root}, which does not exist; "
                            "give their directory with --imgs-root")
    return PairEvalSet(name, PairList(imgs_root, path, flag=source.flag, skip_missing=source.skip_missing))


def open_bin(name: str, source: Source) -> PairEvalSet:
    """Open one of insightface's .bin files, such as lfw.bin, which hold images and labels. Raises UserError."""
    return PairEvalSet(name, PairBin(source.path, flag=source.flag))
