"""IJB-B and IJB-C, in the layout in which insightface distributes them.

Whitelam et al., "IARPA Janus Benchmark-B Face Dataset", 2017; Maze et al., "IARPA Janus Benchmark-C", 2018. A template
is a set of images of one person: photos and frames of videos. Below the directory, with ijbb or ijbc for P:

    loose_crop/*.jpg                the photos, with a margin around the faces
    meta/P_name_5pts_score.txt      per image: name, five landmarks x1 y1 ... x5 y5, score of the face detector
    meta/P_face_tid_mid.txt         the same images in the same order: name, template, media
    meta/P_template_pair_label.txt  1:1: template, template, 1 for one person or 0
    meta/P_1N_gallery_*.csv         1:N: the galleries G1 and G2 (IJB-B: S1, S2): a header, then template, subject, ...
    meta/P_1N_probe_mixed.csv       1:N: the probes, in the same form

No official file was at hand: the layout is that of the published descriptions and evaluation scripts.

Shapes: N images, T templates, P pairs.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.align import align_face, similarity_transform
from data.decode import read_photo
from utils.errors import UserError
from utils.evaluation import identification
from utils.evaluation.identification import Rows, Verification
from utils.evaluation.protocol import Result, RocCurve, Source
from utils.files import file_states, open_bounded
from utils.flags import flag

RANKS, FPIRS = (1, 5, 10), (0.1, 0.01)
_HEADLINES = ("1e-4", "1e-3", "1e-2", "1e-1")  # the first of these false accept rates that the pairs allow
_ALIGNMENT = 1  # to be changed with what align_face and read_photo make of an image
_MAX_BYTES, _MAX_NAME, _BLOCK = 2**30, 255, 2**24
_SMALLEST_SCALE = 1e-6  # of the transform: its landmarks are more than a million pixels apart


@dataclass(frozen=True, kw_only=True)
class IjbFlags:
    """The flags of this protocol."""

    ijb: tuple[str, ...] = flag("--ijb", default=(), metavar="DIR,DIR,...", section="evaluation sets",
                                help="IJB-B or IJB-C: directories with loose_crop/ and meta/")
    detector_score: bool = flag("--detector-score", default=True, section="evaluation sets",
                                help="with --ijb: weight each image with the score of the face detector")
    keep_norm: bool = flag("--keep-norm", default=True, section="evaluation sets",
                           help="with --ijb: weight each image with the norm of its embedding, too")
    far_nearest: bool = flag("--far-nearest", default=False, section="evaluation sets",
                             help="with --ijb: TAR at the point of the ROC curve whose FAR is nearest to the given "
                                  "one, be it above, as published scripts do; otherwise FAR is never above it")

    def ijb_sources(self, flip: bool) -> Iterator[Source]:
        """The sets that the flags choose. Raises UserError for a flag without effect."""
        for name, changed in (("--no-detector-score", not self.detector_score), ("--no-keep-norm", not self.keep_norm),
                              ("--far-nearest", self.far_nearest)):
            if changed and not self.ijb:
                raise UserError(f"{name}: has no effect without --ijb; add it, or drop the flag")
        for path in self.ijb:
            yield Source("ijb", path, "--ijb", settings={
                "flip": flip, "detector_score": self.detector_score, "keep_norm": self.keep_norm,
                "far_nearest": self.far_nearest})


@dataclass(frozen=True)
class Gallery:
    """Templates by number, and their subjects: int64 (n,) each."""

    name: str  # such as "G1"
    templates: np.ndarray
    subjects: np.ndarray


class IjbImages:
    """Item i is (uint8 (3, 112, 112), 0): the aligned face i. names: bytes (n,). landmarks: (n, 5, 2)."""

    def __init__(self, directory: str, names: np.ndarray, landmarks: np.ndarray) -> None:
        self._directory, self._names, self._landmarks = os.fsencode(directory), names, landmarks

    def __len__(self) -> int:
        return len(self._names)

    def path(self, i: int) -> str:
        """The photo of face i."""
        return os.fsdecode(os.path.join(self._directory, self._names[i]))

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path = self.path(i)
        photo = read_photo(path)
        try:
            face = align_face(photo, self._landmarks[i])
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return torch.from_numpy(np.ascontiguousarray(face.transpose(2, 0, 1))), 0


class IjbEvalSet:
    """An EvalSet (see protocol.py). settings: the keys that `IjbFlags.ijb_sources` gives. Raises UserError."""

    def __init__(self, name: str, path: str, flag: str, settings: Mapping[str, bool]) -> None:
        self.name, self.source, self._settings = name, path, dict(settings)
        prefix, crops = _find_files(path, flag)
        names, numbers = _read_images(f"{prefix}_name_5pts_score.txt", flag)
        landmarks, scores = numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10]
        template_of, media_of = _read_templates(f"{prefix}_face_tid_mid.txt", flag, names)
        self._template_ids, template = np.unique(template_of, return_inverse=True)
        states = file_states(crops, f"{flag} {path}")
        missing = [one for one in names.tolist() if one not in states]
        if missing:
            raise UserError(f"{flag} {path}: {len(missing):,} of {len(names):,} images are missing, the first one: "
                            f"{os.path.join(crops, os.fsdecode(missing[0]))}")
        # What align_face would refuse.
        with np.errstate(all="ignore"):
            transform = similarity_transform(landmarks)
            scale = np.hypot(transform[:, 0, 0], transform[:, 1, 0])
            usable = (scale > _SMALLEST_SCALE) & np.isfinite(scores)
        self._bad_images = int(np.count_nonzero(~usable))
        if not usable.any():
            raise UserError(f"{flag} {path}: no image has landmarks that form a face, and a score")
        if self._bad_images:
            _warn(f"{name}: {self._bad_images:,} of {len(names):,} images have landmarks that do not form a face, or "
                  f"no score, and are left out; the first one: {os.fsdecode(names[~usable][0])}")
        self.images = IjbImages(crops, names[usable], landmarks[usable])
        self._template, self._scores = template[usable].astype(np.int32), scores[usable]
        self._media = media_of[usable]
        self._first, self._second, self._is_same = _read_pairs(
            f"{prefix}_template_pair_label.txt", flag, self._template_ids)
        self._galleries = [Gallery(one[len(prefix) + len("_1N_gallery_"):-len(".csv")],
                                   *_read_subjects(one, flag, self._template_ids))
                           for one in sorted(glob.glob(glob.escape(prefix) + "_1N_gallery_*.csv"))]
        probes = f"{prefix}_1N_probe_mixed.csv"
        if bool(self._galleries) != os.path.exists(probes):
            raise UserError(f"{flag} {path}: 1:N identification needs {probes} and galleries "
                            f"{prefix}_1N_gallery_*.csv; one of both is missing")
        self._probes = Gallery("probes", *_read_subjects(probes, flag, self._template_ids)) if self._galleries else None
        digest = hashlib.blake2b(f"ijb {_ALIGNMENT}".encode(), digest_size=16)
        digest.update(b"\0".join(names[usable].tolist()))
        digest.update(np.array([states[one] for one in names[usable].tolist()]).data)
        digest.update(np.ascontiguousarray(landmarks[usable]).data)
        self.fingerprint = digest.hexdigest()
        self.size = f"{len(self._is_same):,} pairs of {len(self._template_ids):,} templates"
        self.contents = (f"{len(names):,} images, {len(self._template_ids):,} templates and {len(self._is_same):,} "
                         f"pairs of {path}, {np.count_nonzero(self._is_same):,} of them genuine; " + (", ".join(
                             f"gallery {one.name} of {len(one.templates):,}" for one in self._galleries)
                             or "no files for 1:N"))

    def people(self) -> np.ndarray:
        """int64 (N,): images with one number are of one person. A template that the files of 1:N lack is a person."""
        subject = -1 - np.arange(len(self._template_ids))
        for listed in (*self._galleries, self._probes):
            if listed is not None:
                subject[listed.templates] = listed.subjects
        return np.unique(subject[self._template], return_inverse=True)[1]

    def score(self, embeddings: Rows) -> Result:
        """Fuse the images' embeddings to templates; verify the pairs, and search the probes in each gallery."""
        settings = self._settings
        templates, usable = identification.fuse_templates(
            embeddings, self._template, self._media, self._scores if settings["detector_score"] else
            np.ones(len(self._scores)), num_templates=len(self._template_ids), keep_norm=settings["keep_norm"])
        self._warn_of_unusable(templates, usable)
        similarity = identification.pair_similarities(templates, self._first, self._second)
        result = identification.verify(similarity, self._is_same, settings["far_nearest"])
        found = {one.name: _identify(templates, one, self._probes) for one in self._galleries if self._probes}
        if len(found) > 1:
            found["mean"] = _mean(list(found.values()))
        far = next((one for one in _HEADLINES if one in result.tar), None)
        headline = result.tar[far] if far else 0.0
        lines = [describe_settings(settings), *describe_verification(result), *describe_identification(found)]
        return Result(
            headline=headline,
            summary=f"TAR {100 * headline:.2f}% at FAR {far}" if far else "too few impostor pairs",
            metrics={**{f"tar_at_far_{far}": tar for far, tar in result.tar.items()}, "auc": result.auc,
                     **{f"{kind}_{name}": value for name, one in found.items() for kind, value in one.items()
                        if not math.isnan(value)}},
            report="\n".join(lines),
            details=f"{result.genuine:,} genuine and {result.impostors:,} impostor pairs; AUC {result.auc:.6f}",
            json={"settings": settings, "genuine": result.genuine, "impostors": result.impostors,
                  "tar_at_far": result.tar, "far": result.far, "auc": result.auc,
                  "thresholds": {far: _finite(value) for far, value in result.threshold.items()},
                  "identification": {name: {kind: _finite(value) for kind, value in one.items()}
                                     for name, one in found.items()},
                  "left_out_images": self._bad_images + int(np.count_nonzero(~usable)),
                  "empty_templates": int(np.count_nonzero(~identification.usable_rows(templates))),
                  "fpr": result.curve_far.tolist(), "tpr": result.curve_tar.tolist()},
            curves=[RocCurve(self.name, result.curve_far, result.curve_tar, None, result.auc)],
        )

    def _warn_of_unusable(self, templates: np.ndarray, usable: np.ndarray) -> None:
        if not usable.all():
            _warn(f"{self.name}: {np.count_nonzero(~usable):,} of {len(usable):,} embeddings are zero, NaN or "
                  "infinite, and are left out")
        empty = ~identification.usable_rows(templates)
        if empty.any():
            pairs = np.count_nonzero(empty[self._first] | empty[self._second])
            _warn(f"{self.name}: {np.count_nonzero(empty):,} of {len(empty):,} templates have no usable image, the "
                  f"first one: {self._template_ids[np.argmax(empty)]}; their {pairs:,} pairs are never accepted, and "
                  "they are never found")


def open_ijb(name: str, source: Source) -> IjbEvalSet:
    """Open IJB-B or IJB-C. Raises UserError."""
    return IjbEvalSet(name, source.path, source.flag, source.settings)


# ---------------------------------------------------------------------------------------------------------------------
# What is printed


def describe_settings(settings: Mapping[str, bool]) -> str:
    """What the numbers depend on, beside the weights."""
    return ("mirrored images " + ("added" if settings["flip"] else "not added") + ", norm of embeddings "
            + ("kept" if settings["keep_norm"] else "removed") + ", detector score "
            + ("used" if settings["detector_score"] else "not used") + ", "
            + ("the point of the ROC curve nearest to each FAR" if settings["far_nearest"] else
               "thresholds whose FAR is at most the given one"))


def describe_verification(result: Verification) -> list[str]:
    """A table with a column per false accept rate."""
    if not result.tar:
        return [f"1:1  too few impostor pairs ({result.impostors}) for a TAR at FAR 1e-1"]
    return ["1:1  FAR      " + "".join(f"{far:>9}" for far in result.tar),
            "     TAR, %   " + "".join(f"{100 * tar:9.2f}" for tar in result.tar.values()),
            "     measured " + "".join(f"{far:9.2g}" for far in result.far.values()),
            "     threshold" + "".join(f"{value:9.4f}" for value in result.threshold.values())]


def describe_identification(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table with a row per gallery."""
    if not found:
        return []
    kinds = list(dict.fromkeys(kind for one in found.values() for kind in one))
    titles = {**{f"rank_{k}": f"rank {k}" for k in RANKS}, **{f"tpir_at_fpir_{f:g}": f"TPIR@{f:g}" for f in FPIRS}}
    return ["1:N, %        " + "".join(f"{titles[kind]:>11}" for kind in kinds),
            *(f"     {name:9}" + "".join("          -" if math.isnan(one[kind]) else f"{100 * one[kind]:11.2f}"
                                         for kind in kinds) for name, one in found.items())]


def _identify(templates: np.ndarray, gallery: Gallery, probes: Gallery) -> dict[str, float]:
    """{"rank_1": ..., "tpir_at_fpir_0.1": ...}, NaN where there is nothing to measure."""
    result = identification.search(templates[probes.templates], probes.subjects,
                                   templates[gallery.templates], gallery.subjects)
    hits, tpir = result.hit_rates(RANKS), result.open_set(FPIRS)
    return {**{f"rank_{k}": hits.get(str(k), math.nan) for k in RANKS},
            **{f"tpir_at_fpir_{f:g}": tpir[f"{f:g}"]["tpir"] if tpir else math.nan for f in FPIRS}}


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {kind: sum(one[kind] for one in found) / len(found) for kind in found[0]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the files


def _find_files(path: str, flag: str) -> tuple[str, str]:
    """(meta/ijbb or meta/ijbc, the directory of the images)."""
    lists = glob.glob(os.path.join(glob.escape(path), "meta", "*_face_tid_mid.txt"))
    if len(lists) != 1:
        below = sorted(glob.glob(os.path.join(glob.escape(path), "*", "meta", "*_face_tid_mid.txt")))
        hint = f"; give {os.path.dirname(os.path.dirname(below[0]))}" if below else ""
        raise UserError(f"{flag} {path}: needs loose_crop/ and meta/ with one file *_face_tid_mid.txt, as ijbc_face_"
                        f"tid_mid.txt, and has {len(lists)}{hint}")
    return lists[0].removesuffix("_face_tid_mid.txt"), os.path.join(path, "loose_crop")


def _blocks(path: str, flag: str) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, text that ends with a line) of each part of the file, which must not be empty."""
    number, rest, empty = 1, b"", True
    try:
        with open_bounded(path, _MAX_BYTES) as file:
            while part := file.read(_BLOCK):
                end = part.rfind(b"\n") + 1
                text, rest = (rest + part[:end], part[end:]) if end else (b"", rest + part)
                if len(rest) > _BLOCK:
                    raise UserError(f"{flag}: {path}:{number}: a line of more than 16 MiB")
                if text.strip():
                    empty = False
                    yield number, text.rstrip() + b"\n"  # without blank lines at the end
                number += text.count(b"\n")
    except OSError as error:
        raise UserError(f"{flag}: {path}: cannot be read ({error.strerror})") from None
    if rest.strip():
        yield number, rest.rstrip() + b"\n"
    elif empty:
        raise UserError(f"{flag}: {path}: the file is empty")


def _numbers(lines: list[bytes], columns: int, dtype: Any) -> np.ndarray | None:
    """(n, columns) of n lines; None unless each has as many numbers."""
    if any(len(line.split()) != columns for line in lines):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's about text that is no number
        try:
            values = np.fromstring(b"\n".join(lines).decode("ascii"), dtype, sep=" ")
        except (ValueError, DeprecationWarning):
            return None
    return values.reshape(-1, columns) if len(values) == columns * len(lines) else None


def _complain(path: str, flag: str, number: int, text: bytes, expected: str, is_good: Any) -> UserError:
    """The error of the first bad line in a block that begins with line `number`."""
    lines = text.splitlines()
    bad = next((k for k, line in enumerate(lines) if not is_good(line.split())), 0)
    return UserError(f"{flag}: {path}:{number + bad}: expected {expected}, got {ascii(lines[bad][:100])[1:]}")


def _are(kind: type, words: list[bytes]) -> bool:
    try:
        return bool([kind(word) for word in words])
    except ValueError:
        return False


def _read_images(path: str, flag: str) -> tuple[np.ndarray, np.ndarray]:
    """(names, bytes (N,); landmarks and score, float64 (N, 11))."""
    names, numbers = list[bytes](), list[np.ndarray]()
    for number, text in _blocks(path, flag):
        first = [line.split(None, 1) for line in text.splitlines()]
        values = _numbers([row[-1] for row in first if len(row) == 2], 11, np.float64)
        if values is None or len(values) != len(first):
            raise _complain(path, flag, number, text, "name x1 y1 ... x5 y5 score",
                            lambda words: len(words) == 12 and _are(float, words[1:]))
        names += [row[0] for row in first]
        numbers.append(values)
    if max(map(len, names)) > _MAX_NAME:
        raise UserError(f"{flag}: {path}: a file name of more than {_MAX_NAME} bytes")
    return np.array(names), np.concatenate(numbers)


def _read_templates(path: str, flag: str, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(template, media) of each image, int64 (N,); the file must list the images `names`."""
    numbers, done = list[np.ndarray](), 0
    for number, text in _blocks(path, flag):
        first = [line.split(None, 1) for line in text.splitlines()]
        values = _numbers([row[-1] for row in first if len(row) == 2], 2, np.int64)
        if values is None or len(values) != len(first):
            raise _complain(path, flag, number, text, "name template media",
                            lambda words: len(words) == 3 and _are(int, words[1:]))
        expected = names[done : done + len(first)]
        for k, row in enumerate(first):
            if k >= len(expected) or row[0] != expected[k]:
                other = ascii(os.fsdecode(expected[k])) if k < len(expected) else "no more images"
                raise UserError(f"{flag}: {path}:{number + k}: names {ascii(os.fsdecode(row[0]))}, and the list of "
                                f"landmarks has {other} there; both must have the same images in the same order")
        numbers.append(values)
        done += len(first)
    if done < len(names):
        raise UserError(f"{flag}: {path}: has {done:,} lines, and the list of landmarks {len(names):,}")
    both = np.concatenate(numbers)
    return both[:, 0], both[:, 1]


def _read_pairs(path: str, flag: str, template_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, is_same): places in template_ids, int32 (P,), and bool (P,)."""
    parts: list[tuple[np.ndarray, ...]] = []
    for number, text in _blocks(path, flag):
        values = _numbers(text.splitlines(), 3, np.int64)
        if values is None or not np.isin(values[:, 2], (0, 1)).all():
            raise _complain(path, flag, number, text, "template template 0|1",
                            lambda words: len(words) == 3 and _are(int, words) and words[2] in (b"0", b"1"))
        places = _places(values[:, :2], template_ids)
        if (unknown := (places < 0).any(axis=1)).any():
            bad = int(np.argmax(unknown))
            raise UserError(f"{flag}: {path}:{number + bad}: template {values[bad, np.argmax(places[bad] < 0)]} has no "
                            f"image in the list of templates, as {np.count_nonzero(unknown):,} of these "
                            f"{len(values):,} pairs")
        parts.append((places[:, 0].astype(np.int32), places[:, 1].astype(np.int32), values[:, 2] == 1))
    first, second, is_same = (np.concatenate(column) for column in zip(*parts))
    if is_same.all() or not is_same.any():
        raise UserError(f"{flag}: {path}: all pairs have the label {int(is_same[0])}; both kinds are needed")
    return first, second, is_same


def _places(values: np.ndarray, template_ids: np.ndarray) -> np.ndarray:
    """The place of each value in the rising template_ids, -1 if it is not there."""
    places = np.searchsorted(template_ids, values)
    return np.where(template_ids[np.minimum(places, len(template_ids) - 1)] == values, places, -1)


def _read_subjects(path: str, flag: str, template_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places of different templates in template_ids, their subjects), int64, from a CSV with a line per image."""
    subjects: dict[int, int] = {}
    known = set(template_ids.tolist())
    try:
        with io.TextIOWrapper(open_bounded(path, _MAX_BYTES), "utf-8-sig", "replace", newline="") as file:
            rows = csv.reader(file)
            for row in rows:
                if not row or rows.line_num == 1 and not _are(int, [cell.encode() for cell in row[:2]]):
                    continue  # the header
                try:
                    template, subject = int(row[0]), int(row[1])
                except (ValueError, IndexError):
                    raise UserError(f"{flag}: {path}:{rows.line_num}: expected template,subject, got "
                                    f"{ascii(','.join(row)[:100])}") from None
                if template not in known:
                    raise UserError(f"{flag}: {path}:{rows.line_num}: template {template} has no image in the list of "
                                    "templates")
                if subjects.setdefault(template, subject) != subject:
                    raise UserError(f"{flag}: {path}:{rows.line_num}: template {template} is of subject "
                                    f"{subjects[template]} in an earlier line, and of {subject} here")
    except OSError as error:
        raise UserError(f"{flag}: {path}: cannot be read ({error.strerror})") from None
    except csv.Error as error:
        raise UserError(f"{flag}: {path}:{rows.line_num}: is damaged ({error})") from None
    if not subjects:
        raise UserError(f"{flag}: {path}: lists no template")
    try:
        templates = np.array(list(subjects), dtype=np.int64)
        values = np.array(list(subjects.values()), dtype=np.int64)
    except OverflowError:
        raise UserError(f"{flag}: {path}: a number has more than 64 bits") from None
    return _places(templates, template_ids), values
