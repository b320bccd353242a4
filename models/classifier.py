"""The classifier: this rank's class centers; embeddings and labels -> loss."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from losses.fused import automatic_memory_bytes, margin_softmax
from losses.margins import Margin
from utils.dist.collectives import GatherRows, all_gather_rows
from utils.dist.sharding import ClassShard, register_parallel_dim


class MarginClassifier(nn.Module):
    """Class centers w (C_r * q, d), q of each class (usually 1), and the margin softmax of embeddings against all C
    classes.

    Sharded (a `group` is given): each rank owns the classes `shard`, the embeddings of all ranks are gathered, and the
    loss is the mean over the N = n * W rows of the global batch, the same number on every rank.
    Replicated (`group` None): each rank has all classes, and the loss is the mean over its own n rows;
    DistributedDataParallel averages the gradients.

    Args:
        weight: the centers of this rank, from `class_centers`, which are the classes of `shard`.
        margin: one of losses.margins.MARGINS.
        scale: s.
        loss: `margin_softmax`, usually with some of its arguments bound, or a form of `losses.softmax`.
        sub_centers: q. Class c of the shard, counted from its first, has the rows [c * q, c * q + q) of `weight`.
        draw: step -> classes of the shard, counted from its first: a step uses only these and its targets, such as
            `losses.sampling.draw_classes` with the other arguments bound. None: all classes. Only for `margin_softmax`.
    """

    def __init__(
        self, weight: nn.Parameter, shard: ClassShard, margin: Margin, *, scale: float,
        group: dist.ProcessGroup | None, loss: Callable[..., tuple[Tensor, Tensor]] = margin_softmax,
        sub_centers: int = 1, draw: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.sub_centers, self._draw = sub_centers, draw
        self._drawn: dict[str, Tensor] = {}  # an argument of the loss
        self.weight, self.margin, self._loss = weight, margin, loss
        self.shard, self.scale, self.group = shard, scale, group
        if draw is not None:
            # Weak: the hook must not keep the centers when nothing else does.
            add = weakref.WeakMethod(self._add_to_earlier_gradient)
            weight.register_hook(lambda gradient: add()(gradient))  # type: ignore[misc]  # it lives while it computes

    def _add_to_earlier_gradient(self, gradient: Tensor) -> Tensor | None:
        """Keep one gradient of the drawn classes in a step of several micro-batches, which all use the same ones.

        autograd would append each sparse gradient to those before: with K micro-batches K rows for each drawn class.
        This is a hook of the centers, for `loss.backward()` and gradients of this step.
        """
        earlier = self.weight.grad
        if earlier is None:
            return None
        drawn = len(self._drawn["drawn"]) * self.sub_centers  # the first rows of every gradient (`Sample.rows`)
        earlier._values()[:drawn] += gradient._values()[:drawn]
        rows = torch.cat([earlier._indices(), gradient._indices()[:, drawn:]], dim=1)  # the targets differ
        values = torch.cat([earlier._values(), gradient._values()[drawn:]])
        self.weight.grad = torch.sparse_coo_tensor(rows, values, gradient.shape, check_invariants=False)
        # autograd adds what is returned: nothing. It would merge the rows in another order.
        return torch.sparse_coo_tensor(rows[:, :0], values[:0], gradient.shape, check_invariants=False)

    def start_step(self, step: int) -> None:
        """Draw the classes of a step, for all its micro-batches. The training loop calls this before each step.

        step: counted over all epochs, so that a resumed run draws what the interrupted one would have.
        """
        if self._draw is not None:
            assert self.weight.grad is None, "zero_grad first: its rows are those of the classes drawn before"
            drawn = self._draw(step)
            if self.weight.is_cuda:
                drawn = drawn.pin_memory()
            self._drawn = {"drawn": drawn.to(self.weight.device, non_blocking=True)}

    def forward(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Collective over the group. Embeddings (n, d), any float dtype, not normalised, and labels (n,) int64 -> loss,
        num_closer.

        loss: scalar in the centers' dtype.
        num_closer: int64, (N,) sharded or (n,) replicated: how many classes are closer to the embedding than its own
            (0: a top-1 hit). With `draw`, of the classes that the step uses.
        """
        # Out of autocast: a logit of 64 * cos in bf16 would be off by up to 0.12.
        assert self._draw is None or self._drawn, "start_step draws the classes"
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = embedding.to(self.weight.dtype)
            norm = torch.linalg.vector_norm(embedding, dim=1) if self.margin.uses_norm else None
            embedding = F.normalize(embedding)
            if self.group is not None:
                label = all_gather_rows(label, self.group)
                if norm is None:
                    embedding = GatherRows.apply(embedding, self.group)
                else:  # in one collective
                    both = GatherRows.apply(torch.cat([embedding, norm.unsqueeze(1)], dim=1), self.group)
                    embedding, norm = both[:, :-1].contiguous(), both[:, -1]
            start, stop = self.shard.start, self.shard.stop
            target = torch.where((label >= start) & (label < stop), label - start, -1)
            return self._loss(embedding, target, self.weight, self.margin, scale=self.scale, group=self.group,
                              norm=norm, sub_centers=self.sub_centers, **self._drawn)

    @torch.no_grad()
    def end_step(self, skipped: Tensor | None = None) -> None:
        """Collective. Update the margin's running statistics with the rows of all ranks and micro-batches of a step.

        The training loop calls this after each optimizer step.

        skipped: float32 scalar on the device, the same on all ranks: 1 if the step was skipped, and the statistics must
            not change. None: it was not.
        """
        observed = self.margin.observed()
        if observed is None:
            return
        cosine, norm = observed
        if self.group is None and dist.is_initialized():  # sharded rows are the global batch already
            cosine = all_gather_rows(cosine, None)
            norm = None if norm is None else all_gather_rows(norm, None)
        before = [buffer.clone() for buffer in self.margin.buffers()]
        self.margin.update(cosine, norm)
        if skipped is not None:
            for buffer, old in zip(self.margin.buffers(), before):
                buffer.copy_(torch.where(skipped > 0, old, buffer))


def automatic_memory_mib(
    centers: Tensor, processes: int, fused_update: bool, optimizer_states: int = 1, sample_rate: float = 1.0
) -> float:
    """MiB of this process for saved probabilities: a quarter of what class centers, gradient and optimizer state leave.

    It depends on the machine's whole memory, not on what is free now: a resumed run must compute as before. `processes`
    share the CPU's memory; a GPU belongs to one process. With `fused_update` there is no gradient, and `sample_rate` is
    the part of the classes that have one.
    """
    total = (torch.cuda.get_device_properties(centers.device).total_memory if centers.is_cuda
             else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes)
    return automatic_memory_bytes(centers.nbytes, total, fused_update, optimizer_states, sample_rate) / 2**20


# Class centers are drawn in blocks of this many rows, each from its own generator: a rank draws only the blocks that
# overlap its shard, and the centers do not depend on the number of ranks. 8192 x 512 float32 are 16 MiB.
CENTER_BLOCK = 8192


def class_centers(
    shard: ClassShard, embedding_size: int, seed: int, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, parallel_dim: int | None = None, sub_centers: int = 1,
) -> nn.Parameter:
    """`initial_centers` as a parameter; `parallel_dim` (1 or -1) registers it with torchshard as this rank's shard."""
    weight = nn.Parameter(initial_centers(shard, embedding_size, seed, device, dtype, sub_centers))
    if parallel_dim is not None:
        register_parallel_dim(weight, parallel_dim)
    return weight


def initial_centers(
    shard: ClassShard, embedding_size: int, seed: int, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, sub_centers: int = 1,
) -> Tensor:
    """The shard's rows [start * q, stop * q) of the initial class centers, q = `sub_centers`, on the device.

    Each is uniform on the unit sphere. Row c depends on (seed, c, d) only: any number of ranks starts from the same
    classifier. The rows are made in place; besides them each thread holds one block of `CENTER_BLOCK` rows.
    """
    start, stop = shard.start * sub_centers, shard.stop * sub_centers
    centers = torch.empty(stop - start, embedding_size, device=device, dtype=dtype)

    def draw(block: int) -> None:
        first = block * CENTER_BLOCK
        low, high = max(start, first), min(stop, first + CENTER_BLOCK)
        # Philox is keyed by (seed, block). torch's CPU generator would use 32 bits only: too few to keep blocks apart.
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, block], dtype=np.uint64)))
        # Always the whole block, so that a row depends on its own place only.
        rows = generator.standard_normal((CENTER_BLOCK, embedding_size), dtype=np.float32)[low - first:high - first]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        centers[low - start:high - start] = torch.from_numpy(rows)

    # NumPy releases the interpreter's lock while it draws. One thread would take minutes for 10 million classes.
    blocks = range(start // CENTER_BLOCK, -(-stop // CENTER_BLOCK)) if shard.size else range(0)
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        list(pool.map(draw, blocks))
    return centers
