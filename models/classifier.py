"""The ArcFace classifier: this rank's class centers; embeddings and labels -> loss."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from losses.margin_softmax import margin_softmax
from utils.distributed import GatherRows, all_gather_rows
from utils.memory import automatic_memory_bytes
from utils.sharding import ClassShard, initial_centers, register_parallel_dim


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

        Returns (loss, target_rank): a scalar in the centers' dtype, and int64 (N,) sharded or (n,) replicated: how many
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
