"""The time of a training step, part by part, predicted before anything is started.

The code itself runs on fake tensors, and every operator is counted: arithmetic, bytes, kernel launches. An operator
takes as long as the slowest of the three. Collectives have a latency and a bandwidth.

Shapes: n images of this process, N rows that its classifier sees (n * W with sharded classes, else n), C_r classes of
this process, K centers of a chunk of the margin softmax, d the embedding size.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from losses.class_major import find_form
from losses.fused import SPARE_COLUMNS, automatic_memory_bytes, chunk_classes, whole_classes
from losses.margins import ArcFace
from models.checkpointing import checkpoint_activations
from models.classifier import MarginClassifier
from utils.dist.sharding import ClassShard
from utils.operators import Counts, OperatorCounter
from utils.planner import FLOAT, LABEL, RunSettings
from utils.rates import (
    ARITHMETIC,
    CONVOLUTION,
    DEPTHWISE,
    LAUNCHES,
    MEMORY,
    NETWORK,
    NORMALIZATION,
    OTHER,
    PRODUCT,
    Operator,
    Rates,
)
from utils.training.optim import OPTIMIZER_SETTINGS, OPTIMIZERS, ROW_OPTIMIZERS, make_state

# DistributedDataParallel averages the gradients in buckets of this size. The last one waits for the whole backward
# pass.
_BUCKET = 25 * 2**20

Work = Counter[Operator]  # how often each is called


class Part(NamedTuple):
    """A part of a step."""

    name: str
    seconds: float
    bound: str  # of ARITHMETIC, MEMORY, LAUNCHES, NETWORK: what most of the time goes to


@dataclass(frozen=True)
class BackboneWork:
    """Work of a backbone for n images."""

    forward: Work
    backward: Work
    update: Work
    trained: tuple[int, ...]  # bytes of each trained parameter


class _Recorder(OperatorCounter):
    """Keeps each operator by itself, in `work`."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.work: Work = Counter()

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        self.counts = Counts()
        super()._count(func, args, kwargs, result)
        flops, size, launches = (sum(counted.values()) for counted in
                                 (self.counts.flops, self.counts.bytes, self.counts.launches))
        if launches:
            low = flops > 0 and args[1].dtype in (torch.bfloat16, torch.float16)  # args[0] of addmm is the sum
            kind = _kind_of(func.overloadpacket.__name__, args, flops)
            self.work[Operator(kind, low, flops, size, launches)] += 1

    def take_work(self) -> Work:
        """The work so far. Recording starts again."""
        work, self.work = self.work, Counter()
        return work


def _kind_of(name: str, args: Any, flops: int) -> str:
    if name.startswith("convolution"):
        groups = args[9] if name == "convolution_backward" else args[8]
        return DEPTHWISE if groups > 1 else CONVOLUTION
    if flops:
        return PRODUCT
    return NORMALIZATION if "_norm" in name and name != "linalg_vector_norm" else OTHER


class _Fake(FakeTensorMode):
    """Fake tensors, and torch's fused optimizers on them, which compute in place and have no form for such tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_fused_sgd_", "_fused_adamw_"):
            return None
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextlib.contextmanager
def _recording(device_type: str) -> Iterator[_Recorder]:
    """Within it, tensors are fake and their operators are recorded.

    They are tensors of the CPU that take themselves for CUDA's if device_type is "cuda": autograd asks the driver about
    the streams of CUDA's own, which a machine without a GPU lacks.
    """
    cuda = device_type == "cuda"
    with _Fake(allow_non_fake_inputs=True), mock.patch.object(FakeTensor, "is_cuda", cuda, create=True), \
            mock.patch.object(FakeTensor, "is_cpu", not cuda, create=True), _Recorder() as recorder:
        yield recorder


def count_backbone(
    build: Callable[[], nn.Module], images: int, *, device_type: str, autocast_dtype: torch.dtype | None,
    checkpointed: bool = False, optimizer: str = "sgd", shares: int = 1,
) -> BackboneWork:
    """The work of a training step of a backbone, images (n, 3, 112, 112) -> (n, d).

    checkpointed: with --checkpoint-activations. shares: with ZeRO the ranks, among which the update is divided.
    """
    with torch.device("meta"):  # Some initial values cannot be drawn as fake tensors.
        backbone = build().train()
    if checkpointed:
        checkpoint_activations(backbone)
    with _recording(device_type) as recorder:
        backbone.to_empty(device="cpu")
        batch = torch.empty(images, 3, 112, 112)
        recorder.take_work()
        with torch.autocast("cpu", autocast_dtype, enabled=autocast_dtype is not None):
            embedding = backbone(batch).float()
        forward = recorder.take_work()
        embedding.backward(torch.empty_like(embedding))
        backward = recorder.take_work()
        trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        largest_first = sorted(trained, key=Tensor.numel, reverse=True)
        update = _count_update(recorder, largest_first[::shares], optimizer)
        return BackboneWork(forward, backward, update, tuple(parameter.nbytes for parameter in trained))


def _count_update(recorder: _Recorder, parameters: Sequence[nn.Parameter], optimizer: str) -> Work:
    make: Any = OPTIMIZERS[optimizer]
    steps = make(parameters, **_settings(optimizer), fused=True)
    make_state(steps)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    recorder.take_work()
    steps.step()
    return recorder.take_work()


def count_classifier(run: RunSettings, optimizer: str = "sgd", form: str = "fused") -> tuple[Work, Work]:
    """The work of the classifier's forward and backward pass, and that of its update unless it is fused.

    form: of --classifier. For a GPU, fused is the form with Triton's kernels where Triton is installed, as on the GPU.
    A walk of a few chunks is counted, and the chunks of this run are as many times that.
    """
    sampled = run.sample_rate < 1
    sharded = _is_sharded(run)
    size = ClassShard(run.classes, 0, run.world_size if sharded else 1).size
    rows = -(-run.batch_size // run.world_size) * (run.world_size if sharded else 1)
    q, d = run.sub_centers, run.embedding_size
    used = max(1, int(run.sample_rate * size)) if sampled else size
    widest = max(used, rows if sampled else 0) * q
    chunk = whole_classes(min(chunk_classes(rows, d, run.cache_bytes, FLOAT, q), widest), q) // q  # in classes
    walk = functools.partial(_count_walk, run, optimizer, form, rows, size, chunk)
    low = run.matmul_dtype == torch.bfloat16
    chunks = -(-used // chunk)
    columns = chunk * q + (0 if run.class_major else SPARE_COLUMNS)
    kept = min(chunks, probability_bytes(run) // (rows * columns * (2 if low else FLOAT)))
    full, rest = (chunks - 1, used - (chunks - 1) * chunk) if chunks > 1 else (0, used)
    everything = 2**50
    # A walk of one chunk of `rest` classes and one full chunk, and full chunks that keep or recompute probabilities.
    # One of two walks differs from the other by a full chunk.
    last = walk(rest, everything if kept == chunks else 0)
    total: Counter[Operator] = Counter(last)
    if full:
        kept_full = min(kept, full)
        for count, memory in ((kept_full, everything), (full - kept_full, 0)):
            if count:
                one, two = walk(chunk, memory), walk(2 * chunk, memory)
                for operator in one.keys() | two.keys():
                    total[operator] += count * (two[operator] - one[operator])
    return total, Counter() if run.fused_update else _count_centers_update(run, optimizer, rows, size, used)


def _count_walk(
    run: RunSettings, optimizer: str, form: str, rows: int, size: int, chunk: int, used: int, memory: int
) -> Work:
    """Of `used` classes, with so many bytes for saved probabilities."""
    sampled = run.sample_rate < 1
    with _recording(run.device_type) as recorder:
        centers = nn.Parameter(torch.empty((size if sampled else used) * run.sub_centers, run.embedding_size))
        embedding = torch.empty(rows, run.embedding_size, requires_grad=True)
        label = torch.empty(rows, dtype=torch.int64)
        step: Any = ROW_OPTIMIZERS[optimizer](centers, skip_nonfinite=True, **_settings(optimizer))
        if run.fused_update:
            make_state(step)
        loss: Any = functools.partial(
            find_form(form, run.device_type), saved_probs_mib=memory / 2**20, matmul_dtype=run.matmul_dtype,
            update=step.update_rows if run.fused_update else None, chunk=chunk * run.sub_centers)
        if sampled:
            loss = functools.partial(loss, drawn=torch.empty(used, dtype=torch.int64))
        classifier = MarginClassifier(centers, ClassShard(size if sampled else used, 0, 1), ArcFace(), scale=64.0,
                                      group=None, loss=loss, sub_centers=run.sub_centers)
        recorder.take_work()
        value, _ = classifier(embedding, label)
        value.backward()
        return recorder.take_work()


def _count_centers_update(run: RunSettings, optimizer: str, rows: int, size: int, used: int) -> Work:
    """Of all classes' centers, or of those that are sampled and of the targets' by a sparse gradient."""
    with _recording(run.device_type) as recorder:
        centers = nn.Parameter(torch.empty(size * run.sub_centers, run.embedding_size))
        if run.sample_rate == 1:
            return _count_update(recorder, [centers], optimizer)
        count = (used + rows) * run.sub_centers
        centers.grad = torch.sparse_coo_tensor(
            torch.empty(1, count, dtype=torch.int64), torch.empty(count, run.embedding_size), centers.shape,
            check_invariants=False)
        step = ROW_OPTIMIZERS[optimizer](centers, skip_nonfinite=True, **_settings(optimizer))
        make_state(step)
        recorder.take_work()
        step.step()
        return recorder.take_work()


def _settings(optimizer: str) -> Any:
    return OPTIMIZER_SETTINGS[optimizer]


def probability_bytes(run: RunSettings) -> int:
    """Memory for probabilities that are saved for the backward pass."""
    if run.classifier_memory_mib is not None:
        return int(run.classifier_memory_mib * 2**20)
    classes = ClassShard(run.classes, 0, run.world_size if _is_sharded(run) else 1).size
    return automatic_memory_bytes(classes * run.sub_centers * run.embedding_size * FLOAT, run.total_bytes,
                                  run.fused_update, run.optimizer_states, run.sample_rate)


def _is_sharded(run: RunSettings) -> bool:
    return run.model_parallel or (run.fused_update or run.sample_rate < 1) and run.world_size == 1


def time_of(work: Work, rates: Rates, name: str = "") -> Part:
    """The seconds of the work, and the bound of the operators that most of it goes to."""
    seconds: dict[str, float] = dict.fromkeys((ARITHMETIC, MEMORY, LAUNCHES), 0.0)
    for operator, count in work.items():
        bounds = rates.bounds(operator)
        bound = max(bounds, key=bounds.__getitem__)
        seconds[bound] += count * bounds[bound]
    return Part(name, sum(seconds.values()), max(seconds, key=seconds.__getitem__))


def predict_step(backbone: BackboneWork, run: RunSettings, rates: Rates, optimizer: str = "sgd") -> list[Part]:
    """The parts of a step of one micro-batch. Their sum is the step, without the loading of data."""
    sharded, world_size = _is_sharded(run), run.world_size
    walk, centers_update = count_classifier(run, optimizer)
    backward = time_of(backbone.backward, rates, "backbone, backward")
    parts = [time_of(backbone.forward, rates, "backbone, forward"), backward, time_of(walk, rates, "classifier"),
             time_of(backbone.update + centers_update, rates, "optimizer")]
    if world_size == 1:
        return parts
    trained = sum(backbone.trained)
    if sharded:
        rows = -(-run.batch_size // world_size) * world_size
        embeddings = rows * run.embedding_size * FLOAT
        # Embeddings and labels are gathered, cosines summed, and the rows' gradient is reduced and scattered. The
        # rows' sums and ranks, in float64, are added; the walk gathers them and maxima.
        merged = (rates.collective(2 * 8 * rows, world_size, passes=2) if run.class_major
                  else rates.collective(3 * 8 * rows * world_size, world_size))
        parts.append(Part("embeddings to all GPUs and back", sum((
            2 * rates.collective(embeddings, world_size), rates.collective(rows * LABEL, world_size),
            rates.collective(rows * FLOAT, world_size, passes=2), merged)), NETWORK))
    else:
        trained += run.classes * run.sub_centers * run.embedding_size * FLOAT
    average = rates.collective(trained, world_size, passes=2)
    buckets = max(1, math.ceil(trained / _BUCKET))
    average += (buckets - 1) * rates.collective(0, world_size, passes=2)
    exposed = max(average - backward.seconds, average / buckets)
    parts.append(Part("gradients' average, not overlapped", exposed, NETWORK))
    if run.zero:
        parts.append(Part("ZeRO's gathering of weights", rates.collective(trained, world_size), NETWORK))
    return parts
