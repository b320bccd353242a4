#!/usr/bin/env python3
"""What is wrong with a training set: identities that are one person, wrong labels, copies, overlap with a test set.

    python3 scripts/audit.py DIR --resume checkpoint.pth.tar --output AUDIT
    python3 scripts/audit.py DIR --resume checkpoint.pth.tar --output AUDIT --test-pairs lfw/pair.list --test-bin a.bin
    python3 scripts/audit.py DIR --resume checkpoint.pth.tar --output AUDIT --centers-only

    AUDIT/index.html       the worst findings with their images
    AUDIT/duplicates.csv   pairs of identities that seem to be one person
    AUDIT/noise.csv        images that seem to have a wrong label
    AUDIT/copies.csv       images that are there twice
    AUDIT/overlap.csv      identities and images of the test sets that are in the training set
    AUDIT/exclude.txt      a proposal for main.py --exclude and pack.py --exclude (data/exclude.py has its format)
    AUDIT/embeddings/      from which the next run continues

README.md in this directory says how the thresholds are chosen, and what an audit cannot know.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

# Python puts the script's own directory on sys.path instead of the repository's root.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np
import torch
from torch import Tensor

from data.exclude import DROP_IDENTITY, DROP_IMAGE, INTO, MERGE  # noqa: E402
from data.formats import open_training_set  # noqa: E402
from data.progress import progress_bar  # noqa: E402
from data.training_set import TrainingSet  # noqa: E402
from data.union import IDENTITIES  # noqa: E402
from scripts.audit_images import Subset, TestSet, components, embed, hash_images, open_tests, subset  # noqa: E402
from scripts.audit_page import SHOWN, audit_page  # noqa: E402
from scripts.embed import EmbeddingFlags  # noqa: E402
from utils.checkpoint.identities import can_be_compared  # noqa: E402
from utils.checkpoint.weights import Weights, open_weights  # noqa: E402
from utils.dist.context import DistContext  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.evaluation.neighbours import (  # noqa: E402
    BLOCK,
    NOTHING,
    Neighbours,
    Read,
    find_neighbours,
    in_blocks,
    nearest_rows,
    predict_seconds,
    unit_rows,
)
from utils.files import atomic_write, lock_output, move_aside, require_directory  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402

PAGE, PROPOSAL, EMBEDDINGS = "index.html", "exclude.txt", "embeddings"
SAMPLE = 20_000  # identities that the thresholds are chosen from
OUTLIER_DEVIATIONS, NOISE_DEVIATIONS = 4, 3.5  # robust ones, from the median
LEAST_DEVIATIONS = 2.5  # of two neighbours from that of strangers, in sets of few identities
LEAST_VALUES = 10  # different ones; two identities that are the nearest of one another share theirs
LEAST_MARGIN = 0.05  # an image of two identities that are one person is about as close to both
MOST = 1_000_000  # findings of a kind


@dataclass(frozen=True, kw_only=True)
class Options(EmbeddingFlags):
    """The arguments of audit.py."""

    data: str = flag("data", default="", metavar="DIR", help="training set, as main.py takes it")
    output: str = flag("--output", default="", metavar="DIR", help="directory of the results")
    identities: str | None = flag("--identities", choices=IDENTITIES, default_text="separate",
                                  help="as for main.py, with several sets")
    index: str = flag("--index", default="auto", metavar="FILE", help="as for main.py")
    exclude: str | None = flag("--exclude", metavar="FILE", help="as for main.py: audit what is left")
    by: str = flag("--by", default="means", choices=("means", "centers"),
                   help="what an identity is compared by: the mean of its embeddings, or its class center in the "
                        "checkpoint (of several sub-centers, that of most images)")
    centers_only: bool = flag("--centers-only", default=False,
                              help="find duplicate identities by their class centers, and embed no image")
    test_pairs: tuple[str, ...] = flag("--test-pairs", default=(), metavar="LIST,LIST,...",
                                       help="pair lists whose images should not be in the training set")
    imgs_root: str | None = flag("--imgs-root", metavar="DIR", default_text="imgs/ beside each list",
                                 help="images of --test-pairs")
    test_bin: tuple[str, ...] = flag("--test-bin", default=(), metavar="FILE,FILE,...",
                                     help=".bin evaluation sets, as --test-pairs")
    test_ijb: tuple[str, ...] = flag("--test-ijb", default=(), metavar="DIR,DIR,...",
                                     help="IJB-B or IJB-C, as valid.py --ijb takes them, as --test-pairs")
    test_images: tuple[str, ...] = flag(
        "--test-images", default=(), metavar="DIR,LIST,...",
        help="aligned images, as --test-pairs: directories, whose sub-directories are people if there are any, or text "
             "files with a path, relative to the file, in each line")
    duplicate_above: float | None = flag(
        "--duplicate-above", metavar="X", above=0, at_most=1, default_text="chosen from the set",
        help="cosine from which two identities count as one person")
    overlap_above: float | None = flag(
        "--overlap-above", metavar="X", above=0, at_most=1, default_text="chosen from the set",
        help="cosine from which a person of a test set and an identity count as one person")
    noise_margin: float | None = flag(
        "--noise-margin", metavar="X", at_least=0, at_most=2, default_text="chosen from the set",
        help="a label is wrong if the image is closer to another identity than to its own by this much, ...")
    noise_above: float | None = flag(
        "--noise-above", metavar="X", above=0, at_most=1, default_text="chosen from the set",
        help="... and its cosine with that identity is at least this")
    outlier_below: float | None = flag(
        "--outlier-below", metavar="X", at_least=-1, at_most=1, default_text="chosen from the set",
        help="cosine with the own identity below which an image is an outlier, whatever else it is close to")
    copy_above: float = flag("--copy-above", default=0.99, metavar="X", above=0, at_most=1,
                             help="cosine from which two images count as copies of one another")
    page_findings: int = flag("--page-findings", default=40, metavar="N", at_least=1,
                              help="findings of each kind on the page; the CSV files have all")


def main(argv: list[str] | None = None) -> None:
    options = parse_options(argv)
    started = time.perf_counter()
    context = options.set_up()
    require_directory("--output", os.path.join(options.output, EMBEDDINGS))
    lock = lock_output(options.output, patience=0)
    weights = open_weights(options.resume, options.arch, with_centers=options.by == "centers" or options.centers_only,
                           channel_order=options.channel_order)
    dataset = open_training_set(options.data, index=options.index, skip_bad=True, progress=True,
                                identities=options.identities, exclude=options.exclude)
    tests = open_tests(options.test_pairs, options.imgs_root, options.test_bin, options.test_ijb, options.test_images)
    print(f"{weights.describe(options.resume)}; images: {dataset.describe()}"
          + "".join(f"; {test.name}: {len(test.images):,} test images" for test in tests), flush=True)
    for test in tests:
        test.read()
    audit = Audit(options, dataset, weights, context)
    if options.centers_only:
        audit.compare_centers()
    else:
        audit.read_images()
        audit.judge_labels()
        audit.compare_identities()
        audit.find_copies()
        for test in tests:
            audit.find_overlap(test)
    audit.write()
    print(f"=> {os.path.join(options.output, PAGE)}: " + ", ".join(
        f"{len(rows):,} {kind}" for kind, rows in audit.findings.items()) + f", {time.perf_counter() - started:.0f} s")
    if lock is not None:
        lock.close()


def parse_options(argv: list[str] | None = None) -> Options:
    """Raises UserError."""
    options = parse_flags(Options, "audit.py", "Find duplicates, wrong labels and overlap in a training set.", argv)
    for name, value in (("DIR", options.data), ("--resume", options.resume), ("--output", options.output)):
        if not value:
            raise UserError(f"{name} is missing: give the training set, --resume PATH and --output DIR")
    options.check_weights()
    if options.centers_only and (options.test_pairs or options.test_bin or options.test_ijb or options.test_images):
        raise UserError("--centers-only: test sets are compared by the embeddings of their images; drop one of both")
    if options.imgs_root is not None and not options.test_pairs:
        raise UserError(f"--imgs-root {options.imgs_root}: is for --test-pairs; add it, or drop the flag")
    return options


# ---------------------------------------------------------------------------------------------------------------------
# The audit


@dataclass
class Thresholds:
    """Cosines, and how they were chosen: rows (name, value, reason) for the page."""

    rows: list[tuple[str, float, str]] = field(default_factory=list)

    def choose(self, name: str, given: float | None, chosen: float, reason: str) -> float:
        value = chosen if given is None else given
        self.rows.append((name, round(float(value), 4), "given" if given is not None else reason))
        print(f"{name}: {value:.3f} ({self.rows[-1][2]})", flush=True)
        return float(value)


class Audit:
    """What is found about a training set.

    N usable images, ordered by identity; C identities; d embedding size. `order` (N,) are the images' indices in the
    training set; identity c has the positions starts[c] to starts[c + 1] - 1 of it, and of all arrays of images.
    """

    def __init__(self, options: Options, dataset: TrainingSet, weights: Weights, context: DistContext) -> None:
        self.options, self.dataset, self.weights, self.context = options, dataset, weights, context
        self.names, self.thresholds = list(dataset.identities), Thresholds()
        self.labels_of_data = dataset.labels
        self.images_of = np.bincount(self.labels_of_data, minlength=len(self.names))
        self.findings: dict[str, list[dict[str, Any]]] = {
            kind: [] for kind in ("duplicates", "noise", "copies", "overlap")}
        self.notes: list[str] = []
        # Of identities, and of images, with the nearest other identity: most are other people.
        self.identity_neighbours = self.image_neighbours = np.empty(0, np.float32)
        if len(self.names) < 2:
            raise UserError(f"{dataset.root}: has {len(self.names)} identity; an audit compares at least 2")

    # -- class centers

    def center_rows(self) -> np.ndarray:
        """int64 (C,): the place of each identity among the classes of the checkpoint. Raises UserError."""
        path, centers = self.options.resume, self.weights.centers
        if centers is None:
            raise UserError(f"--resume {path}: has no class centers; use --by means, without --centers-only")
        known, classes = self.weights.identities or [], centers.shape[0] // self.weights.sub_centers
        if not can_be_compared(known, self.names):
            if classes < len(self.names):
                raise UserError(f"--resume {path}: has {classes:,} class centers, and {self.dataset.root} has "
                                f"{len(self.names):,} identities; give the checkpoint of a training on this set, or "
                                "use --by means")
            return np.arange(len(self.names))
        place = {name: label for label, name in enumerate(known)}
        missing = [name for name in self.names if name not in place]
        if missing:
            raise UserError(f"--resume {path}: has no class center of {len(missing):,} of the {len(self.names):,} "
                            f"identities in {self.dataset.root}, such as {missing[0]}; use --by means")
        return np.array([place[name] for name in self.names], np.int64)

    def read_centers(self, rows: np.ndarray) -> Read:
        """Read the centers `rows`, int64 (n,), block by block, from the files of the checkpoint."""
        centers = self.weights.centers
        assert centers is not None

        def read(start: int, stop: int) -> Tensor:
            values = torch.zeros(stop - start, centers.shape[1])
            centers.copy_rows(rows[start:stop], values)
            return values

        return read

    def compare_centers(self) -> None:
        """Duplicates by class centers alone. Of several centers of a class, all count."""
        count = self.weights.sub_centers
        rows = (self.center_rows()[:, None] * count + np.arange(count)).ravel()
        found = self._neighbours(self.read_centers(rows), len(rows), np.arange(len(rows)) // count)
        self._report_duplicates(found, count)

    # -- images

    def read_images(self) -> None:
        """Decode and embed all images; the reference of each identity, and each image's cosine with its own."""
        hashes, usable = hash_images(self.dataset, self.dataset.root)
        self.order = usable[np.argsort(self.labels_of_data[usable], kind="stable")]
        self.hashes, self.labels = hashes[self.order], self.labels_of_data[self.order]
        self.starts = np.searchsorted(self.labels, np.arange(len(self.names) + 1))
        directory = os.path.join(self.options.output, EMBEDDINGS)
        self.embeddings = self._embed(subset(self.dataset, self.order), self.hashes, "train", self.dataset.root)
        width = self.embeddings.shape[1]
        self.sums = np.lib.format.open_memmap(os.path.join(directory, "sums.npy"), "w+", np.float32,
                                              (len(self.names), width))
        self.own = np.full(len(self.order), np.nan, np.float32)  # cosine of each image with its identity
        rows = self._dominant_centers() if self.options.by == "centers" else None
        read = self.read_centers(rows) if rows is not None else None
        unusable = 0
        for first, last in in_blocks(len(self.names), BLOCK):
            centers = unit_rows(read(first, last))[0].numpy() if read is not None else None
            for c in range(first, last):
                images, own = self._images_of(c), self.own[self.starts[c]:self.starts[c + 1]]
                self.sums[c] = total = images.sum(0)
                valid = images.any(1)
                unusable += int((~valid).sum())
                if centers is not None:
                    own[valid] = images[valid] @ centers[c - first]
                elif valid.sum() > 1:  # with the mean of the others
                    own[valid] = cosines(images, total - images)[valid]
        self.read_reference: Read = read or self._read_sums
        if unusable:
            self.notes.append(f"{unusable:,} images have no usable embedding and are left out.")

    def _embed(self, images: Subset, hashes: np.ndarray, file: str, what: str) -> np.ndarray:
        options = self.options
        path = os.path.join(options.output, EMBEDDINGS, f"{file}.npy")
        return embed(self.weights, options.resume, images, hashes, path, self.context, what,
                     batch_size=options.batch_size, workers=options.workers, flip=options.flip)

    def _images_of(self, c: int) -> np.ndarray:
        """float32 (n, d): the unit embeddings of an identity's images, in the order of `order`."""
        return np.asarray(self.embeddings[self.starts[c]:self.starts[c + 1]], np.float32)

    def _read_sums(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.array(self.sums[start:stop]))

    def _dominant_centers(self) -> np.ndarray:
        """int64 (C,): the row of each identity's center; of several that of most of its images, the first of equal."""
        count, rows = self.weights.sub_centers, self.center_rows()
        if count == 1:
            return rows
        chosen = np.zeros(len(rows), np.int64)
        all_rows = (rows[:, None] * count + np.arange(count)).ravel()
        read = self.read_centers(all_rows)
        for first, last in in_blocks(len(rows), BLOCK):
            centers = unit_rows(read(first * count, last * count))[0].numpy().reshape(last - first, count, -1)
            for c in range(first, last):
                closest = (self._images_of(c) @ centers[c - first].T).argmax(1)
                chosen[c] = np.bincount(closest, minlength=count).argmax()
        return rows * count + chosen

    # -- findings

    def compare_identities(self) -> None:
        """Duplicates: identities whose references are nearly the same. Images with a wrong label do not count."""
        wrong = np.array([f["_image"] for f in self.findings["noise"] if f["kind"] == "wrong label"], np.int64)
        right = np.ones(len(self.order), bool)
        right[wrong] = False
        left = np.bincount(self.labels[right], minlength=len(self.names))
        for i in wrong.tolist():
            if left[self.labels[i]]:
                self.sums[self.labels[i]] -= self.embeddings[i]
        self._report_duplicates(self._neighbours(self.read_reference, len(self.names), None), 1)
        # Of two identities that are one person, either may be the closest to the images of the other.
        self.findings["noise"] = [f for f in self.findings["noise"] if f["kind"] != "wrong label"
                                  or self.person[self.labels[f["_image"]]] != self.person[f["_closest"]]]
        halves = []
        for c in range(0, len(self.names), max(1, len(self.names) // SAMPLE)):
            images = self._images_of(c)[right[self.starts[c]:self.starts[c + 1]]]
            if len(images) >= 4:
                halves.append(cosines(images[0::2].sum(0, keepdims=True), images[1::2].sum(0, keepdims=True))[0])
        if halves and self.options.by == "means":
            found = float(np.mean(np.array(halves) >= self.duplicate_above))
            self.notes.append("How many duplicates this finds: if each identity of 4 images or more were cut into two, "
                              f"{found:.0%} of the cuts would be found.")
            print(self.notes[-1], flush=True)

    def _neighbours(self, read: Read, count: int, groups: np.ndarray | None) -> Neighbours:
        """Compare identities, with the threshold of --duplicate-above, or with that which their neighbours suggest."""
        device = self.context.device
        seconds = predict_seconds(count, read(0, 1).shape[1], device)
        print(f"comparing {count:,} x {count:,} references: about {describe_seconds(seconds)} for the products",
              flush=True)
        total = count * (count + 1) // 2
        with progress_bar("comparing identities", total, unit="pair", unit_scale=True) as bar:
            # The threshold depends on the neighbours: of more pairs than MOST the least similar ones are dropped.
            least = self.options.duplicate_above
            found = find_neighbours(read, count, above=0.0 if least is None else least, groups=groups, most=MOST,
                                    device=device, advance=bar.update)
        if found.unusable:
            self.notes.append(f"{found.unusable:,} references of identities are zero, NaN or infinite, or have no "
                              "image, and are left out.")
            print(f"warning: {self.notes[-1]}", file=sys.stderr)
        nearest = found.similarity[found.similarity > NOTHING]
        if not len(nearest):
            raise UserError("no two identities can be compared: their references are zero, NaN or infinite")
        self.identity_neighbours, chosen = nearest, hardly_reached(nearest, len(nearest))
        if chosen >= 1 and self.options.duplicate_above is None:
            self.notes.append("Too few identities differ to choose a threshold for duplicates and overlap: give "
                              "--duplicate-above and --overlap-above.")
            print(f"warning: {self.notes[-1]}", file=sys.stderr)
        self.duplicate_above = self.thresholds.choose("duplicate identities from", self.options.duplicate_above,
                                                      chosen, f"one of {len(nearest):,} identities would be "
                                                      "this close to a stranger by chance")
        return found

    def _report_duplicates(self, found: Neighbours, centers: int) -> None:
        """Fill in the findings. centers: rows of each identity in `found`."""
        keep = found.cosines >= self.duplicate_above
        if found.left_out is not None and found.left_out >= self.duplicate_above:
            self.notes.append(f"More than {MOST:,} pairs of identities are that similar: only these are listed. Give a "
                              "higher --duplicate-above.")
            print(f"warning: {self.notes[-1]}", file=sys.stderr)
        seen = set()
        for one, other, cosine in zip(found.first[keep] // centers, found.second[keep] // centers, found.cosines[keep]):
            if (one, other) not in seen:  # of several centers the most similar ones come first
                seen.add((one, other))
                self.findings["duplicates"].append({
                    "identity": self.names[one], "other": self.names[other], "cosine": float(cosine),
                    "images": int(self.images_of[one]), "other images": int(self.images_of[other]),
                    "_labels": (int(one), int(other))})
        pairs = [finding["_labels"] for finding in self.findings["duplicates"]]
        self.person = components(len(self.names), *zip(*pairs)) if pairs else np.arange(len(self.names))

    def judge_labels(self) -> None:
        """Label noise: images far from their own identity; most of them close to another."""
        options, own = self.options, self.own
        known = own[np.isfinite(own)]
        if not len(known):
            self.notes.append("No identity has two usable images: labels cannot be judged.")
            return
        above = self.thresholds.choose("another identity counts from", options.noise_above,
                                       float(np.quantile(known, 0.10)),
                                       "90 % of images are as close to their own identity")
        middle, spread = robust(known)
        below = self.thresholds.choose(
            "outliers below", options.outlier_below, middle - OUTLIER_DEVIATIONS * spread,
            f"{OUTLIER_DEVIATIONS} robust deviations below the median cosine with the own identity")
        suspects = np.flatnonzero(np.isfinite(own))
        nearest, cosine = self._nearest(suspects, self.labels[suspects], "comparing images")
        self.image_neighbours = cosine[cosine > NOTHING]
        middle, spread = robust(cosine - own[suspects])
        margin = self.thresholds.choose(
            "closer to another identity by", options.noise_margin,
            max(LEAST_MARGIN, middle + NOISE_DEVIATIONS * spread),
            f"{NOISE_DEVIATIONS} robust deviations above the median difference, at least {LEAST_MARGIN}")
        wrong = (cosine >= above) & (cosine - own[suspects] >= margin)
        listed = np.flatnonzero(wrong | (own[suspects] < below))
        listed = listed[np.argsort((own[suspects] - cosine)[listed], kind="stable")]
        if len(listed) > MOST:
            self.notes.append(f"{len(listed):,} images have a doubtful label: only the worst {MOST:,} are listed.")
            listed = listed[:MOST]
        for k, name in zip(listed, self.dataset.image_names(self.order[suspects[listed]])):
            i = int(suspects[k])
            self.findings["noise"].append({
                "image": name, "kind": "wrong label" if wrong[k] else "outlier",
                "identity": self.names[self.labels[i]], "cosine": float(own[i]),
                "closest": self.names[nearest[k]], "closest cosine": float(cosine[k]),
                "_image": i, "_closest": int(nearest[k])})

    def _nearest(self, images: np.ndarray, own: np.ndarray | None, what: str) -> tuple[np.ndarray, np.ndarray]:
        """The nearest identity of some images, but `own`, and the cosine."""
        def queries(start: int, stop: int) -> Tensor:
            return torch.from_numpy(np.asarray(self.embeddings[images[start:stop]], np.float32))

        return self._nearest_identities(queries, len(images), own, what)

    def _nearest_identities(
        self, queries: Read, count: int, own: np.ndarray | None, what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        width, device = self.embeddings.shape[1], self.context.device
        if count:
            seconds = predict_seconds(count, width, device, columns=len(self.names))
            print(f"{what} ({count:,}) with {len(self.names):,} identities: about {describe_seconds(seconds)}",
                  flush=True)
        with progress_bar(what, count * len(self.names), unit="pair", unit_scale=True) as bar:
            return nearest_rows(queries, count, self.read_reference, len(self.names), own, device=device,
                                advance=bar.update)

    def find_copies(self) -> None:
        """Images that are there twice: the same pixels anywhere; nearly the same embedding in one identity, in two that
        seem to be one person, and between an image with a wrong label and the identity that it is close to."""
        pairs = dict[tuple[int, int], tuple[str, float]]()
        order = np.argsort(self.hashes, kind="stable")
        repeated = np.flatnonzero(self.hashes[order][1:] == self.hashes[order][:-1])
        first_of = dict[int, int]()
        for k in repeated.tolist():
            one, other = int(order[k]), int(order[k + 1])
            first = first_of.get(one, one)
            first_of[other] = first
            pairs[first, other] = "same pixels", 1.0
        groups = [(c, c) for c in range(len(self.names))]
        groups += [finding["_labels"] for finding in self.findings["duplicates"]]
        for one, other in groups:
            self._near(range(*self.starts[one:one + 2]), range(*self.starts[other:other + 2]), pairs)
        for finding in self.findings["noise"]:
            i, c = finding["_image"], finding["_closest"]
            self._near(range(i, i + 1), range(*self.starts[c:c + 2]), pairs)
        ordered = sorted(pairs.items(), key=lambda item: (item[1][0] != "same pixels", -item[1][1], item[0]))[:MOST]
        if len(pairs) > MOST:
            self.notes.append(f"More than {MOST:,} pairs of images are copies: no more were looked for.")
        numbers = np.array([i for pair, _ in ordered for i in pair], np.int64)
        names = self.dataset.image_names(self.order[numbers])
        for k, ((one, other), (kind, cosine)) in enumerate(ordered):
            self.findings["copies"].append({
                "image": names[2 * k], "other": names[2 * k + 1], "kind": kind, "cosine": cosine,
                "identity": self.names[self.labels[one]], "other identity": self.names[self.labels[other]],
                "_images": (one, other)})

    def _near(self, ones: range, others: range, pairs: dict[tuple[int, int], tuple[str, float]]) -> None:
        """Add the pairs of near copies among two ranges of images, which are the same one or do not overlap."""
        values = [np.asarray(self.embeddings[some.start:some.stop], np.float32) for some in (ones, others)]
        for start, stop in in_blocks(len(ones), BLOCK):
            for left, right in in_blocks(len(others), BLOCK):
                if len(pairs) > MOST:
                    return
                tile = values[0][start:stop] @ values[1][left:right].T
                for i, j in np.argwhere(tile >= self.options.copy_above).tolist():
                    one, other = sorted((ones[start + i], others[left + j]))
                    if one != other and self.hashes[one] != self.hashes[other]:
                        pairs[one, other] = "near", float(tile[i, j])

    def find_overlap(self, test: TestSet) -> None:
        """People and images of a test set that are in the training set."""
        hashes, usable = test.hashes, test.usable
        key = hashlib.blake2b(test.name.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
        rows = self._embed(subset(test.images, usable), hashes[usable], f"test-{key}", test.name)
        _, of_person = np.unique(test.groups[usable], return_inverse=True)
        order = np.argsort(of_person, kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(of_person[order])) + 1)  # by person: numbers of rows
        sums = np.stack([np.asarray(rows[some], np.float32).sum(0) for some in members])
        nearest, cosine = self._nearest_identities(
            lambda start, stop: torch.from_numpy(sums[start:stop]), len(members), None,
            f"comparing people of {test.name}")
        several = np.array([len(some) > 1 for some in members])
        least = np.where(several, *(self.thresholds.choose(
            f"overlap with {test.name} from, {what}", self.options.overlap_above,
            hardly_reached(neighbours, len(members)), "one of these people would be this close to a stranger by chance")
            for what, neighbours in (("several images", self.identity_neighbours),
                                     ("one image", self.image_neighbours))))
        close = np.flatnonzero(cosine >= least)
        for g in close[np.argsort(-cosine[close], kind="stable")].tolist():
            c = int(nearest[g])
            numbers = usable[members[g]].tolist()
            self.findings["overlap"].append({
                "kind": "identity", "identity": self.names[c], "image": "", "cosine": float(cosine[g]),
                "test image": test.image_name(numbers[0]), "test images": len(numbers), "test set": test.name,
                "_label": c, "_image": None, "_test": (test, numbers[:SHOWN])})
        same = dict[int, list[int]]()  # pixels -> images
        for i in np.flatnonzero(np.isin(self.hashes, hashes[usable])).tolist():
            same.setdefault(int(self.hashes[i]), []).append(i)
        # A picture in place of a missing image may be in both sets many times.
        found = list(itertools.islice(((i, t, "same pixels", 1.0) for t in usable.tolist()
                                       for i in same.get(int(hashes[t]), ())), MOST))
        for g, some in enumerate(members):
            c = int(nearest[g])
            if c >= 0:
                tile = np.asarray(rows[some], np.float32) @ self._images_of(c).T
                found += [(int(self.starts[c] + j), int(usable[some[m]]), "near", float(tile[m, j]))
                          for m, j in np.argwhere(tile >= self.options.copy_above).tolist()
                          if self.hashes[self.starts[c] + j] != hashes[usable[some[m]]]]
        names = self.dataset.image_names(self.order[np.array([one for one, *_ in found], np.int64)])
        for (i, t, kind, value), name in zip(found, names):
            self.findings["overlap"].append({
                "kind": kind, "identity": self.names[self.labels[i]], "image": name, "cosine": value,
                "test image": test.image_name(t), "test images": 1, "test set": test.name,
                "_label": int(self.labels[i]), "_image": i, "_test": (test, [t])})

    # -- results

    def proposal(self) -> list[str]:
        """The lines of the file for --exclude."""
        lines, dropped = list[str](), set[int]()

        def add(line: str) -> None:
            unreadable = "\n" in line or "\r" in line
            lines.append(f"# a name with a line break: {ascii(line)}" if unreadable else line)

        overlap = self.findings["overlap"]
        person = self.person
        tested = {int(person[finding["_label"]]) for finding in overlap if finding["kind"] == "identity"}
        lines.append("# people of a test set, with all their identities")
        for c in np.flatnonzero(np.isin(person, list(tested))).tolist():
            dropped.add(c)
            add(DROP_IDENTITY + self.names[c])
        lines.append("# identities that seem to be one person: into the one with most images")
        order = np.argsort(person, kind="stable")
        bounds = np.flatnonzero(np.diff(person[order], prepend=-1, append=-1))
        for first, last in zip(bounds[:-1], bounds[1:]):
            members = order[first:last]
            if len(members) == 1 or int(person[members[0]]) in tested:
                continue
            target = int(members[np.argmax(self.images_of[members])])
            for c in members.tolist():
                if c != target:
                    add(f"{MERGE}{self.names[c]}{INTO}{self.names[target]}")
        if self.options.centers_only:
            return lines
        gone = set[int]()

        def drop(title: str, images: Iterable[int], mark: str = "") -> None:
            some = [i for i in dict.fromkeys(images) if i not in gone and int(self.labels[i]) not in dropped]
            gone.update(some if not mark else ())
            lines.append(f"# {title}")
            for name in self.dataset.image_names(self.order[np.array(some, np.int64)]):
                add(mark + DROP_IMAGE + name)

        drop("images of a test set", (f["_image"] for f in overlap if f["kind"] != "identity"))
        wrong = [f["_image"] for f in self.findings["noise"] if f["kind"] == "wrong label"]
        drop("images with a wrong label", (i for i in wrong if self.images_of[self.labels[i]] > 2))
        drop("of two images, either may be the wrong one: remove the # where this one is",
             (i for i in wrong if self.images_of[self.labels[i]] <= 2), "# ")
        worse = dict[int, None]()  # in the order of the findings
        for finding in self.findings["copies"]:
            one, other = finding["_images"]
            left = not any(i in gone or i in worse or int(self.labels[i]) in dropped for i in (one, other))
            if finding["kind"] == "same pixels" and left:
                # In two identities the label of one is wrong.
                first_is_worse = self.own[one] < self.own[other] and self.labels[one] != self.labels[other]
                worse[one if first_is_worse else other] = None
        drop("copies, the same pixels", worse)
        return lines

    def write(self) -> None:
        """All files of the output."""
        lines = self.proposal()
        try:
            for kind, rows in self.findings.items():
                text = io.StringIO()
                writer = csv.writer(text, lineterminator="\n")
                writer.writerow(COLUMNS[kind])
                writer.writerows([f"{row[name]:.4f}" if isinstance(row[name], float) else row[name]
                                  for name in COLUMNS[kind]] for row in rows)
                self._write(f"{kind}.csv", text.getvalue())
            header = [f"# proposed by scripts/audit.py for {ascii(self.options.data)}: look at {PAGE}, and remove the "
                      "lines that are wrong", "# main.py --exclude FILE and pack.py --exclude FILE leave these out"]
            proposal = "\n".join([*header, *lines]) + "\n"
            self._keep_other(PROPOSAL, proposal)
            self._write(PROPOSAL, proposal)
            self._write(PAGE, audit_page(self, lines))
        except OSError as error:
            raise UserError(f"--output {self.options.output}: cannot be written ({error.strerror})") from None

    def _keep_other(self, name: str, text: str) -> None:
        """Rename a file of other content, which somebody may have edited."""
        path = os.path.join(self.options.output, name)
        with contextlib.suppress(FileNotFoundError):
            with open(path, "rb") as file:
                same = file.read() == text.encode("utf-8", "surrogateescape")
            if not same:
                print(f"=> {path}, which an earlier run proposed, was renamed to {move_aside(path)}")

    def _write(self, name: str, text: str) -> None:
        with atomic_write(os.path.join(self.options.output, name)) as file:
            file.write(text.encode("utf-8", "surrogateescape"))

COLUMNS = {
    "duplicates": ["identity", "other", "cosine", "images", "other images"],
    "noise": ["image", "kind", "identity", "cosine", "closest", "closest cosine"],
    "copies": ["image", "other", "kind", "cosine", "identity", "other identity"],
    "overlap": ["kind", "identity", "image", "cosine", "test image", "test images", "test set"],
}
def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float (n,) of the rows of two (n, d), 0 where a row is zero."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(1) / np.maximum(lengths, 1e-12)


def robust(values: np.ndarray) -> tuple[float, float]:
    """(median, 1.4826 times the median distance from it), which is a normal distribution's standard deviation."""
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))


def hardly_reached(nearest: np.ndarray, count: int) -> float:
    """The cosine that one of `count` strangers would reach by chance; nearest: (n,) of neighbours, mostly strangers.

    Taken from a normal distribution of their angles, whose median and spread are robust: 2.5 deviations from the median
    for a count (at least n) of up to 160, 4.8 for a million. In angles, because near 1 cosines are squeezed. 1 if there
    are too few neighbours to tell.
    """
    if len(np.unique(nearest)) < LEAST_VALUES:
        return 1.0
    middle, spread = robust(np.arccos(np.clip(nearest.astype(np.float64), -1, 1)))
    deviations = max(NormalDist().inv_cdf(1 - 1 / max(count, len(nearest))), LEAST_DEVIATIONS)
    return float(np.cos(max(middle - deviations * spread, 0.0)))


def describe_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else (
        f"{seconds / 3600:.1f} h")


if __name__ == "__main__":
    exit_on_user_error(main)
