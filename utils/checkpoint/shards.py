"""Sharded tensors on disk: each rank writes its own rows, and any process reads any rows.

The files follow the format of torch.distributed.checkpoint, which can read them: blocks of rows in __<rank>_0.distcp,
each
as torch.save writes a tensor, and .metadata, a pickle that says where each block lies. Neither torch's writer nor its
reader is used. Its reader executes what the pickle asks for and loads whole blocks of other ranks. Its writer wraps the
errors of a rank in collectives of its own. Here, reading and writing need no collective and raise plain errors.

Shapes: a tensor is (C, d). A rank's shard is its rows [start, start + C_r).
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.checkpoint.layout import METADATA_FILE, SHARDS_DIRECTORY, DamagedCheckpoint, Files
from utils.files import flush

# Classes per block on disk: 64 MiB at d = 512 in float32. A writer copies one block at a time out of the shard.
BLOCK_CLASSES = 32768

# Rows that a reader copies at a time: 16 MiB at d = 512 in float32.
ROWS_AT_A_TIME = 8192


class Block(NamedTuple):
    """Where rows [first, first + shape[0]) of a tensor lie: `length` bytes from `offset` in a file of shards/."""

    tensor: str
    first: int
    shape: tuple[int, int]
    dtype: torch.dtype
    file: str
    offset: int
    length: int


def write_shard(directory: str, rank: int, tensors: dict[str, Tensor], start: int) -> list[Block]:
    """Write this rank's rows (C_r, d) of each tensor, from row `start`, and flush them. Raises OSError, RuntimeError.

    Returns what `write_metadata` must know. A rank without rows writes no file.
    """
    name, blocks = f"__{rank}_0.distcp", []
    if not any(map(len, tensors.values())):
        return []
    with open(os.path.join(directory, SHARDS_DIRECTORY, name), "wb") as file:
        for tensor_name, tensor in tensors.items():
            for first in range(0, len(tensor), BLOCK_CLASSES):
                # torch.save writes whole storages
                rows = tensor[first:first + BLOCK_CLASSES].detach().to("cpu", copy=True)
                offset = file.tell()
                torch.save(rows, file)
                shape, length = (len(rows), rows.shape[1]), file.tell() - offset
                blocks.append(Block(tensor_name, start + first, shape, rows.dtype, name, offset, length))
        flush(file)
    return blocks


def write_metadata(directory: str, blocks: Sequence[Block]) -> None:
    """Write .metadata for the blocks of all ranks, and flush it. Raises OSError."""
    # Imported here: it takes as long as torch itself, and only rank 0 of a run that saves needs it.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, Any] = {}
    for name in dict.fromkeys(block.tensor for block in blocks):
        own = [block for block in blocks if block.tensor == name]
        tensors[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=own[0].dtype),
            size=torch.Size([sum(block.shape[0] for block in own), own[0].shape[1]]),
            chunks=[ChunkStorageMetadata(torch.Size([block.first, 0]), torch.Size(block.shape)) for block in own],
        )
    places = {
        MetadataIndex(block.tensor, torch.Size([block.first, 0])): _StorageInfo(block.file, block.offset, block.length)
        for block in blocks
    }
    with open(os.path.join(directory, METADATA_FILE), "wb") as file:
        pickle.dump(Metadata(tensors, storage_data=places), file)
        flush(file)


@dataclass(frozen=True)
class StoredRows:
    """A matrix (C, d) in files, mapped into memory: only the rows that are copied are read.

    parts: (first row, uint8 (rows, bytes per row)) in rising order, without gaps. They are bytes because data in a file
        need not be aligned for its dtype.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    parts: list[tuple[int, np.ndarray]]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of consecutive blocks of up to `ROWS_AT_A_TIME` rows."""
        for first, part in self.parts:
            for start in range(0, len(part), ROWS_AT_A_TIME):
                yield first + start, torch.from_numpy(part[start:start + ROWS_AT_A_TIME].copy()).view(self.dtype)

    def copy_rows(self, rows: np.ndarray, target: Tensor) -> None:
        """target[i] = row rows[i], for all i where rows[i] is not -1.

        Args:
            rows: int64 (M,) in [-1, C).
            target: (M, d), any float dtype and device. The other rows keep their values.
        """
        order = np.argsort(rows, kind="stable")  # Read the file front to back.
        in_order = rows[order]
        for first, part in self.parts:
            low, high = np.searchsorted(in_order, [first, first + len(part)])
            for start in range(low, high, ROWS_AT_A_TIME):
                block = slice(start, min(start + ROWS_AT_A_TIME, high))
                values = torch.from_numpy(part[in_order[block] - first]).view(self.dtype)
                target[torch.from_numpy(order[block]).to(target.device)] = values.to(target.device, target.dtype)


def open_shards(directory: str, names: Sequence[str], shape: tuple[int, int], files: Files) -> dict[str, StoredRows]:
    """Open tensors of a checkpoint. Nothing in the files is executed. Raises DamagedCheckpoint.

    Args:
        directory: of the checkpoint.
        names: the tensors to open.
        shape: (C, d) that each of them must have.
        files: the checkpoint's files, the only ones that .metadata may refer to.
    """
    path = os.path.join(directory, METADATA_FILE)
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{path}: {error}") from None
    except Exception:  # Damaged bytes can be any pickle instructions, so any exception can come out.
        raise DamagedCheckpoint(f"{path}: is damaged: not the metadata of a checkpoint") from None
    try:
        places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
        blocks = {name: _blocks(name, metadata.state_dict_metadata[name], places, shape, files) for name in names}
    except Exception:  # The values can be anything, too.
        raise DamagedCheckpoint(
            f"{path}: does not describe {' and '.join(sorted(names))} of {shape[0]} classes") from None
    opened = {}
    for name in names:
        parts = []
        for block in blocks[name]:
            try:
                parts.append((block.first, _map_rows(os.path.join(directory, SHARDS_DIRECTORY, block.file), block)))
            except Exception as error:  # The bytes of a damaged archive can be anything.
                raise DamagedCheckpoint(f"{directory}/{SHARDS_DIRECTORY}/{block.file}: is damaged: {name} cannot be "
                                        "read "
                                        f"({error})") from None
        opened[name] = StoredRows(shape, blocks[name][0].dtype, parts)
    return opened


def _blocks(name: str, stored: Any, places: dict[tuple, Any], shape: tuple[int, int], files: Files) -> list[Block]:
    """The blocks of a tensor, by row. Raises if they do not cover each row exactly once, from files of the checkpoint.

    A gap would silently leave initial values in place.
    """
    rows, blocks = 0, []
    dtype = stored.properties.state[0]
    for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
        place = places[name, chunk.offsets]
        block = Block(name, rows, tuple(chunk.sizes), dtype, place.relative_path, place.offset, place.length)
        if (tuple(chunk.offsets) != (rows, 0) or block.shape[0] < 1 or block.shape[1] != shape[1]
                or f"{SHARDS_DIRECTORY}/{block.file}" not in files or getattr(place, "transform_descriptors", None)):
            raise ValueError(block)
        blocks.append(block)
        rows += block.shape[0]
    if not rows == shape[0] == stored.size[0] or stored.size[1] != shape[1] or not isinstance(dtype, torch.dtype):
        raise ValueError(rows)
    return blocks


class _Inert:
    """Stands for every class of torch.distributed.checkpoint in .metadata: it keeps attributes and executes nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _MetadataUnpickler(pickle.Unpickler):
    """Resolves torch.Size and the float dtypes. Every name that torch's own writer uses becomes `_Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in ("Size", "float16", "bfloat16", "float32", "float64"):
            return getattr(torch, name)
        prefix = "torch.distributed.checkpoint"
        if module in (f"{prefix}.metadata", f"{prefix}.filesystem", "torch.serialization"):
            return _Inert
        raise DamagedCheckpoint(f"holds code ({module}.{name}) and was not loaded")


def _map_rows(path: str, block: Block) -> np.ndarray:
    """uint8 (rows, bytes per row), mapped into memory: the numbers of a block.

    torch.save writes a zip archive. The numbers are its uncompressed entry .../data/0.
    """
    archive = np.memmap(path, dtype=np.uint8, mode="r", offset=block.offset, shape=(block.length,))
    size = block.shape[0] * block.shape[1] * block.dtype.itemsize
    with zipfile.ZipFile(_ArrayFile(archive)) as entries:
        (entry,) = [entry for entry in entries.infolist() if entry.filename.endswith("/data/0")]
        entries.open(entry).close()  # Checks the local header, which is read below.
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
        raise ValueError(f"{entry.file_size} bytes instead of {size}")
    # A local header has 30 bytes. The last four are the lengths of the file name and the padding that follow it.
    header = entry.header_offset
    start = header + 30 + sum(struct.unpack("<HH", archive[header + 26:header + 30].tobytes()))
    return np.asarray(archive[start:start + size]).reshape(block.shape[0], -1)


class _ArrayFile(io.RawIOBase):
    """An array of bytes as a file to read."""

    def __init__(self, data: np.ndarray) -> None:
        self._data, self._position = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._data)}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._position:self._position + len(buffer)]
        buffer[:len(part)] = part.tobytes()
        self._position += len(part)
        return len(part)
