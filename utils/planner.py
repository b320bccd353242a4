"""What a training process will need, before anything is started: bytes, part by part.

Shapes: n images of this process, N rows that its classifier sees (n * W with sharded classes, else n), C classes, C_r of this
process, K classes of a chunk of the margin softmax, d the embedding size.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from losses.fused import automatic_memory_bytes, chunk_classes
from utils.dist.sharding import ClassShard

IMAGE_VALUES = 3 * 112 * 112
FLOAT, LABEL = 4, 8  # bytes


# What a process takes of a GPU beside PyTorch's own allocations and for kernels' work space: the CUDA context, NCCL's buffers,
# cuBLAS and cuDNN. An allowance, not a prediction.
CUDA_ALLOWANCE = 1536 * 2**20


@dataclass(frozen=True)
class BackboneMemory:
    """Bytes of a backbone in training.

    trained: of each trained parameter. fixed: of all other parameters and buffers.
    activations: kept for the backward pass whatever the batch, which are low-precision copies of the weights;
    activations_per_image: kept for each image.
    """

    trained: tuple[int, ...]
    fixed: int
    activations: int
    activations_per_image: int


def measure_backbone(
    build: Callable[[], nn.Module], *, device_type: str, autocast_dtype: torch.dtype | None
) -> BackboneMemory:
    """Build the module and run its forward pass on tensors without contents: no GPU, no memory and no arithmetic is needed.

    Two batch sizes tell what grows with the batch. It is what autograd keeps; torch.compile may keep less.

    Args:
        build: makes the backbone, images (n, 3, 112, 112) -> (n, d).
        device_type: "cuda" or "cpu"; the two keep different things, as does every autocast type.
        autocast_dtype: of the forward pass, or None for float32.
    """
    from torch._subclasses import FakeTensorMode  # here: its modules take seconds to load

    with FakeTensorMode(), torch.device(device_type):
        backbone = build().train()
        small, large = (
            saved_bytes(backbone, torch.empty(n, 3, 112, 112), device_type, autocast_dtype) for n in (2, 4)
        )
        trained = tuple(parameter.nbytes for parameter in backbone.parameters() if parameter.requires_grad)
        everything = sum(tensor.nbytes for tensor in [*backbone.parameters(), *backbone.buffers()])
    per_image = (large - small) // 2
    return BackboneMemory(trained, everything - sum(trained), small - 2 * per_image, per_image)


def saved_bytes(backbone: nn.Module, images: Tensor, device_type: str, autocast_dtype: torch.dtype | None) -> int:
    """Bytes that autograd keeps for the backward pass of backbone(images), without the images, parameters and buffers.

    Tensors that share memory count once.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [images, *backbone.parameters(), *backbone.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}  # the objects are kept: the address of a freed one could come again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    # Not torch.autocast: without a GPU that refuses to be enabled for "cuda".
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, autocast_dtype is not None)
    torch.set_autocast_dtype(device_type, autocast_dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone(images)
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
    return sum(storage.nbytes() for storage in saved.values())


def predict_memory(
    backbone: BackboneMemory,
    *,
    classes: int,
    embedding_size: int,
    batch_size: int,
    world_size: int,
    model_parallel: bool,
    zero: bool,
    fused_update: bool,
    classifier_memory_mib: float | None,
    operands: torch.dtype | None,
    device_type: str,
    total_bytes: int,
    cache_bytes: int,
) -> dict[str, int]:
    """The bytes of each part in the process that needs most, at the moment when it needs most; together they are the peak.

    Float32 parameters, SGD with momentum and weight decay under DistributedDataParallel, the fused margin softmax.

    Args:
        batch_size: images of a micro-batch, of all processes.
        world_size: W.
        model_parallel: the classes are sharded; else each process has all of them, and DistributedDataParallel does the rest.
        zero: momentum of replicated parameters is shared out, each parameter's to one process.
        fused_update: there is no gradient of the centers.
        classifier_memory_mib: for kept probabilities; None: the trainer's automatic choice.
        operands: low-precision type of the classifier's products, None for float32.
        device_type: "cuda" or "cpu".
        total_bytes: of the GPU, or of a process's share of the CPU's memory: what the automatic choice starts from.
        cache_bytes: of the cache that a chunk is fitted to.
    """
    sharded = model_parallel or fused_update and world_size == 1
    size = ClassShard(classes, 0, world_size if sharded else 1).size
    images = -(-batch_size // world_size)
    rows = images * world_size if sharded else images
    low = operands.itemsize if operands is not None else 0
    centers, trained = size * embedding_size * FLOAT, sum(backbone.trained)

    replicated = [*backbone.trained, *([] if sharded else [centers])]
    optimized = _largest_share(replicated, world_size) if zero else sum(replicated)
    momentum = optimized + (centers if sharded else 0)
    center_momentum = min(centers, momentum)

    # As losses.margin_softmax walks: buffers of a chunk in the forward and in the backward pass, and what connects the two.
    chunk = min(chunk_classes(rows, embedding_size, cache_bytes), size)
    chunks = -(-size // chunk)
    block = rows * (chunk + 16)  # a chunk's probabilities, and columns that keep rows aligned
    kept_block = block * (2 if operands == torch.bfloat16 else FLOAT)
    budget = (automatic_memory_bytes(centers, total_bytes, fused_update) if classifier_memory_mib is None
              else int(classifier_memory_mib * 2**20))
    low_centers = chunk * embedding_size * (FLOAT + low) if low else 0
    forward = 2 * block * FLOAT + low_centers
    backward = block * (FLOAT + low) + chunk * embedding_size * FLOAT * (1 + fused_update) + low_centers
    row_values = rows * embedding_size

    parts = {
        "backbone weights": trained + backbone.fixed,
        "backbone gradients": trained,
        "DDP buckets": sum(replicated),
        "backbone momentum": momentum - center_momentum,
        "images": images * IMAGE_VALUES * (1 + FLOAT),
        "activations": backbone.activations + images * backbone.activations_per_image,
        "class centers": centers,
        "class centers' gradient": 0 if fused_update else centers,
        "class centers' momentum": center_momentum,
        "kept probabilities": min(chunks, budget // kept_block) * kept_block,
        "chunk buffers": max(forward, backward) + chunks * rows * (LABEL + FLOAT) + size * FLOAT,
        # Gathered, as operands, their gradient and a chunk's part of that; beside them this process's own, before and after
        # normalisation, and their gradients.
        "embeddings": row_values * (3 * FLOAT + low) + 4 * images * embedding_size * FLOAT,
        "optimizer, beyond activations": 0,
        "CUDA, cuDNN, NCCL": CUDA_ALLOWANCE if device_type == "cuda" else 0,
    }
    # Weight decay makes a copy of the gradients of replicated parameters. By then what the backward pass read is gone.
    copies = optimized
    passing = sum(parts[name] for name in ("images", "activations", "kept probabilities", "chunk buffers", "embeddings"))
    parts["optimizer, beyond activations"] = max(0, copies - passing)
    return parts


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number from `start` on for which `fits` holds, which it must do up to there; 0 where it does for none."""
    if not fits(start):
        return 0
    good, bad = start, 2 * start
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _largest_share(sizes: Sequence[int], world_size: int) -> int:
    """As ZeroRedundancyOptimizer shares parameters out: the largest first, each to the process that has least."""
    shares = [0] * world_size
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(shares, shares[0] + size)
    return max(shares)
