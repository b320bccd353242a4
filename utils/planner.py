"""The memory of a training process, part by part, predicted before anything is started.

Shapes: n images of this process, N rows that its classifier sees (n * W with sharded classes, else n), C classes, C_r
classes of this process, K centers of a chunk of the margin softmax, q centers of a class, d the embedding size.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from losses.fused import SPARE_COLUMNS, automatic_memory_bytes, chunk_classes, whole_classes
from models.checkpointing import Block
from utils.dist.sharding import ClassShard

IMAGE_VALUES = 3 * 112 * 112
FLOAT, LABEL = 4, 8  # bytes
# An allowance for GPU memory outside PyTorch's allocator: the CUDA context, NCCL's buffers, cuBLAS and cuDNN.
CUDA_ALLOWANCE = 1536 * 2**20


@dataclass(frozen=True)
class BackboneMemory:
    """Bytes of a backbone in training."""

    trained: tuple[int, ...]  # of each trained parameter
    fixed: int  # of all other parameters and buffers
    activations: int  # saved for the backward pass whatever the batch size: low-precision copies of the weights
    activations_per_image: int  # saved for each image


@dataclass(frozen=True)
class RunSettings:
    """What the memory of a run depends on, apart from its backbone."""

    classes: int  # C
    batch_size: int  # images of a micro-batch, over all processes
    world_size: int  # W
    total_bytes: int  # memory of the GPU, or a process's share of the CPU's; for the automatic choice below
    cache_bytes: int | None  # the cache that a chunk of classes must fit; None: a GPU
    embedding_size: int = 512  # d
    sub_centers: int = 1  # q
    model_parallel: bool = True  # the classes are sharded; otherwise each process has them all, under DDP
    zero: bool = False  # the optimizer state of replicated parameters is sharded, in equal parts
    optimizer_states: int = 1  # values that the optimizer keeps for each value of a parameter
    ema: bool = False  # an average of the backbone is kept
    fused_update: bool = False  # the gradient of the class centers is never stored
    sample_rate: float = 1.0  # the part of the classes that a step uses
    micro_batches: int = 1  # each adds a gradient
    classifier_memory_mib: float | None = None  # for saved probabilities; None: the trainer's automatic choice
    matmul_dtype: torch.dtype | None = None  # of the classifier's matrix products in low precision
    device_type: str = "cuda"  # or "cpu"
    class_major: bool = True  # the classifier's form, by losses.class_major.choose_form; False: the walk


def measure_backbone(
    build: Callable[[], nn.Module], *, device_type: str, autocast_dtype: torch.dtype | None, checkpointed: bool = False
) -> BackboneMemory:
    """Run the backbone's forward pass on fake tensors, which needs no GPU, no memory and no arithmetic.

    Two batch sizes show what grows with the batch. The result is what autograd saves; torch.compile may save less.

    Args:
        build: makes the backbone, images (n, 3, 112, 112) -> (n, d).
        device_type: "cuda" or "cpu", which save different tensors.
        autocast_dtype: of the forward pass, or None for float32.
        checkpointed: with --checkpoint-activations. Then this is an upper bound: all that is kept outside of blocks and
            their inputs, and the activations of the largest block, which is computed again.
    """
    from torch._subclasses import FakeTensorMode  # Importing it takes seconds.

    with torch.device("meta"):  # Some initial values cannot be drawn as fake tensors.
        backbone = build().train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device_type):
        backbone.to_empty(device=device_type)
        small, large = (saved_bytes(backbone, torch.empty(n, 3, 112, 112), device_type, autocast_dtype, checkpointed)
                        for n in (2, 4))
        trained = tuple(parameter.nbytes for parameter in backbone.parameters() if parameter.requires_grad)
        everything = sum(tensor.nbytes for tensor in [*backbone.parameters(), *backbone.buffers()])
    per_image = (large - small) // 2
    return BackboneMemory(trained, everything - sum(trained), small - 2 * per_image, per_image)


def saved_bytes(
    backbone: nn.Module, images: Tensor, device_type: str, autocast_dtype: torch.dtype | None,
    checkpointed: bool = False,
) -> int:
    """Bytes that autograd saves for the backward pass of backbone(images), without images, parameters and buffers.

    Tensors that share memory count once. checkpointed: as in `measure_backbone`.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [images, *backbone.parameters(), *backbone.buffers()]}
    # The storages, because a freed address could be used again; each with the block that saved it, 0 outside of blocks.
    saved: dict[int, tuple[int, torch.UntypedStorage]] = {}
    block = 0

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.setdefault(storage._cdata, (block, storage))
        return tensor

    def enter(number: int, inputs: tuple[Any, ...]) -> None:
        nonlocal block
        block = number
        storage = inputs[0].untyped_storage()
        saved[storage._cdata] = 0, storage

    def leave() -> None:
        nonlocal block
        block = 0

    for number, module in enumerate(backbone.modules()):
        if checkpointed and isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, inputs, number=number: enter(number, inputs))
            module.register_forward_hook(lambda *_: leave())
    if autocast_dtype is not None:  # torch.autocast("cuda") refuses to be enabled on a machine without a GPU
        torch.set_autocast_dtype(device_type, autocast_dtype)
        torch.set_autocast_enabled(device_type, True)
    try:
        with saved_tensors_hooks(save, lambda tensor: tensor):
            backbone(images)
    finally:
        torch.set_autocast_enabled(device_type, False)
        torch.clear_autocast_cache()
    bytes_of: dict[int, int] = {}
    for number, storage in saved.values():
        bytes_of[number] = bytes_of.get(number, 0) + storage.nbytes()
    return bytes_of.pop(0, 0) + max(bytes_of.values(), default=0)


def predict_memory(backbone: BackboneMemory, run: RunSettings) -> dict[str, int]:
    """The bytes of each part at the peak of the process that needs most. Their sum is the peak.

    Assumes float32 parameters, SGD or AdamW with weight decay, DistributedDataParallel, and the fused margin softmax.
    """
    d = run.embedding_size
    sampled = run.sample_rate < 1
    sharded = run.model_parallel or (run.fused_update or sampled) and run.world_size == 1
    size = ClassShard(run.classes, 0, run.world_size if sharded else 1).size * run.sub_centers
    images = -(-run.batch_size // run.world_size)
    rows = images * run.world_size if sharded else images
    low = run.matmul_dtype.itemsize if run.matmul_dtype is not None else 0
    centers, trained = size * d * FLOAT, sum(backbone.trained)

    replicated = [*backbone.trained, *([] if sharded else [centers])]
    shares = run.world_size if run.zero else 1
    of_centers = centers if sharded else -(-centers // shares)

    # The buffers of losses.fused for a chunk in the forward and in the backward pass, and what connects the two.
    # Sampled classes are the drawn ones and one for each row; chunks of them gather rows of centers and momentum.
    drawn = max(1, int(run.sample_rate * (size // run.sub_centers))) * run.sub_centers if sampled else size
    targets = rows * run.sub_centers if sampled else 0
    used = drawn + targets
    chunk = whole_classes(min(chunk_classes(rows, d, run.cache_bytes, FLOAT, run.sub_centers), max(drawn, targets)),
                          run.sub_centers)
    chunks = -(-drawn // chunk) - (-targets // chunk)
    gathered = chunk * d * FLOAT if sampled else 0
    gradient = 0 if run.fused_update else used * d * FLOAT
    summed = gradient if sampled else 0  # RowOptimizer's sums of equal rows
    joined = 0
    if summed and run.micro_batches > 1:
        # The sum of the micro-batches before, with the targets of each, and the last one; then the two are joined.
        joined = summed = (drawn + run.micro_batches * targets) * d * FLOAT
        gradient = joined + drawn * d * FLOAT
    block = rows * (chunk + SPARE_COLUMNS)
    probs = 2 if run.matmul_dtype == torch.bfloat16 else FLOAT
    if run.class_major:
        block = rows * chunk
    saved_block = block * probs
    budget = (automatic_memory_bytes(centers, run.total_bytes, run.fused_update, run.optimizer_states, run.sample_rate)
              if run.classifier_memory_mib is None
              else int(run.classifier_memory_mib * 2**20))
    low_centers = chunk * d * (FLOAT + low) if low else 0
    # The closest center of each class, int64, and which others are farther, bool, of this chunk and of the last one.
    closest = rows * chunk * (LABEL + 2 * run.sub_centers) // run.sub_centers if run.sub_centers > 1 else 0
    forward = 2 * block * FLOAT + low_centers + closest + gathered
    backward = (block * (FLOAT + low) + chunk * d * FLOAT * (1 + run.fused_update) + low_centers + closest
                + gathered * (2 + run.optimizer_states if run.fused_update else 1))
    if run.class_major:  # losses.class_major, in its eager form: the kernels need less
        both = block * FLOAT + low_centers + (0 if low else chunk * d * FLOAT) + closest + gathered
        # Which classes are not closer, bool. A CPU widens it to int64 to count them.
        forward = both + block * (1 if run.cache_bytes is None else 1 + LABEL)
        backward = (both + block * low + chunk * d * FLOAT * run.fused_update
                    + gathered * (1 + run.optimizer_states) * run.fused_update)

    state, states = "moments" if run.optimizer_states > 1 else "momentum", run.optimizer_states
    average = trained + backbone.fixed if run.ema else 0
    parts = {
        "backbone weights": trained + backbone.fixed,
        # A gradient moves to its bucket as soon as it is complete; before the last micro-batch it is added up outside.
        "backbone gradients": trained if run.micro_batches > 1 else max(backbone.trained, default=0),
        "DDP buckets": sum(replicated),
        f"backbone {state}": -(-trained // shares) * states,
        **({"backbone average": average} if run.ema else {}),
        "images": images * IMAGE_VALUES * (1 + FLOAT),
        "activations": backbone.activations + images * backbone.activations_per_image,
        "class centers": centers,
        "class centers' gradient": gradient,
        f"class centers' {state}": of_centers * states,
        "saved probabilities": min(chunks, budget // saved_block) * saved_block,
        "chunk buffers": (max(forward, backward) + chunks * rows * (LABEL + FLOAT)
                          + used * (FLOAT + LABEL * sampled)),
        # All rows: gathered, in matmul_dtype, their gradient and a chunk's part of it. This process's rows: before and
        # after the normalization, and both gradients.
        "embeddings": rows * d * (3 * FLOAT + low) + 4 * images * d * FLOAT,
        **({"sum of gradients, beyond buffers": 0} if joined else {}),
        "optimizer, beyond activations": 0,
        "CUDA, cuDNN, NCCL": CUDA_ALLOWANCE if run.device_type == "cuda" else 0,
    }
    # Weight decay copies the gradients of replicated parameters, AdamW makes roots of one of its states, ZeRO gathers
    # all weights beside its own, the average of --ema differences, and RowOptimizer sums of the rows of sampled
    # classes; the backward pass has freed its inputs by then.
    freed = sum(parts[name] for name in ("images", "activations", "saved probabilities", "chunk buffers", "embeddings"))
    if joined:
        parts["sum of gradients, beyond buffers"] = max(
            0, joined - sum(parts[name] for name in ("saved probabilities", "chunk buffers")))
        summed -= drawn * d * FLOAT  # the last micro-batch's is gone
    optimized = -(-sum(replicated) // shares)
    weights = sum(replicated) + optimized if shares > 1 else 0
    parts["optimizer, beyond activations"] = max(0, *(
        size - freed for size in (optimized, weights, average, summed)))
    return parts


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest number from `start` on for which `fits` is true, found by bisection; 0 if it is false for `start`."""
    numbers = range(start, 2**50)
    count = bisect.bisect_left(numbers, True, key=lambda number: not fits(number))
    return numbers[count - 1] if count else 0
