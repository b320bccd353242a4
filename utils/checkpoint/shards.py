"""Sharded tensors on disk: each rank writes its own rows, and any process reads any rows.

The files follow the format of torch.distributed.checkpoint, which can read them: blocks of rows in __<rank>_0.distcp,
each as torch.save writes a tensor, and .metadata, a pickle that says where each block lies. Neither torch's writer nor
its reader is used: its reader executes what the pickle asks for, and both need collectives of their own.

Shapes: a tensor is (C, d), where C counts class centers: all of them if a class has several. A rank's shard is its rows
[start, start + C_r).
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.checkpoint.layout import METADATA_FILE, SHARDS_DIRECTORY, DamagedCheckpoint, Files
from utils.checkpoint.safe_load import first_words, load_tensor, refuse_lack_of_memory
from utils.checkpoint.transfer import PIECE_BYTES, ReadBytes, read_bytes
from utils.files import flush

# Classes per block: 8 MiB at d = 512 in float32. Beside the shard, a writer holds one block; a reader holds a block's
# bytes, its rows, and a copy of those that it needs. Older checkpoints have blocks of 32,768 classes.
BLOCK_CLASSES = 4096


class Block(NamedTuple):
    """Where rows [first, first + rows) of a tensor lie: `length` bytes from `offset` in a file of shards/."""

    tensor: str
    first: int
    rows: int
    file: str
    offset: int
    length: int


def shard_name(rank: int) -> str:
    """The file of a rank's rows, relative to the checkpoint's directory."""
    return f"{SHARDS_DIRECTORY}/__{rank}_0.distcp"


def pieces(rank: int, tensors: dict[str, Tensor], start: int, blocks: list[Block]) -> Iterator[memoryview]:
    """The bytes of a rank's file, a few MiB at a time: its rows (C_r, d) of each tensor, from row `start`.

    Appends each block to `blocks`, which `write_metadata` must know.
    """
    offset, file = 0, os.path.basename(shard_name(rank))
    for name, tensor in tensors.items():
        for first in range(0, len(tensor), BLOCK_CLASSES):
            # A copy, because torch.save writes whole storages.
            rows, buffer = tensor[first:first + BLOCK_CLASSES].detach().to("cpu", copy=True), io.BytesIO()
            torch.save(rows, buffer)
            data = buffer.getbuffer()
            blocks.append(Block(name, start + first, len(rows), file, offset, len(data)))
            offset += len(data)
            for begin in range(0, len(data), PIECE_BYTES):
                yield data[begin:begin + PIECE_BYTES]


def write_pieces(directory: str, rank: int, data: Iterable[memoryview]) -> bool:
    """Write and flush a rank's file. Returns whether there is one: a rank without rows has none. Raises OSError."""
    with contextlib.ExitStack() as opened:
        file = None
        for piece in data:
            file = file or opened.enter_context(open(os.path.join(directory, shard_name(rank)), "wb"))
            file.write(piece)
        if file is not None:
            flush(file)
    return file is not None


def write_metadata(directory: str, tensors: dict[str, Tensor], blocks: Sequence[Block]) -> None:
    """Write .metadata for the blocks of all ranks, and flush it. Raises OSError.

    tensors: this rank's rows; all ranks' have the same dtype and width.
    """
    # Imported here: it takes as long as torch itself, and only rank 0 of a run that saves needs it.
    from torch.distributed.checkpoint import filesystem, metadata

    stored: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    for name, tensor in tensors.items():
        own, width = [block for block in blocks if block.tensor == name], tensor.shape[1]
        stored[name] = metadata.TensorStorageMetadata(
            properties=metadata.TensorProperties(dtype=tensor.dtype),
            size=torch.Size([sum(block.rows for block in own), width]),
            chunks=[metadata.ChunkStorageMetadata(torch.Size([block.first, 0]), torch.Size([block.rows, width]))
                    for block in own],
        )
        for block in own:
            index = metadata.MetadataIndex(name, torch.Size([block.first, 0]))
            places[index] = filesystem._StorageInfo(block.file, block.offset, block.length)
    with open(os.path.join(directory, METADATA_FILE), "wb") as file:
        pickle.dump(metadata.Metadata(stored, storage_data=places), file)
        flush(file)


@dataclass(frozen=True)
class StoredRows:
    """A matrix (C, d) in files, of which one block at a time is read.

    parts: (first row, number of rows, function that reads them) in rising order, without gaps.
    """

    shape: tuple[int, int]
    parts: list[tuple[int, int, Callable[[], Tensor]]]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of consecutive blocks. Raises DamagedCheckpoint."""
        for first, _, read in self.parts:
            yield first, read()

    def copy_rows(self, rows: np.ndarray, target: Tensor) -> None:
        """target[i] = row rows[i], for all i where rows[i] is not -1. Raises DamagedCheckpoint.

        rows: int64 (M,) in [-1, C). target: (M, d), any float dtype and device; its other rows keep their values.
        """
        order = np.argsort(rows, kind="stable")  # Read the file front to back.
        in_order = rows[order]
        for first, count, read in self.parts:
            low, high = np.searchsorted(in_order, [first, first + count])
            if low < high:
                values = read()[torch.from_numpy(in_order[low:high] - first)]
                target[torch.from_numpy(order[low:high]).to(target.device)] = values.to(target.device, target.dtype)


def rows_of(matrix: Tensor) -> StoredRows:
    """A matrix (C, d) that was mapped into memory from a file."""
    blocks = matrix.split(BLOCK_CLASSES)
    return StoredRows((len(matrix), matrix.shape[1]), [
        (number * BLOCK_CLASSES, len(block), functools.partial(blocks.__getitem__, number))
        for number, block in enumerate(blocks)])


def open_shards(
    directory: str, names: Sequence[str], shape: tuple[int, int], files: Files, read: ReadBytes | None = None
) -> dict[str, StoredRows]:
    """Open the tensors `names`, each of `shape` (C, d), of a checkpoint. Nothing in the files is executed.

    files: the checkpoint's, the only ones that .metadata may refer to. read: reads them where this process does not see
    the directory. Raises DamagedCheckpoint.
    """
    read = read or functools.partial(read_bytes, directory)
    path = os.path.join(directory, METADATA_FILE)
    opened: dict[str, StoredRows] = {}
    try:
        metadata = _MetadataUnpickler(io.BytesIO(read(METADATA_FILE, 0, files[METADATA_FILE][0]))).load()
        places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
        for name in names:
            rows, parts = 0, list[tuple[int, int, Callable[[], Tensor]]]()
            for chunk in sorted(metadata.state_dict_metadata[name].chunks, key=lambda chunk: chunk.offsets[0]):
                place = places[name, chunk.offsets]
                # A gap would silently leave initial values in place.
                if chunk.offsets[0] != rows or f"{SHARDS_DIRECTORY}/{place.relative_path}" not in files:
                    raise ValueError(chunk.offsets)
                block = Block(name, rows, chunk.sizes[0], place.relative_path, place.offset, place.length)
                parts.append((rows, block.rows, functools.partial(_read, read, directory, block, shape[1])))
                rows += block.rows
            if rows != shape[0]:
                raise ValueError(rows)
            opened[name] = StoredRows(shape, parts)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{path}: {error}") from None
    except Exception as error:  # Damaged bytes can be any pickle instructions, so any exception can come out.
        refuse_lack_of_memory(path, error)
        raise DamagedCheckpoint(
            f"{path}: is damaged: does not describe {' and '.join(names)} of {shape[0]} rows") from None
    return opened


def _read(read: ReadBytes, directory: str, block: Block, width: int) -> Tensor:
    """The rows (rows, width) of a block, of a float dtype. Raises DamagedCheckpoint."""
    name = f"{SHARDS_DIRECTORY}/{block.file}"
    try:
        rows = load_tensor(read(name, block.offset, block.length))
        if rows.shape != (block.rows, width):
            raise ValueError(f"{tuple(rows.shape)} instead of {(block.rows, width)}")
    except Exception as error:  # The bytes of a damaged archive can be anything.
        refuse_lack_of_memory(os.path.join(directory, name), error)
        raise DamagedCheckpoint(f"{os.path.join(directory, name)}: is damaged: {block.tensor} cannot be read "
                                f"({first_words(error)})") from None
    return rows


class _Inert:
    """Stands for every class of torch.distributed.checkpoint in .metadata: it keeps attributes and executes nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _MetadataUnpickler(pickle._Unpickler):
    """The C unpickler allocates as much memory as a memo index in the file claims, and both do for a bytearray.

    Resolves torch.Size and the float dtypes. Every name that torch's own writer uses becomes `_Inert`."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in ("Size", "float16", "bfloat16", "float32", "float64"):
            return getattr(torch, name)
        if module.startswith("torch.distributed.checkpoint.") or module == "torch.serialization":
            return _Inert
        raise DamagedCheckpoint(f"holds code ({module}.{name}) and was not loaded")
