"""Weights from other runs and other programs, read without ever holding a whole classifier.

Class centers stay in their file, mapped into memory: rows are copied out of it by number, and what nobody asks for stays on
the disk. So each rank of a sharded run reads the rows of its own classes only, whatever wrote the file.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.classifier import MarginClassifier
from utils.checkpoint.layout import SHARDS_DIRECTORY, read_manifest, step_directory
from utils.checkpoint.weights import backbone_of, read_weights_file
from utils.errors import UserError

# What a classifier is called beside a backbone: in torchshard's files and in ours.
_CENTERS_ENTRY = re.compile(r"(module\.)?(arcface_linear|classifier)\.weight")


# Rows that are copied at a time; 8192 x 512 float32 is 16 MiB.
_BLOCK = 8192


@dataclass(frozen=True)
class StoredCenters:
    """Class centers (C, d) in a file.

    parts: (first class, uint8 (rows, bytes of a row)), mapped into memory, in rising order and without gaps. Bytes, since
        what lies in a file need not be aligned for its type.
    identities: their names by class, if the file knows them: at most C.
    """

    num_classes: int
    embedding_size: int
    dtype: torch.dtype
    parts: list[tuple[int, np.ndarray]]
    identities: list[str] | None

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first class, (up to `_BLOCK`, d)) from the first class to the last."""
        for first, part in self.parts:
            for start in range(0, len(part), _BLOCK):
                yield first + start, torch.from_numpy(part[start:start + _BLOCK].copy()).view(self.dtype)

    def copy_rows(self, wanted: np.ndarray, target: Tensor) -> None:
        """target[i] = class wanted[i] for all i where that is not -1.

        wanted: int64 (M,) in [-1, C). target: (M, d), any float type and device; its other rows stay.
        """
        order = np.argsort(wanted, kind="stable")  # in the order of the file: a disk is read from front to back
        classes = wanted[order]
        for first, part in self.parts:
            low, high = np.searchsorted(classes, [first, first + len(part)])
            for start in range(low, high, _BLOCK):
                block = slice(start, min(start + _BLOCK, high))
                rows = torch.from_numpy(part[classes[block] - first]).view(self.dtype)
                target[torch.from_numpy(order[block]).to(target.device)] = rows.to(target.device, target.dtype)


@dataclass(frozen=True)
class StoredWeights:
    """What a run can start from: a backbone in evaluation mode on the CPU, and the class centers where the file has some."""

    path: str
    backbone: nn.Module
    arch: str
    epoch: int
    centers: StoredCenters | None


def open_weights(path: str, arch: str | None = None) -> StoredWeights:
    """Open a checkpoint.pth.tar, torchshard's single file, a published backbone, or safetensors. Runs no code from it.

    Raises UserError as `models.load_backbone` does, and for class centers that are missing or damaged.
    """
    content = read_weights_file(path)
    backbone, found = backbone_of(path, content, arch)
    assert isinstance(content, Mapping)  # or backbone_of would have said so
    if "shards" in content and "position" in content:
        epoch, centers = content["position"]["epoch"], _centers_of_checkpoint(path, content)
    else:
        epoch = content["epoch"] if isinstance(content.get("epoch"), int) else 0
        centers = _centers_beside(path, content, backbone.embedding_size)
    return StoredWeights(path, backbone, found, epoch, centers)


def _centers_beside(path: str, content: Mapping, embedding_size: int) -> StoredCenters | None:
    """The class centers in the state dict that has the backbone."""
    entries = content.get("state_dict", content)
    for name, weight in entries.items():
        if _CENTERS_ENTRY.fullmatch(name):
            if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != embedding_size or not weight.is_floating_point():
                raise UserError(f"{path}: its {name} is not a matrix of class centers (classes, {embedding_size})")
            part = weight.detach().contiguous().view(torch.uint8).numpy()
            return StoredCenters(len(weight), embedding_size, weight.dtype, [(0, part)], _names(path, content, len(weight)))
    return None


def _names(path: str, content: Mapping, num_classes: int) -> list[str] | None:
    """The file's identity names by class, or None where it knows none."""
    names = content.get("identities")
    if not names:
        return None
    if not isinstance(names, list) or len(names) > num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: its list of identities is damaged; copy it again")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# The shards of a checkpoint


def _centers_of_checkpoint(path: str, content: Mapping) -> StoredCenters:
    from utils.checkpoint import shards  # here: half of a process's start-up time, and not all files have shards

    try:
        shape = int(content["num_classes"]), int(content["embedding_size"])
        directory = step_directory(path, content)
        shards_directory = os.path.join(directory, SHARDS_DIRECTORY)
        metadata = shards.read_metadata(shards_directory, shape, {"centers"}, set(read_manifest(directory)))
        stored, parts = metadata.state_dict_metadata["centers"], []
        for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
            place = metadata.storage_data[shards.MetadataIndex("centers", chunk.offsets)]
            file = os.path.join(shards_directory, place.relative_path)
            parts.append((chunk.offsets[0], _map_rows(file, place.offset, place.length, chunk.sizes[0],
                                                      shape[1] * stored.properties.dtype.itemsize)))
    except UserError as error:
        raise UserError(f"{path}: its class centers are damaged: {error}") from None
    except Exception as error:  # of any type: the bytes of a damaged file may say anything
        raise UserError(f"{path}: its class centers are missing or damaged ({error})") from None
    return StoredCenters(*shape, stored.properties.dtype, parts, _names(path, content, shape[0]))


def _map_rows(path: str, offset: int, length: int, rows: int, row_bytes: int) -> np.ndarray:
    """uint8 (rows, row_bytes), mapped into memory: the tensor that torch.save wrote to bytes [offset, offset + length) of a file.

    What torch.save writes is a zip archive; the numbers of a single tensor are its entry .../data/0, stored as they are.
    """
    with open(path, "rb") as file, zipfile.ZipFile(_Window(file, offset, length)) as archive:
        (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != rows * row_bytes:
            raise ValueError(f"{os.path.basename(path)} has {entry.file_size} bytes for {rows} classes of {row_bytes}")
        # The local header: 30 bytes, of which the last four give the lengths of the name and the padding that follow it.
        file.seek(offset + entry.header_offset + 26)
        name_length, padding = struct.unpack("<HH", file.read(4))
    start = offset + entry.header_offset + 30 + name_length + padding
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(rows, row_bytes)))


class _Window:
    """Bytes [offset, offset + length) of a file as a file of their own, as far as zipfile reads one."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._place, 0)
        self._file.seek(self._offset + self._place)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._place += len(data)
        return data


# ---------------------------------------------------------------------------------------------------------------------
# --init-from


def check_initial(path: str, arch: str, embedding_size: int) -> None:
    """Raise UserError unless a run with this backbone can start from `path`: --init-from."""
    _open_initial(path, arch, embedding_size)


def _open_initial(path: str, arch: str, embedding_size: int) -> StoredWeights:
    try:
        weights = open_weights(path, arch)
    except UserError as error:
        raise UserError(f"--init-from {error}") from None
    if weights.backbone.embedding_size != embedding_size:
        raise UserError(f"--init-from {path}: has embeddings of {weights.backbone.embedding_size} numbers, a run has {embedding_size}")
    return weights


def start_from(path: str, arch: str, backbone: nn.Module, classifier: MarginClassifier, identities: Sequence[str]) -> str:
    """Collective. Put the weights of --init-from's file into a run that has not begun; returns a line on what was taken.

    The class centers: by identity name where file and training set know names; else all of them, if there are as many
    classes. Whatever is not taken keeps its initial value.

    Args:
        path, arch: the file, and the backbone that it must hold.
        backbone, classifier: the run's own, changed in place; the classifier's rows are those of this rank.
        identities: names of the training set by label, at most as many as there are classes.
    """
    weights = _open_initial(path, arch, backbone.embedding_size)
    backbone.load_state_dict(weights.backbone.state_dict())
    stored, shard = weights.centers, classifier.shard
    if stored is None:
        return f"starting from {path}: backbone; it has no class centers, these start anew"
    if _are_names(stored.identities) and _are_names(identities) and (stored.identities != list(identities) or stored.num_classes != shard.num_classes):
        wanted = rows_by_name(stored.identities, identities[shard.start:shard.stop])
        wanted = np.concatenate([wanted, np.full(shard.size - len(wanted), -1)])  # classes without an identity
        kept = torch.tensor(np.count_nonzero(wanted >= 0), device=classifier.weight.device)
        if classifier.group is not None:
            dist.all_reduce(kept, group=classifier.group)
        kept = int(kept)
        report = (f"class centers by identity: {kept:,} kept, {len(identities) - kept:,} new, "
                  f"{len(stored.identities) - kept:,} dropped")
    elif stored.num_classes == shard.num_classes:
        wanted = np.arange(shard.start, shard.stop)
        report = f"all {stored.num_classes:,} class centers"
    else:
        return (f"starting from {path}: backbone; its {stored.num_classes:,} class centers have no names and this run has "
                f"{shard.num_classes:,} classes: these start anew")
    with torch.no_grad():
        stored.copy_rows(wanted, classifier.weight)
    return f"starting from {path}: backbone, {report}"


def _are_names(identities: Sequence[str] | None) -> bool:
    """False also for the label numbers that stand for the names of a package without any: those of two packages are other people."""
    return bool(identities) and any(name != str(label) for label, name in enumerate(identities))


def rows_by_name(names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """int64 (len(wanted),): where in `names` each of `wanted` is, or -1. Neither list has a name twice.

    The table that is built is one of `wanted`, a rank's own part of millions; `names` only pass by.
    """
    places = dict(zip(wanted, itertools.count()))
    of_each = np.fromiter(map(places.get, names, itertools.repeat(-1)), dtype=np.int64, count=len(names))
    found = np.flatnonzero(of_each >= 0)
    rows = np.full(len(wanted), -1, dtype=np.int64)
    rows[of_each[found]] = found
    return rows
