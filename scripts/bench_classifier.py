#!/usr/bin/env python3
"""Step time and memory of the sharded classifier's implementations, beside the machine's GEMM floor.

    python3 scripts/bench_classifier.py --classes 85744 --batch 128 --world-size 2

A step is the classifier's part of a training step, on random embeddings: gather the rows of all ranks, forward,
backward, reduce-scatter the rows' gradient and, with --update, step the class centers. The implementations take turns
on the same inputs in the same processes. All ranks start a turn together, and its time is that of the slowest. On the
CPU all of them run with `utils.memory.keep_freed_memory`, as training does.

GEMM floor: the 6 * N * C_r * d floating-point operations of the three matrix products, at this machine's rate for the
shapes of a walk in chunks, (K, d)(d, N), (N, K)(K, d) and (K, N)(N, d), measured in turns with the implementations.
Extra memory: the peak of a step beyond what a process holds between steps (centers, momentum), without the gradient of
the centers.

Shapes: N rows (the global batch), n = N / W of each rank, C classes, C_r on this rank, d the embedding size.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from losses.fused import margin_softmax  # noqa: E402
from losses.margins import ArcFace  # noqa: E402
from losses.softmax import margin_softmax_torchshard  # noqa: E402
from models.classifier import MarginClassifier, automatic_memory_mib  # noqa: E402
from scripts.measure import (  # noqa: E402
    MIB,
    PeakMemory,
    aligned,
    append_csv,
    available_bytes,
    check_csv,
    choose_device_type,
    choose_implementations,
    describe_machine,
    fits_in_memory,
    launch_local,
    of_slowest_rank,
    percentiles,
    release_memory,
    timed,
)
from utils.dist.collectives import all_gather_rows, all_reduce_sum  # noqa: E402
from utils.dist.context import DistContext  # noqa: E402
from utils.dist.sharding import ClassShard, init_model_parallel  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402
from utils.options import EMBEDDING_SIZE  # noqa: E402
from utils.training.optim import RowSGD  # noqa: E402

IMPLEMENTATIONS = ("fused", "torchshard")
OPERANDS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SCALE = 64.0
SGD_SETTINGS = dict(momentum=0.9, weight_decay=5e-4)

# Agreement is checked with at most this many classes: the gradients of millions would not fit in memory twice.
CHECKED_CLASSES = 100_000
# Allowed relative differences, by norm: loss, gradient of the embeddings, gradient of the centers.
TOLERANCES = {"float32": (1e-5, 1e-4, 1e-4), "bf16": (1e-3, 2e-2, 2e-2), "fp16": (1e-3, 2e-2, 2e-2)}

PLAIN_TENSORS = 10  # float32 tensors (N, C_r) at torchshard's peak, about

# The GEMM measurement walks over this many classes: 256 MiB of centers, and as much of their gradient, leave the caches
# as cold as the walk over a large shard does.
GEMM_CLASSES = 131_072
GEMM_CHUNKS = {"cpu": (1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384, 32768)}

CSV_COLUMNS = (
    "date", "device", "torch", "threads", "world_size", "classes", "batch", "embedding_size", "operands", "update",
    "classifier_memory_mib", "steps", "impl", "p20_s", "p50_s", "p80_s", "extra_mib", "gemm_floor_s", "over_floor",
    "speedup_to_torchshard",
)


@dataclass(frozen=True)
class Options:
    """The command line."""

    classes: int = flag("--classes", metavar="C", at_least=2, help="classes of all processes; required")
    batch: int = flag("--batch", metavar="N", at_least=1, help="rows of all processes; required")
    world_size: int = flag("--world-size", default=1, metavar="W", at_least=1, help="processes")
    impl: tuple[str, ...] = flag("--impl", default=IMPLEMENTATIONS, default_text=",".join(IMPLEMENTATIONS),
                                 metavar="A,B", help="implementations that take turns")
    steps: int = flag("--steps", default=20, metavar="K", at_least=1, help="timed steps of each")
    update: bool = flag("--update", default=False, help="with the optimizer step of the centers: SGD with momentum")
    classifier_memory_mib: float | None = flag(
        "--classifier-memory-mib", metavar="M", at_least=0, default_text="automatic",
        help="fused: memory of a process for probabilities that are saved for the backward pass; 0: recompute them")
    device: str = flag("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs if there are any")
    operands: str = flag("--operands", choices=OPERANDS, default="float32",
                         help="fused, on GPUs: dtype of the matrix products' operands")
    json: bool = flag("--json", default=False, help="print one JSON object and nothing else")
    csv: str | None = flag("--csv", metavar="FILE", help="append a row per implementation to this file")


def main() -> None:
    options = parse_options()
    if options.csv is not None:
        check_csv(options.csv, CSV_COLUMNS)
    launch_local(measure, options.world_size, options.device, options)


def measure(context: DistContext, options: Options) -> None:
    """Collective: runs in every process. Rank 0 reports."""
    if context.device.type == "cpu":
        keep_freed_memory()
    group = init_model_parallel(context.world_size)
    checked = check_agreement(context, options, group)
    inputs = draw_inputs(context, options.classes, options.batch)
    gemm = GemmWalk(context, inputs, options, group)
    steps: dict[str, ClassifierStep] = {}
    extra_bytes: dict[str, int | None] = {}
    for name in options.impl:
        if will_not_fit(name, context, inputs, options):
            continue
        step = ClassifierStep(name, inputs, options, group)
        if fits_in_memory(step.run, context.device):
            memory = PeakMemory(context.device)
            if fits_in_memory(step.run, context.device):
                extra_bytes[name] = most_of_all_ranks(memory.bytes(), step.gradient_bytes, context)
                steps[name] = step
        del step
        release_memory(context.device)

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gemm_seconds: list[float] = []
    for _ in range(options.steps):
        for name in list(steps):
            step, times = steps[name], seconds[name]
            if not fits_in_memory(lambda: times.append(timed(step.run, context.device)), context.device):  # noqa: B023
                del steps[name]  # the others' momentum left it too little
        gemm_seconds.append(timed(gemm.run, context.device))
    gemm_floor = percentiles(of_slowest_rank(gemm_seconds, context.device))[1] * gemm.share_of_floor
    figures = {name: dict(zip(("p20_s", "p50_s", "p80_s"), percentiles(of_slowest_rank(seconds[name], context.device))))
               for name in steps}
    if context.is_main:
        missing = {**dict.fromkeys(("p20_s", "p50_s", "p80_s", "extra_mib")), "error": "out of memory"}
        impl = {name: missing for name in options.impl}
        for name, times in figures.items():
            extra = extra_bytes[name]
            impl[name] = {**times, "extra_mib": None if extra is None else extra / MIB}
        report(context, options, checked, gemm, gemm_floor, impl)


# ---------------------------------------------------------------------------------------------------------------------
# The work


@dataclass(frozen=True)
class Inputs:
    """This rank's part: embedding (n, d) L2-normalised, label (n,) int64 in [0, C), centers (C_r, d)."""

    shard: ClassShard
    embedding: Tensor
    label: Tensor
    centers: nn.Parameter


def draw_inputs(context: DistContext, num_classes: int, batch: int) -> Inputs:
    """Every call draws the same."""
    shard = ClassShard(num_classes, context.rank, context.world_size)
    generator = torch.Generator(context.device).manual_seed(context.rank)
    rows, random = batch // context.world_size, dict(device=context.device, generator=generator)
    embedding = F.normalize(torch.randn(rows, EMBEDDING_SIZE, **random)).requires_grad_()
    label = torch.randint(num_classes, (rows,), **random)
    # In place, since twice a shard of millions may not fit. The rows have a norm of about 1.
    centers = torch.randn(shard.size, EMBEDDING_SIZE, **random).mul_(EMBEDDING_SIZE**-0.5)
    return Inputs(shard, embedding, label, nn.Parameter(centers))


class ClassifierStep:
    """Collective. A training step of the sharded classifier by one of the implementations.

    lr is 0 by default, so that all steps compute with the same centers; the arithmetic is that of any rate.
    """

    def __init__(self, name: str, inputs: Inputs, options: Options, group: dist.ProcessGroup, lr: float = 0.0) -> None:
        centers = inputs.centers
        optimizer = RowSGD(centers, lr=lr, skip_nonfinite=False, **SGD_SETTINGS) if options.update else None
        loss, self._step = margin_softmax_torchshard, None if optimizer is None else optimizer.step
        if name == "fused":
            saved_probs_mib = options.classifier_memory_mib
            if saved_probs_mib is None:
                saved_probs_mib = automatic_memory_mib(centers, options.world_size, options.update)
            update = None if optimizer is None else optimizer.update_rows
            loss, self._step = partial(margin_softmax, saved_probs_mib=saved_probs_mib, update=update,
                                       matmul_dtype=OPERANDS[options.operands]), None
        self._inputs = inputs
        self._classifier = MarginClassifier(centers, inputs.shard, ArcFace(), scale=SCALE, group=group, loss=loss)
        self.gradient_bytes = 0  # of the centers, after the last `run`

    def compute(self) -> Tensor:
        """Gather, forward, backward, update. Returns the loss and leaves the gradients in place."""
        loss, _ = self._classifier(self._inputs.embedding, self._inputs.label)
        loss.backward()
        if self._step is not None:
            self._step()
        return loss.detach()

    def run(self) -> None:
        """`compute`, then free the gradients."""
        try:
            self.compute()
            gradient = self._inputs.centers.grad
            self.gradient_bytes = 0 if gradient is None else gradient.nbytes
        finally:
            self._inputs.centers.grad = self._inputs.embedding.grad = None


class GemmWalk:
    """Only the matrix products of a walk over the shard's classes, forward and backward.

    The operands have the fused implementation's dtype, the results float32; logits (N, K) or (K, N), as is faster.
    """

    def __init__(self, context: DistContext, inputs: Inputs, options: Options, group: dist.ProcessGroup) -> None:
        """Collective. Choose the chunk and the layout that are fastest on the slowest rank."""
        dtype, device = OPERANDS[options.operands], context.device
        self._centers = inputs.centers.detach()[:GEMM_CLASSES].to(dtype)  # a view, in float32
        self._center_gradient = torch.empty(self._centers.shape, device=device)
        self._rows = all_gather_rows(inputs.embedding, group).to(dtype)
        self._row_gradient = torch.zeros(self._rows.shape, device=device)
        # Only CUDA has products of half-precision operands with float32 results.
        self._result = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
        full = min(inputs.shard.chunk, GEMM_CLASSES)  # the same on all ranks
        chunks = [chunk for chunk in GEMM_CHUNKS[device.type] if chunk < full] or [full]
        self._logits = torch.rand(options.batch * chunks[-1], device=device)
        self._probabilities = self._logits.to(dtype)
        self.operations = 6 * options.batch * len(self._centers) * EMBEDDING_SIZE
        self.share_of_floor = inputs.shard.size / len(self._centers)  # the walk covers GEMM_CLASSES at most
        trials = 2 * list(itertools.product(chunks, (False, True)))  # the first round also warms up
        seconds = of_slowest_rank([timed(partial(self._walk, *trial), device) for trial in trials], device)
        self.chunk, self.transposed = min(zip(seconds, trials))[1]

    def run(self) -> None:
        self._walk(self.chunk, self.transposed)

    @torch.no_grad()
    def _walk(self, chunk: int, transposed: bool) -> None:
        """Logits (N, K), transposed: (K, N)."""
        rows = self._rows
        for start in range(0, len(self._centers), chunk):
            centers, gradient = (tensor[start:start + chunk] for tensor in (self._centers, self._center_gradient))
            shape = (len(centers), len(rows)) if transposed else (len(rows), len(centers))
            logits, probabilities = (
                flat[:shape[0] * shape[1]].view(shape) for flat in (self._logits, self._probabilities)
            )
            left, right = (centers, rows) if transposed else (rows, centers)
            torch.mm(left, right.t(), out=logits, **self._result)
            if transposed:
                probabilities = probabilities.t()
            torch.addmm(self._row_gradient, probabilities, centers, out=self._row_gradient, **self._result)
            torch.mm(probabilities.t(), rows, out=gradient, **self._result)


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the measurement


def check_agreement(context: DistContext, options: Options, group: dist.ProcessGroup) -> int:
    """Collective. Compare loss and gradients (with --update: the step of the centers) with torchshard's.

    Returns the number of classes compared; 0 if there is nothing to compare. Raises UserError if they differ.
    """
    room = available_bytes(context.device, context.world_size) // (2 * PLAIN_TENSORS * 4 * options.batch)
    room = -int(of_slowest_rank([-room * context.world_size], context.device)[0])  # the rank that has the least
    classes = max(min(options.classes, CHECKED_CLASSES, room), 2)
    names = [name for name in options.impl if name != "torchshard"]
    if not names:
        return 0
    true = outcome("torchshard", context, classes, options, group)
    what = ("loss", "gradient of the embeddings", f"{'step' if options.update else 'gradient'} of the centers")
    for name in names:
        mine = outcome(name, context, classes, options, group)
        for noun, tolerance, got, wanted in zip(what, TOLERANCES[options.operands], mine, true):
            difference = relative_difference(got, wanted, group)
            if not difference <= tolerance:
                raise UserError(f"--impl {name}: its {noun} differs from torchshard's by {difference:.1e}, more than "
                                f"{tolerance:.0e} ({classes} classes); nothing was measured")
    return classes


def relative_difference(got: Tensor, wanted: Tensor, group: dist.ProcessGroup) -> float:
    """Collective. |got - wanted| / |wanted| over the tensors of all ranks."""
    squares = [tensor.square().sum(dtype=torch.float64) for tensor in (got - wanted, wanted)]
    difference, norm = all_reduce_sum(torch.stack(squares), group).sqrt().tolist()
    return difference / norm if norm else difference


def outcome(name: str, context: DistContext, classes: int, options: Options, group: dist.ProcessGroup) -> list[Tensor]:
    """Collective. Of a first step: loss, gradient of the embeddings, gradient (with --update: step) of the centers."""
    inputs = draw_inputs(context, classes, options.batch)
    before = inputs.centers.detach().clone()
    loss = ClassifierStep(name, inputs, options, group, lr=1.0).compute()
    step = before - inputs.centers.detach() if options.update else inputs.centers.grad
    return [loss, inputs.embedding.grad, step]


def will_not_fit(name: str, context: DistContext, inputs: Inputs, options: Options) -> bool:
    """Collective. Whether torchshard's form would not fit on the CPU, where the system kills without an error."""
    if context.device.type == "cuda" or name != "torchshard":
        return False
    needed = PLAIN_TENSORS * 4 * options.batch * inputs.shard.size + inputs.centers.nbytes * (1 + options.update)
    missing = needed - available_bytes(context.device, context.world_size)
    return of_slowest_rank([missing], context.device)[0] > 0


def most_of_all_ranks(peak: int | None, gradient_bytes: int, context: DistContext) -> int | None:
    """Collective. The largest peak beyond the gradient; None if no rank can measure it."""
    most = of_slowest_rank([-1 if peak is None else max(peak - gradient_bytes, 0)], context.device)[0]
    if most < 0:
        if context.is_main:
            print("warning: /proc/self/clear_refs cannot be written, so the peak of a step is unknown",
                  file=sys.stderr)
        return None
    return int(most)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(
    context: DistContext, options: Options, checked: int, gemm: GemmWalk, gemm_floor: float, impl: dict[str, dict]
) -> None:
    """Print the object or the table, and append to the file. Only rank 0 calls it."""
    shard = ClassShard(options.classes, 0, options.world_size)
    result = {
        **describe_machine(context.device),
        "classes": options.classes, "batch": options.batch, "world_size": options.world_size,
        "embedding_size": EMBEDDING_SIZE, "operands": options.operands, "update": options.update,
        "classifier_memory_mib": options.classifier_memory_mib, "steps": options.steps, "checked_classes": checked,
        "gemm_floor_s": gemm_floor, "gemm_chunk": gemm.chunk, "gemm_transposed": gemm.transposed,
        "gemm_gflops": gemm.operations * gemm.share_of_floor / gemm_floor / 1e9,
        "weight_mib": shard.size * EMBEDDING_SIZE * 4 / MIB,
        "impl": impl,
    }
    print(json.dumps(result) if options.json else as_text(result), flush=True)
    if options.csv is not None:
        append_csv(options.csv, CSV_COLUMNS, csv_rows(result))


def csv_rows(result: dict) -> list[dict[str, object]]:
    """One row per implementation."""
    common = {name: result[name] for name in CSV_COLUMNS if name in result}
    plain = result["impl"].get("torchshard", {}).get("p50_s")
    rows = []
    for name, figures in result["impl"].items():
        p50 = figures["p50_s"]
        rows.append({
            **common, "impl": name, **{key: value for key, value in figures.items() if key in CSV_COLUMNS},
            "over_floor": p50 and p50 / result["gemm_floor_s"],
            "speedup_to_torchshard": p50 and plain and plain / p50,
        })
    return rows


def as_text(result: dict) -> str:
    """The table, and the ratios in a sentence."""
    rows = [("", "p20", "p50", "p80", "extra memory", "of the floor")]
    for name, figures in result["impl"].items():
        if figures["p50_s"] is None:
            rows.append((name, *("-" * 3), figures["error"], "-"))
            continue
        extra = figures["extra_mib"]
        rows.append((name, *(f"{figures[key]:.4f} s" for key in ("p20_s", "p50_s", "p80_s")),
                     "unknown" if extra is None else f"{extra:,.1f} MiB",
                     f"x {figures['p50_s'] / result['gemm_floor_s']:.2f}"))
    lines = [
        f"{result['classes']:,} classes x {result['embedding_size']}, batch {result['batch']}, "
        f"{result['world_size']} processes with {result['threads']} threads, {result['operands']} operands"
        + (", with the optimizer step" if result["update"] else ""),
        f"{result['device']}, torch {result['torch']}",
        f"GEMM floor {result['gemm_floor_s']:.4f} s: {result['gemm_gflops']:,.0f} GFLOP/s a process, chunks of "
        f"{result['gemm_chunk']} classes; centers {result['weight_mib']:,.1f} MiB a process",
    ]
    if 0 < result["checked_classes"] < result["classes"]:
        lines.append(f"the results agree for {result['checked_classes']:,} classes; more would not fit in memory twice")
    lines += ["", aligned(rows)]
    fused, plain = (result["impl"].get(name, {}) for name in IMPLEMENTATIONS)
    if fused.get("p50_s") and plain.get("p50_s"):
        words = f"fused is {plain['p50_s'] / fused['p50_s']:.2f} times as fast as torchshard"
        if fused["extra_mib"] and plain["extra_mib"]:
            words += f", and uses {fused['extra_mib'] / plain['extra_mib']:.1%} of its extra memory"
        lines += ["", words]
    return "\n".join(lines)


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check the command line and look for devices. Raises UserError."""
    options = parse_flags(Options, "bench_classifier.py", "Step time and memory of the sharded classifier.", argv)
    world_size = options.world_size
    for name, value in (("--classes", options.classes), ("--batch", options.batch)):
        if value is None:
            raise UserError(f"{name} is missing; give a number")
    if options.batch % world_size:
        raise UserError(f"--batch {options.batch}: must divide by --world-size {world_size}")
    if not ClassShard(options.classes, world_size - 1, world_size).size:
        raise UserError(f"--classes {options.classes}: leaves some of --world-size {world_size} processes without any")
    device = choose_device_type(options.device, world_size)
    if device == "cpu" and options.operands != "float32":
        raise UserError(f"--operands {options.operands}: is for GPUs, and this run is on the CPU; drop it")
    choose_implementations(",".join(options.impl), IMPLEMENTATIONS)
    return replace(options, device=device)


if __name__ == "__main__":
    exit_on_user_error(main)
