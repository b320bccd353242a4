#!/usr/bin/env python3
"""Step time and memory of the sharded classifier's implementations, beside the machine's GEMM floor.

    python3 scripts/bench_classifier.py --classes 85744 --batch 128 --processes 2

A step is the classifier's part of a training step, on random embeddings: gather the rows of all ranks, forward,
backward, reduce-scatter the rows' gradient and, with --update, step the class centers. The implementations must agree
before they are timed, and take turns on the same inputs in the same processes. --sample-rate adds steps of sampled
classes, with their draw; they are not checked here.

GEMM floor: the 6 * N * C_r * d floating-point operations of the three matrix products, at this machine's rate for the
shapes of a walk in chunks, (K, d)(d, N), (N, K)(K, d) and (K, N)(N, d), measured in turns with the implementations.
Extra memory: the peak of a step beyond what a process holds between steps: centers, their gradient, momentum.

Shapes: N rows (the global batch), n = N / W of each rank, C classes, C_r on this rank, d the embedding size.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from losses.class_major import find_form  # noqa: E402
from losses.margins import ArcFace  # noqa: E402
from losses.sampling import draw_classes  # noqa: E402
from losses.softmax import margin_softmax_torchshard  # noqa: E402
from models.classifier import MarginClassifier, automatic_memory_mib  # noqa: E402
from scripts import measure  # noqa: E402
from utils.dist.collectives import all_gather_rows, all_reduce_sum  # noqa: E402
from utils.dist.context import DistContext, set_matmul  # noqa: E402
from utils.dist.sharding import ClassShard, init_model_parallel  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402
from utils.launch.spawn import launch  # noqa: E402
from utils.options import EMBEDDING_SIZE  # noqa: E402
from utils.training.optim import RowSGD  # noqa: E402

OPERANDS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# --classifier of main.py: fused is what serves the device.
IMPLEMENTATIONS = ("fused", "eager", "triton", "torchshard")

SGD = dict(momentum=0.9, weight_decay=5e-4)

# Agreement is checked with at most this many classes, and (N, C) logits: more would not fit in memory twice.
CHECKED_CLASSES, CHECKED_LOGITS = 100_000, 2**27
# Allowed relative differences, by norm: loss, gradient of the embeddings, gradient of the centers.
TOLERANCES = {"float32": (1e-5, 1e-4, 1e-4), "bf16": (1e-3, 2e-2, 2e-2), "fp16": (1e-3, 2e-2, 2e-2)}

# The GEMM measurement walks over this many classes: 256 MiB of centers, and as much of their gradient, leave the caches
# as cold as the walk over a large shard does.
GEMM_CLASSES = 131_072
GEMM_CHUNKS = {"cpu": (1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384, 32768)}

CSV_COLUMNS = (
    "date", "device", "torch", "threads", "world_size", "classes", "sub_centers", "batch", "embedding_size", "operands",
    "update", "classifier_memory_mib", "steps", "impl", "p20_s", "p50_s", "p80_s", "extra_mib", "gemm_floor_s",
    "over_floor", "speedup_to_torchshard",
)


@dataclass(frozen=True, kw_only=True)
class Options(measure.StepFlags):
    """The command line."""

    impl: tuple[str, ...] = flag("--impl", default=("fused", "torchshard"), choices=IMPLEMENTATIONS,
                                 metavar="A,B", help="implementations that take turns")
    steps: int = flag("--steps", default=20, metavar="K", at_least=1, help="timed steps of each")
    sub_centers: int = flag("--sub-centers", default=1, metavar="K", at_least=1, help="centers of each class")
    update: bool = flag("--update", default=False, help="with the optimizer step of the centers: SGD with momentum")
    classifier_memory_mib: float | None = flag(
        "--classifier-memory-mib", metavar="M", at_least=0, default_text="automatic",
        help="fused: memory of a process for probabilities that are saved for the backward pass; 0: recompute them")
    sample_rate: tuple[float, ...] = flag("--sample-rate", default=(), metavar="R,R,...", above=0, below=1,
                                          help="fused: also steps that use these parts of the classes")
    embedding_size: int = flag("--embedding-size", default=EMBEDDING_SIZE, metavar="D", at_least=1,
                               help="embedding size")
    operands: str = flag("--operands", choices=OPERANDS, default="float32",
                         help="fused, on GPUs: dtype of the matrix products' operands")


def main() -> None:
    options = parse_options()
    measure.check_csv(options.csv, CSV_COLUMNS)
    launch(run, options.plan(), options)


def run(context: DistContext, options: Options) -> None:
    """Collective. Check that the implementations agree, let them take turns, and report on rank 0."""
    device, group = context.device, init_model_parallel(context.world_size)
    if options.matmul is not None:
        set_matmul("ieee")  # TF32 rounds more than TOLERANCES allow
    for name in options.impl:
        if name != "torchshard":
            check_agreement(context, options, group, name)
    set_matmul(options.matmul)
    inputs = Inputs(context, options.classes, options.batch, options.embedding_size, options.sub_centers)
    optimizer = RowSGD(inputs.centers, lr=0.0, skip_nonfinite=False, **SGD)  # lr 0: all steps have the same centers
    gemm = GemmWalk(inputs, options, group)
    works, extra_mib = {"floor": partial(measure.timed, gemm.run, device)}, {}
    rates = {f"fused, rate {rate:g}": rate for rate in options.sample_rate if "fused" in options.impl}
    for name in (*options.impl, *rates):
        step = ClassifierStep(name.partition(",")[0], inputs, options, group, optimizer, rates.get(name, 1.0))
        needs = options.logits_bytes * options.sub_centers if name == "torchshard" else 0
        if measure.fits_in_memory(name, step.run, device, needs):
            held = measure.restart_peak(device)
            step.run()
            extra_mib[name] = measure.peak_mib(device, held)
            works[name] = partial(measure.timed, step.run, device)

    seconds = measure.alternate(works, options.steps)
    if context.is_main:
        median = {name: float(np.median(values)) for name, values in seconds.items()}
        floor = median["floor"] * len(inputs.centers) / gemm.classes
        common = {**asdict(options), **measure.describe_machine(device), "gemm_floor_s": floor}
        measure.report([
            {**common, "impl": name, **measure.spread(seconds[name], "_s"), "extra_mib": extra,
             "over_floor": median[name] / floor,
             "speedup_to_torchshard": median["torchshard"] / median[name] if "torchshard" in median else None}
            for name, extra in extra_mib.items()
        ], CSV_COLUMNS, "impl", options.csv)


class Inputs:
    """This rank's part, always drawn alike: embedding (n, d) L2-normalised, label (n,) in [0, C), centers (C_r * q, d).

    q: sub_centers."""

    def __init__(self, context: DistContext, num_classes: int, batch: int, size: int, sub_centers: int = 1) -> None:
        self.shard = ClassShard(num_classes, context.rank, context.world_size)
        generator = torch.Generator(context.device).manual_seed(context.rank)
        rows, random = batch // context.world_size, partial(torch.randn, device=context.device, generator=generator)
        self.embedding = F.normalize(random(rows, size)).requires_grad_()
        self.label = torch.randint(num_classes, (rows,), device=context.device, generator=generator)
        # In place, since twice a shard of millions may not fit. The rows have a norm of about 1.
        self.centers = nn.Parameter(random(self.shard.size * sub_centers, size).mul_(size**-0.5))


class ClassifierStep:
    """Collective. A training step by one of the implementations."""

    def __init__(
        self, name: str, inputs: Inputs, options: Options, group: dist.ProcessGroup, optimizer: RowSGD,
        sample_rate: float = 1.0,
    ) -> None:
        centers, loss = inputs.centers, margin_softmax_torchshard
        self._step = optimizer.step if options.update else None
        if name != "torchshard":
            memory_mib = options.classifier_memory_mib
            if memory_mib is None:
                memory_mib = automatic_memory_mib(centers, options.world_size, options.update,
                                                  sample_rate=sample_rate)
            loss = partial(find_form(name, centers.device), saved_probs_mib=memory_mib,
                           matmul_dtype=OPERANDS[options.operands],
                           update=optimizer.update_rows if options.update else None)
            self._step = None
        self._inputs, self._steps = inputs, itertools.count()
        draw = partial(draw_classes, inputs.shard, sample_rate, 0) if sample_rate < 1 else None
        self._classifier = MarginClassifier(centers, inputs.shard, ArcFace(), scale=64.0, group=group, loss=loss,
                                            sub_centers=options.sub_centers, draw=draw)

    def run(self) -> Tensor:
        """Free the last gradients; gather, forward, backward, update. Returns the loss."""
        self._inputs.centers.grad = self._inputs.embedding.grad = None
        self._classifier.start_step(next(self._steps))
        loss, _ = self._classifier(self._inputs.embedding, self._inputs.label)
        loss.backward()
        if self._step is not None:
            self._step()
        return loss.detach()


class GemmWalk:
    """Only the matrix products of a walk over the shard's classes, forward and backward.

    The operands have the fused implementation's dtype, the results float32; logits (N, K) or (K, N), as is faster.
    """

    def __init__(self, inputs: Inputs, options: Options, group: dist.ProcessGroup) -> None:
        """Collective. Choose the chunk and the layout that are fastest on the slowest rank."""
        dtype, device = OPERANDS[options.operands], inputs.centers.device
        self._centers = inputs.centers.detach()[:GEMM_CLASSES].to(dtype)  # a view, in float32
        self._center_gradient = torch.empty(self._centers.shape, device=device)
        self._rows = all_gather_rows(inputs.embedding, group).to(dtype)
        self._row_gradient = torch.zeros(self._rows.shape, device=device)
        # Only CUDA has products of half-precision operands with float32 results.
        self._result: dict[str, Any] = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
        full = min(inputs.shard.chunk * options.sub_centers, GEMM_CLASSES)  # the same on all ranks
        chunks = [chunk for chunk in GEMM_CHUNKS[device.type] if chunk < full] or [full]
        self._logits = torch.rand(options.batch * chunks[-1], device=device)
        self._probabilities = self._logits.to(dtype)
        self.classes = len(self._centers)
        trials = {trial: partial(measure.timed, partial(self._walk, *trial), device)
                  for trial in itertools.product(chunks, (False, True))}
        seconds = measure.alternate(trials, 2)  # the first also warms up
        self.run = partial(self._walk, *min(trials, key=lambda trial: min(seconds[trial])))

    @torch.no_grad()
    def _walk(self, chunk: int, transposed: bool) -> None:
        """Logits (N, K), transposed: (K, N)."""
        rows = self._rows
        for start in range(0, len(self._centers), chunk):
            centers, gradient = (tensor[start:start + chunk] for tensor in (self._centers, self._center_gradient))
            left, right = (centers, rows) if transposed else (rows, centers)
            logits, probabilities = (flat[:len(left) * len(right)].view(len(left), len(right))
                                     for flat in (self._logits, self._probabilities))
            torch.mm(left, right.t(), out=logits, **self._result)
            if transposed:
                probabilities = probabilities.t()
            torch.addmm(self._row_gradient, probabilities, centers, out=self._row_gradient, **self._result)
            torch.mm(probabilities.t(), rows, out=gradient, **self._result)


def check_agreement(context: DistContext, options: Options, group: dist.ProcessGroup, name: str) -> None:
    """Collective. Raise UserError if one and torchshard's differ in loss, gradients or, with --update, steps."""
    classes = min(options.classes, min(CHECKED_CLASSES, CHECKED_LOGITS // options.batch) // options.sub_centers)

    def first_step(name: str) -> list[Tensor]:
        inputs = Inputs(context, classes, options.batch, options.embedding_size, options.sub_centers)
        before = inputs.centers.detach().clone()
        optimizer = RowSGD(inputs.centers, lr=1.0, skip_nonfinite=False, **SGD)
        loss = ClassifierStep(name, inputs, options, group, optimizer).run()
        change = before - inputs.centers.detach() if options.update else inputs.centers.grad
        assert inputs.embedding.grad is not None and change is not None
        return [loss, inputs.embedding.grad, change]

    nouns = ("loss", "gradient of the embeddings", f"{'step' if options.update else 'gradient'} of the centers")
    compared = zip(nouns, TOLERANCES[options.operands], first_step(name), first_step("torchshard"))
    for noun, tolerance, own, torchshard in compared:
        squares = [tensor.square().sum(dtype=torch.float64) for tensor in (own - torchshard, torchshard)]
        difference, norm = all_reduce_sum(torch.stack(squares), group).sqrt().tolist()
        if not difference <= tolerance * norm:
            raise UserError(f"--impl {name}: its {noun} differs from torchshard's by {difference / norm:.1e}, more "
                            f"than {tolerance:.0e} ({classes} classes); nothing was measured")


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check the command line and look for devices. Raises UserError."""
    options = parse_flags(Options, "bench_classifier.py", "Step time and memory of the sharded classifier.", argv)
    if options.sample_rate and "fused" not in options.impl:
        raise UserError("--sample-rate without fused in --impl: torchshard's form does not sample; drop one of them")
    plan = options.plan()
    for name in options.impl:
        if name != "torchshard":
            find_form(name, plan.device)
    if plan.device_type == "cpu" and options.operands != "float32":
        raise UserError(f"--operands {options.operands}: is for GPUs, and this run is on the CPU; drop it")
    return replace(options, device=plan.device_type, matmul=plan.matmul)


if __name__ == "__main__":
    exit_on_user_error(main)
