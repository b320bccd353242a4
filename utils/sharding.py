"""Which classes a rank owns, and everything taken from torchshard: the only file that imports it.

torchshard gives the model-parallel process group, the parallel-dim registration by which DistributedDataParallel is told
to leave sharded parameters alone, and `parallel_cross_entropy`, the reference that our loss is tested against.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torchshard
from torch import Tensor, nn
from torchshard.nn.functional import parallel_cross_entropy as _torchshard_cross_entropy

# Class centers are drawn in blocks of this many classes, each from its own generator, so that a rank draws only the blocks
# that overlap its shard and the centers do not depend on the number of ranks. 8192 x 512 float32 is 16 MiB.
CENTER_BLOCK = 8192


@dataclass(frozen=True)
class ClassShard:
    """The classes [start, stop) of `num_classes` that one rank owns: torch.chunk's convention, which is DTensor's too.

    ceil(C / W) classes a rank, so that the last ranks may own fewer, or none (C = 5, W = 4: 2, 2, 1, 0).
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
    """Collective. torchshard's model-parallel group of all `world_size` ranks, made at the first call in a process."""
    if not torchshard.distributed.is_initialized():
        torchshard.distributed.init_process_group(group_size=world_size)
    return torchshard.distributed.get_group()


def register_parallel_dim(parameter: nn.Parameter, dim: int) -> None:
    """Mark `parameter` as this rank's shard (torchshard's attribute; 1 and -1 are the class dimension)."""
    torchshard.register_parallel_dim(parameter, dim)


def is_sharded(parameter: nn.Parameter) -> bool:
    return torchshard.get_parallel_dim(parameter) is not None


def let_ddp_ignore_shards(model: nn.Module) -> list[str]:
    """Tell DistributedDataParallel, before it wraps `model`, to leave sharded parameters alone. Returns their names."""
    return torchshard.register_ddp_parameters_to_ignore(model)


def parallel_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Collective. torchshard's cross entropy of column-sharded logits (N, C_r), mean over the N rows; label (N,) int64.

    torchshard itself asks that every rank have the same number of columns: the caller pads.
    """
    torchshard.register_parallel_dim(logits, -1)
    return _torchshard_cross_entropy(logits, label)


def initial_centers(
    shard: ClassShard, embedding_size: int, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows [start, stop) of the initial class centers: (C_r, d) on the device, each row uniform on the unit sphere.

    Row c depends on (seed, c, d) only: any number of ranks starts from the same classifier, and no rank draws or holds
    more than its shard and, per thread, one block of `CENTER_BLOCK` rows.
    """
    centers = torch.empty(shard.size, embedding_size, device=device, dtype=dtype)

    def draw(block: int) -> None:
        first = block * CENTER_BLOCK
        low, high = max(shard.start, first), min(shard.stop, first + CENTER_BLOCK)
        # Philox is keyed by (seed, block): torch's CPU generator would use 32 bits only, too few to keep blocks apart.
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, block], dtype=np.uint64)))
        # The whole block is drawn, also where less is needed: a row depends on nothing but its own place.
        rows = generator.standard_normal((CENTER_BLOCK, embedding_size), dtype=np.float32)[low - first:high - first]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        centers[low - shard.start:high - shard.start] = torch.from_numpy(rows)

    # NumPy draws without holding the interpreter: one thread would take minutes for tens of millions of classes.
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        for _ in pool.map(draw, range(shard.start // CENTER_BLOCK, -(-shard.stop // CENTER_BLOCK)) if shard.size else ()):
            pass
    return centers
