"""TinyFace: identification of faces of about 20 x 16 pixels.

Cheng, Zhu and Gong, "Low-Resolution Face Recognition", 2018. Below DIR/Testing_Set, or DIR:

    gallery_match_img_ID_pairs.mat  gallery_set, a cell array of file names in Gallery_Match/, and gallery_ids
    probe_img_ID_pairs.mat          probe_set, a cell array of file names in Probe/, and probe_ids
    Gallery_Distractor/             images of other people, any names

No official file was at hand: the layout is that of the published evaluation scripts.

Shapes: U images: the probes, then the gallery, then the distractors.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from data.decode import IMAGE_SIZE, read_photo
from data.folder import IMAGE_EXTENSIONS, is_image
from data.mat_file import read_mat
from utils.errors import UserError
from utils.evaluation.identification import Rows, search, unit_rows, usable_rows
from utils.evaluation.protocol import Result, Source
from utils.files import file_states
from utils.flags import flag

RANKS = (1, 5, 20)
_DISTRACTOR = -100  # the published scripts' identity of all distractors
_PARTS = ("Probe", "Gallery_Match", "Gallery_Distractor")
_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class TinyFaceFlags:
    """The flags of this protocol."""

    tinyface: str | None = flag("--tinyface", metavar="DIR", section="evaluation sets",
                                help="TinyFace: the directory that holds Testing_Set/")
    tinyface_imgs: str | None = flag(
        "--tinyface-imgs", metavar="DIR", section="evaluation sets", default_text="those of Testing_Set",
        help="with --tinyface: aligned images in Gallery_Match/, Probe/ and Gallery_Distractor/; any extension")

    def tinyface_sources(self, flip: bool) -> Iterator[Source]:
        """The set that the flags choose. Raises UserError."""
        if self.tinyface is not None:
            yield Source("tinyface", self.tinyface, "--tinyface", self.tinyface_imgs, settings={"flip": flip})
        elif self.tinyface_imgs is not None:
            raise UserError(f"--tinyface-imgs {self.tinyface_imgs}: has no effect without --tinyface; add it, or drop "
                            "the flag")


class TinyFaceImages:
    """Item i is (uint8 (3, 112, 112), 0). Images of another size are resized: faces so small are hard to align."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths])  # no Python objects, which workers would copy

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        pixels = read_photo(os.fsdecode(self.paths[i]))
        if pixels.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
            pixels = np.array(Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), 0


class TinyFaceEvalSet:
    """An EvalSet (see protocol.py). imgs_root: the aligned images, or None. Raises UserError."""

    def __init__(self, name: str, path: str, flag: str, imgs_root: str | None, flip: bool) -> None:
        self.name, self.source, self._flip = name, path, flip
        below = os.path.join(path, "Testing_Set")
        root = below if os.path.isdir(below) else path
        lists = [_read_list(os.path.join(root, file), flag, f"{kind}_set", f"{kind}_ids") for file, kind in (
            ("probe_img_ID_pairs.mat", "probe"), ("gallery_match_img_ID_pairs.mat", "gallery"))]
        crops = imgs_root or root
        which = f"--tinyface-imgs {imgs_root}" if imgs_root else f"{flag} {path}"
        paths, subjects, self._missing = list[list[str]](), list[np.ndarray](), dict[str, int]()
        for part, (names, ids) in zip(_PARTS, lists):
            directory = os.path.join(crops, part)
            files = {os.path.splitext(file)[0]: file for file in _list_images(directory, which)}
            found = [files.get(os.path.splitext(one)[0] if one.lower().endswith(IMAGE_EXTENSIONS) else one)
                     for one in names]
            there = np.array([file is not None for file in found])
            if not there.any():
                raise UserError(f"{which}: {directory} has none of the {len(names):,} images of the list, such as "
                                f"{ascii(names[0])[1:-1]}")
            self._missing[part] = int(np.count_nonzero(~there))
            if self._missing[part]:
                what = "count as not found" if part == "Probe" else "are left out of the gallery"
                print(f"warning: {name}: {self._missing[part]:,} of {len(names):,} images of {directory} are missing, "
                      f"and {what}; the first one: {ascii(names[int(np.argmin(there))])[1:-1]}", file=sys.stderr)
            paths.append([os.path.join(directory, file) for file in found if file is not None])
            subjects.append(ids[there])
        directory = os.path.join(crops, _PARTS[2])
        paths.append([os.path.join(directory, file) for file in _list_images(directory, which)])
        self._probe_ids, self._gallery_ids = subjects
        self._counts = [len(part) for part in paths]
        self.images = TinyFaceImages([one for part in paths for one in part])
        digest = hashlib.blake2b(f"tinyface 1 {self._counts}".encode(), digest_size=16)
        digest.update(b"\0".join(os.path.relpath(one, os.fsencode(crops)) for one in self.images.paths.tolist()))
        for part, its_paths in zip(_PARTS, paths):
            states = file_states(os.path.join(crops, part), which)
            digest.update(np.array([states.get(os.fsencode(os.path.basename(one)), (0, 0)) for one in its_paths]).data)
        self.fingerprint = digest.hexdigest()
        probes, gallery, distractors = self._counts
        self.size = (f"{probes + self._missing['Probe']:,} probes, {gallery:,} gallery images, {distractors:,} "
                     "distractors")
        self.contents = f"{self.size} of {path}"

    def score(self, embeddings: Rows) -> Result:
        """Rank the gallery and the distractors for each probe by cosine."""
        unit = np.empty(embeddings.shape, dtype=np.float32)
        for start in range(0, len(unit), _ROWS):
            unit[start : start + _ROWS] = unit_rows(embeddings[start : start + _ROWS])
        unusable = int(np.count_nonzero(~usable_rows(unit)))
        if unusable:
            print(f"warning: {self.name}: {unusable:,} of {len(unit):,} embeddings are zero, NaN or infinite: such "
                  "images are never found", file=sys.stderr)
        probes, _, distractors = self._counts
        subjects = np.append(self._gallery_ids, np.full(distractors, _DISTRACTOR))
        found = search(unit[:probes], self._probe_ids, unit[probes:], subjects)
        unknown = int(np.count_nonzero(~found.mated))
        if unknown:
            print(f"warning: {self.name}: {unknown:,} of {probes:,} probes are of people whom the gallery lacks; they "
                  "count as not found", file=sys.stderr)
        total = probes + self._missing["Probe"]
        rates = {f"rank_{k}": float(np.count_nonzero((found.rank > 0) & (found.rank <= k)) / total) for k in RANKS}
        return Result(
            headline=rates["rank_1"], summary=f"rank 1: {100 * rates['rank_1']:.2f}%", metrics=rates,
            report="mirrored images " + ("added" if self._flip else "not added") + "\n"
                   + "\n".join(f"rank {k:<3} {100 * rates[f'rank_{k}']:6.2f} %" for k in RANKS),
            details=self.size,
            json={"settings": {"flip": self._flip}, **rates, "probes": total, "missing_images": self._missing,
                  "unusable_embeddings": unusable})


def open_tinyface(name: str, source: Source) -> TinyFaceEvalSet:
    """Open TinyFace. Raises UserError."""
    return TinyFaceEvalSet(name, source.path, source.flag, source.imgs_root, source.settings["flip"])


def _read_list(path: str, flag: str, names_key: str, ids_key: str) -> tuple[list[str], np.ndarray]:
    """(file names, identities int64) of an *_img_ID_pairs.mat."""
    content = read_mat(path, flag)
    names, ids = content.get(names_key), content.get(ids_key)
    if not isinstance(names, list) or not all(isinstance(one, str) and one.strip() for one in names) or not names:
        raise UserError(f"{flag}: {path}: has no cell array {names_key} of file names")
    if isinstance(ids, list):  # cells of one number each
        ids = np.concatenate([one for one in ids if isinstance(one, np.ndarray)] or [np.empty(0)])
    if not (isinstance(ids, np.ndarray) and len(ids) == len(names) and np.array_equal(ids, np.round(ids))
            and (np.abs(ids) < 2**53).all() and (ids != _DISTRACTOR).all()):
        raise UserError(f"{flag}: {path}: needs a whole number in {ids_key} for each of the {len(names):,} names in "
                        f"{names_key}, not {_DISTRACTOR}, which stands for distractors")
    return [os.path.basename(one.strip()) for one in names], ids.astype(np.int64)


def _list_images(directory: str, which: str) -> list[str]:
    try:
        return sorted(filter(is_image, os.listdir(directory)))
    except OSError as error:
        raise UserError(f"{which}: {directory}: cannot be read ({error.strerror})") from None
