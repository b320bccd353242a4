"""Which classes a rank owns, and everything that comes from torchshard: no other file imports it.

torchshard provides the model-parallel process group, the registration that makes DistributedDataParallel leave sharded
parameters alone, and `parallel_cross_entropy`, the reference that our loss is tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
import torchshard
from torch import Tensor, nn
from torchshard.distributed import core as _torchshard_core
from torchshard.nn.functional import parallel_cross_entropy as _torchshard_cross_entropy

register_parallel_dim = torchshard.register_parallel_dim  # marks a parameter as this rank's shard
let_ddp_ignore_shards = torchshard.register_ddp_parameters_to_ignore  # of the module, before it is wrapped


@dataclass(frozen=True)
class ClassShard:
    """The classes [start, stop) of `num_classes` (C) that rank `rank` of `world_size` (W) owns.

    The convention of torch.chunk and DTensor: ceil(C / W) classes per rank, so the last ranks may own fewer, or none
    (C = 5, W = 4: 2, 2, 1, 0).
    """

    num_classes: int
    rank: int
    world_size: int

    @property
    def chunk(self) -> int:
        """ceil(C / W), the size of a full shard."""
        return -(-self.num_classes // self.world_size)

    @property
    def start(self) -> int:
        return min(self.rank * self.chunk, self.num_classes)

    @property
    def stop(self) -> int:
        return min(self.start + self.chunk, self.num_classes)

    @property
    def size(self) -> int:
        """C_r"""
        return self.stop - self.start


def init_model_parallel(world_size: int) -> dist.ProcessGroup:
    """torchshard's model-parallel group, of all `world_size` ranks: the run's own group.

    torchshard's init_process_group would make another one of the same ranks. Its NCCL communicator would take several
    hundred MiB of each GPU, and it would wait for torch's default timeout, whatever --dist-timeout says. Sharing is
    safe: every rank issues the collectives of a step in one order, those of the classifier's backward pass before
    DistributedDataParallel's.
    """
    _torchshard_core._PARALLEL_GROUP, _torchshard_core._PARALLEL_SIZE = dist.group.WORLD, world_size
    return torchshard.distributed.get_group()


def is_sharded(parameter: nn.Parameter) -> bool:
    return torchshard.get_parallel_dim(parameter) is not None


def parallel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Collective. torchshard's cross entropy of logits (N, C_r) and label (N,) int64, mean over the rows.

    torchshard needs the same number of columns on every rank: the caller pads.
    """
    torchshard.register_parallel_dim(logits, -1)
    return _torchshard_cross_entropy(logits, label)
