"""Class centers and momentum on disk, by torch.distributed.checkpoint: each rank writes and reads its own classes.

Importing it takes half of a process's start-up time: import it where something is saved or loaded.

Two things are particular here. A shard is written as blocks of classes, so that a reader at another world size holds, beside
its own classes, one block, and never another rank's shard. And nothing of a checkpoint is trusted: torch's reader would run
whatever code the metadata, a pickle, asks for.

Shapes: tensors (C_r, d), the rows [start, start + C_r) of (C, d).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from utils.checkpoint.layout import SHARDS_DIRECTORY, DamagedCheckpoint

METADATA_FILE = ".metadata"


# 32 Mi values of 512 each: 64 MiB in float32.
BLOCK_CLASSES = 32768


# All that torch's writer puts into the metadata of sharded tensors; `torch` itself: Size and the types of numbers.
_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},  # turns the name "torch.strided" into torch's object of that name
    "torch": {"Size", "float16", "bfloat16", "float32", "float64"},
}


def save_shards(
    directory: str, tensors: dict[str, Tensor], *, start: int, num_classes: int, group: dist.ProcessGroup
) -> Exception | None:
    """Collective over the group. Write the rows of every rank, flushed to the disk. Returns what this rank could not do.

    It is returned, not raised, since what torch.distributed.checkpoint does with a rank's exception depends on versions.
    """
    writer = _Writer(directory)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=_SavePlanner(start, num_classes), process_group=group)
    except dcp.CheckpointException as failures:
        return next(iter(failures.failures.values()))[0]
    return writer.problem


def load_shards(
    directory: str, tensors: dict[str, Tensor], metadata: Metadata, *, start: int, group: dist.ProcessGroup | None
) -> Exception | None:
    """Collective over the group. Fill the tensors with their rows, whatever the world size they were written at.

    Returns what this rank could not read. `metadata` is what `read_metadata` returned.
    """
    reader = _Reader(directory, metadata)
    try:
        dcp.load(dict(tensors), storage_reader=reader, planner=_LoadPlanner(start), process_group=group)
    except dcp.CheckpointException as failures:
        return next(iter(failures.failures.values()))[0]
    return reader.problem


def read_metadata(directory: str, shape: tuple[int, int], names: set[str], files: set[str]) -> Metadata:
    """What says where in which file a row lies: plain values of known classes. Raises DamagedCheckpoint.

    Args:
        directory: of the shards.
        shape: (C, d) that each tensor must have.
        names: of the tensors that must be there.
        files: the names that it may refer to, relative to the step's directory.
    """
    path = os.path.join(directory, METADATA_FILE)
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror}") from None
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{path}: {error}") from None
    except Exception:  # of any type: arbitrary bytes are read as a pickle's instructions
        raise DamagedCheckpoint(f"{path}: is damaged: not the metadata of a checkpoint") from None
    try:
        sound = all(_covers(metadata, name, shape, files) for name in names)
    except Exception:  # of any type: the values may be anything
        sound = False
    if not sound:
        raise DamagedCheckpoint(f"{path}: does not describe {' and '.join(sorted(names))} of {shape[0]} classes")
    return metadata


def _covers(metadata: Metadata, name: str, shape: tuple[int, int], files: set[str]) -> bool:
    """Whether all rows are there, in known files, none twice and none missing: a hole would leave initial values."""
    saved, rows = metadata.state_dict_metadata[name], 0
    for chunk in sorted(saved.chunks, key=lambda chunk: chunk.offsets[0]):
        stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        if (tuple(chunk.offsets) != (rows, 0) or chunk.sizes[0] < 1 or chunk.sizes[1] != shape[1]
                or f"{SHARDS_DIRECTORY}/{stored.relative_path}" not in files or stored.transform_descriptors):
            return False
        rows += chunk.sizes[0]
    return isinstance(saved, TensorStorageMetadata) and tuple(saved.size) == (rows, shape[1]) == shape


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_NAMES.get(module, ()):
            raise DamagedCheckpoint(f"holds code ({module}.{name}) and was not loaded")
        return super().find_class(module, name)


class _SavePlanner(DefaultSavePlanner):
    """Plain tensors are this rank's rows, from `start`, of tensors with `num_classes` rows; in blocks."""

    def __init__(self, start: int, num_classes: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._start, self._num_classes = start, num_classes

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.state_dict.items():
            for first in range(0, len(tensor), BLOCK_CLASSES):
                offsets = torch.Size([self._start + first, 0])
                sizes = torch.Size([min(BLOCK_CLASSES, len(tensor) - first), tensor.shape[1]])
                items.append(WriteItem(
                    index=MetadataIndex(name, offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                        properties=TensorProperties(dtype=tensor.dtype),
                        size=torch.Size([self._num_classes, tensor.shape[1]]),
                    ),
                ))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        first = index.offset[0] - self._start
        return self.state_dict[index.fqn][first:first + BLOCK_CLASSES]


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, start: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._start = start

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, tensor in self.state_dict.items():
            if len(tensor):
                mine = ChunkStorageMetadata(offsets=torch.Size([self._start, 0]), sizes=tensor.shape)
                items += create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], [mine])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


class _Writer(FileSystemWriter):
    """torch's, whose failures wait in `problem` until all ranks have left the collectives."""

    def __init__(self, directory: str) -> None:
        # Nothing is copied ahead: that takes a CUDA stream, and this thread a context on the first GPU, whichever is ours.
        super().__init__(directory, per_thread_copy_ahead=0)
        self.problem: Exception | None = None

    def storage_meta(self) -> None:
        """None of the paths and identifiers of this machine."""
        return None

    def write_data(self, plan: SavePlan, planner: DefaultSavePlanner) -> Future:
        return self._or_problem(lambda: super(_Writer, self).write_data(plan, planner), [])

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        self._or_problem(lambda: super(_Writer, self).finish(metadata, results), None)

    def _or_problem(self, work: Callable[[], Any], instead: object) -> Any:
        try:
            return work()
        except Exception as error:
            self.problem = self.problem or error
            future = Future()
            future.set_result(instead)
            return future


class _Reader(FileSystemReader):
    """torch's, without its way of reading the metadata; its failure waits in `problem`."""

    def __init__(self, directory: str, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata
        self.problem: Exception | None = None

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: DefaultLoadPlanner) -> Future:
        try:
            return super().read_data(plan, planner)
        except Exception as error:
            self.problem = error
            future = Future()
            future.set_result(None)
            return future
