"""The ArcFace classifier: this rank's class centers; embeddings and labels -> loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from losses.fused import automatic_memory_bytes, margin_softmax
from utils.dist.collectives import GatherRows, all_gather_rows
from utils.dist.sharding import ClassShard, register_parallel_dim


class ArcFaceClassifier(nn.Module):
    """Class centers w (C_r, d), and the margin softmax of embeddings against all C of them.

    Sharded (a `group` is given): each rank owns the rows `shard` of the centers, the rows of all ranks are gathered, and
    the loss is the mean over the N = n * W rows of the global batch, the same number on every rank.
    Replicated (`group` None): each rank has all classes, and the loss is the mean over its own n rows;
    DistributedDataParallel averages the gradients.

    Args:
        embedding_size: d.
        shard: the classes this rank owns.
        scale, margin, easy_margin: ArcFace's s, m (radians) and the margin's range.
        seed: of the initial centers, which depend neither on rank nor on world size.
        device, dtype: where and as what the centers are made: in place, since twice a shard may not fit.
        group: the model-parallel group.
        model_parallel_dim: the dimension of the shards as torchshard registers it, 1 or -1.
        loss: `margin_softmax`, perhaps with some of its own arguments bound, or `margin_softmax_torchshard`.
    """

    def __init__(
        self,
        embedding_size: int,
        shard: ClassShard,
        *,
        scale: float,
        margin: float,
        easy_margin: bool,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None,
        model_parallel_dim: int = 1,
        loss: Callable[..., tuple[Tensor, Tensor]] = margin_softmax,
    ) -> None:
        super().__init__()
        self.shard, self.group = shard, group
        self.scale, self.margin, self.easy_margin = scale, margin, easy_margin
        self.loss = loss
        self.weight = nn.Parameter(initial_centers(shard, embedding_size, seed, device, dtype))
        if group is not None:
            register_parallel_dim(self.weight, model_parallel_dim)

    def forward(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Collective over the group. embedding (n, d), any float dtype, not normalised; label (n,) int64 in [0, C).

        Returns (loss, num_closer): a scalar in the centers' dtype, and int64 (N,) sharded or (n,) replicated: how many
        classes are closer to the embedding than its own (0: a top-1 hit).
        """
        # Out of autocast: a logit of 64 * cos in bf16 would be off by up to 0.12.
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = F.normalize(embedding.to(self.weight.dtype))
            if self.group is not None:
                embedding = GatherRows.apply(embedding, self.group)
                label = all_gather_rows(label, self.group)
            return self.loss(
                embedding, label, self.weight, shard=self.shard, scale=self.scale, margin=self.margin,
                easy_margin=self.easy_margin, group=self.group,
            )

    def extra_repr(self) -> str:
        return (f"classes={self.shard.num_classes}, shard=[{self.shard.start}, {self.shard.stop}), "
                f"scale={self.scale}, margin={self.margin}, easy_margin={self.easy_margin}")


def automatic_memory_mib(centers: Tensor, processes: int, fused_update: bool) -> float:
    """MiB of this process for kept probabilities: a quarter of the memory that class centers, gradient and momentum leave.

    It comes from the machine's whole memory, not from what is free now: a run that is resumed must compute as before.

    Args:
        centers: the class centers (C_r, d), on the device.
        processes: that share the CPU's memory. A GPU is one process's own.
        fused_update: there is no gradient.
    """
    if centers.is_cuda:
        total = torch.cuda.get_device_properties(centers.device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    return automatic_memory_bytes(centers.nbytes, total, fused_update) / 2**20


# Class centers are drawn in blocks of this many classes, each from its own generator, so that a rank draws only the blocks
# that overlap its shard and the centers do not depend on the number of ranks. 8192 x 512 float32 is 16 MiB.
CENTER_BLOCK = 8192


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
