"""Checkpoint -> backbone -> pair accuracy by the LFW protocol.

    python3 valid.py --batch-size 1024 -workers 16 --imgs-root data/lfw/imgs --pair-list data/lfw/pair.list \
        --resume checkpoint.pth.tar
    python3 valid.py --bin lfw.bin,cfp_fp.bin,agedb_30.bin --resume checkpoint.pth.tar --plot roc.png --montage worst.png
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from data.pairs import PairImages, PairSet, check_images, open_pair_sets
from models import build_backbone, check_arch
from utils.checkpoint.weights import open_weights
from utils.dist.context import DistContext
from utils.errors import Parser, UserError, exit_on_user_error
from utils.evaluation.embed import choose_device, embed_images, embed_images_together
from utils.evaluation.lfw import (
    TARGET_FAR,
    VerificationResult,
    evaluate_distances,
    format_result,
    squared_distance,
    usable_folds,
    worst_errors,
)
from utils.evaluation.plots import (
    MONTAGE_COLUMNS,
    MONTAGE_FORMATS,
    PLOT_FORMATS,
    MontageRows,
    RocCurve,
    check_picture,
    draw_montage,
    draw_roc,
    require_matplotlib,
)
from utils.launch.plan import ProcessPlan, is_first_process, plan_processes
from utils.launch.spawn import launch
from utils.options import file_list
from utils.options import parse_options as parse_training_options

FOLDS = 10
MONTAGE_PAIRS = 2 * MONTAGE_COLUMNS  # of each kind of error


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per flag (see `parse_options` for their meaning)."""

    imgs_root: str | None
    pair_list: str | None
    bin: tuple[str, ...]
    resume: str | None
    untrained: bool
    arch: str | None
    seed: int | None
    batch_size: int
    workers: int
    device: str
    flip: bool
    multiprocessing_distributed: bool
    nproc_per_node: int | None
    json: str | None
    plot: str | None
    montage: str | None
    print_freq: int


def main() -> None:
    options = parse_options()
    device = choose_device(options.device)
    lists = [(options.imgs_root, options.pair_list)] if options.pair_list else []
    sets = open_pair_sets(lists, list(options.bin), list_flag="--pair-list", bin_flag="--bin")
    for flag, path in (("--json", options.json), ("--plot", options.plot), ("--montage", options.montage)):
        if path is not None:
            check_writable(flag, path)
    plan = process_plan(options)
    if not (options.untrained or plan.launcher == "single"):
        open_weights(options.resume, options.arch)  # only to check it, before any process is started
    if is_first_process():
        describe_sets(sets)
        if len(sets) > 1:  # a bad image of the last one must not cost the work on all the others
            for pairs in sets.values():
                check_images(pairs, progress=True)
    if plan.launcher == "single":
        evaluate_sets(DistContext(rank=0, world_size=1, processes_per_node=1, device=device), options, sets)
    else:
        launch(evaluate_sets, plan, options, sets)


def evaluate_sets(context: DistContext, options: Options, sets: dict[str, PairSet]) -> None:
    """Runs in every process, all of them together: the numbers of all sets, and the files that were asked for."""
    if options.untrained:
        seed = options.seed or 0
        torch.manual_seed(seed)
        backbone, arch = build_backbone(options.arch), options.arch
        source = f"untrained {arch}, seed {seed}"
    else:
        weights = open_weights(options.resume, options.arch)
        backbone, arch = weights.backbone, weights.arch
        source = f"{arch} of {options.resume}"
    if context.is_main:
        processes = f"{context.world_size} processes, each " if context.world_size > 1 else ""
        print(f"=> {source}")
        print(f"=> device {processes}{describe(context.device)}, batch size {options.batch_size}, {options.workers} workers"
              + (", with mirrored images" if options.flip else ""), flush=True)

    started = time.perf_counter()
    results: dict[str, VerificationResult] = {}
    sections: list[MontageRows] = []
    for name, pairs in sets.items():
        embeddings = embed_pairs(context, backbone, pairs, options)
        if context.is_main:
            distance = squared_distance(embeddings[pairs.index1], embeddings[pairs.index2])
            results[name] = evaluate_pairs(pairs, embeddings, distance)
            if options.montage is not None:
                sections += montage_sections(name, pairs, distance, results[name].threshold)
    if not context.is_main:
        return
    print(f"=> evaluated in {time.perf_counter() - started:.1f} s")
    for name, result in results.items():
        print(f"=> {name}: {format_more(result)}")
    for name, result in results.items():
        print((f"{name}\n" if len(results) > 1 else "") + format_result(result))
    if options.json is not None:
        write_json(options.json, to_json(results))
    if options.plot is not None:
        curves = [RocCurve(name, r.fpr, r.tpr, r.accuracy, r.auc) for name, r in results.items()]
        write_picture("--plot", options.plot, draw_roc, curves)
    if options.montage is not None:
        write_picture("--montage", options.montage, draw_montage, sections)


def validate(
    backbone: nn.Module,
    pairs: PairSet,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    flip: bool,
    print_freq: int,
) -> VerificationResult:
    """Embed each image of `pairs` once, with `backbone` in evaluation mode on `device`, and apply the LFW protocol.

    flip: the embedding of an image is the sum of its own and its mirrored image's. Prints the progress (see
    embed_images), and warnings on stderr where the numbers need one. Raises UserError for an image that cannot be read.
    """
    embeddings = embed_images(
        backbone, PairImages(pairs), batch_size=batch_size, workers=workers, device=device, flip=flip,
        print_freq=print_freq,
    )
    distance = squared_distance(embeddings[pairs.index1], embeddings[pairs.index2])
    return evaluate_pairs(pairs, embeddings, distance)


def embed_pairs(context: DistContext, backbone: nn.Module, pairs: PairSet, options: Options) -> np.ndarray:
    """Collective. The embeddings of all images of `pairs`, float32 (U, d), on every rank."""
    images = PairImages(pairs)
    if context.world_size == 1:
        return embed_images(backbone, images, batch_size=options.batch_size, workers=options.workers,
                            device=context.device, flip=options.flip, print_freq=options.print_freq)
    return embed_images_together(context, backbone, images, batch_size=options.batch_size,
                                 workers=-(-options.workers // context.processes_per_node), flip=options.flip,
                                 print_freq=options.print_freq)


def evaluate_pairs(pairs: PairSet, embeddings: np.ndarray, distance: np.ndarray) -> VerificationResult:
    """The protocol's numbers, and on stderr what makes them doubtful. embeddings: (U, d); distance: (P,), NaN for none."""
    folds = usable_folds(pairs.is_same, FOLDS)
    if folds < FOLDS:
        print(f"warning: too few pairs of a label for {FOLDS} folds; using {folds}", file=sys.stderr)
    unusable = ~embeddings.any(axis=1)
    if unusable.any():
        affected = np.count_nonzero(unusable[pairs.index1] | unusable[pairs.index2])
        print(f"warning: {affected} of {len(pairs)} pairs lack a usable embedding and count as errors; "
              f"the first such image: {pairs.image_name(int(np.argmax(unusable)))}", file=sys.stderr)
    result = evaluate_distances(distance, pairs.is_same, FOLDS)
    # With few pairs the measured FAR is coarse: a few false accepts are no sign of trouble.
    different = np.count_nonzero(~pairs.is_same)
    if result.far > 10 * TARGET_FAR and result.far * different > 10:
        print(f"warning: the validation rate means little: the false accept rate is {result.far:.5f}, "
              f"not {TARGET_FAR:g} (do many distances coincide?)", file=sys.stderr)
    return result


def format_more(result: VerificationResult) -> str:
    """In a line, what the four published ones do not say."""
    rates = ", ".join(f"{far} {tar:.5f}" for far, tar in result.tar_at_far.items())
    return (f"accuracy at exact thresholds {result.exact_accuracy:.5f}+-{result.exact_accuracy_std:.5f}"
            + (f"; TAR at FAR {rates}" if rates else "; too few different pairs for a TAR at FAR 1e-1"))


def montage_sections(name: str, pairs: PairSet, distance: np.ndarray, threshold: float) -> list[MontageRows]:
    """The worst false accepts and false rejects of a set."""
    images = PairImages(pairs)
    accepts, rejects = worst_errors(distance, pairs.is_same, threshold, MONTAGE_PAIRS)
    sections = []
    for kind, meaning, label, worst in (
        ("false accepts", "different people, distance below", False, accepts),
        ("false rejects", "one person, distance at least", True, rejects),
    ):
        undecidable = np.count_nonzero((pairs.is_same == label) & np.isnan(distance))
        count = np.count_nonzero((pairs.is_same == label) & ((distance < threshold) != label) & ~np.isnan(distance))
        title = (f"{name}: {count} {kind} of {np.count_nonzero(pairs.is_same == label)} pairs ({meaning} {threshold:.2f})"
                 + ("; the worst ones" if count > len(worst) else "")
                 + (f"; {undecidable} without a distance" if undecidable else ""))
        tiles = [(images[pairs.index1[p]][0].numpy(), images[pairs.index2[p]][0].numpy(),
                  f"pair {p + 1}: distance {distance[p]:.3f}") for p in worst]
        sections.append(MontageRows(title, tiles))
    return sections


def describe_sets(sets: dict[str, PairSet]) -> None:
    for name, pairs in sets.items():
        same = np.count_nonzero(pairs.is_same)
        print(f"=> {name}: {len(pairs)} pairs of {pairs.path}, {same} of them same, {pairs.num_images} images")


def process_plan(options: Options) -> ProcessPlan:
    """One process, or those of --multiprocessing-distributed: of this node alone, which meet at a port that is free now.

    main.py's own parser says what else there is to know about processes.
    """
    flags = ["--device", options.device]
    if options.multiprocessing_distributed:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            flags += ["--multiprocessing-distributed", "--dist-url", f"tcp://127.0.0.1:{probe.getsockname()[1]}"]
    if options.nproc_per_node is not None:
        flags += ["--nproc-per-node", str(options.nproc_per_node)]
    return plan_processes(parse_training_options([".", *flags]))


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without opening a file. Raises UserError."""
    parser = Parser("valid.py", "Pair accuracy of a face recognition backbone by the LFW protocol.")
    group = parser.add_argument_group("pairs")
    group.add_argument("--imgs-root", metavar="DIR", help="the images of the pairs, aligned, 112x112")
    group.add_argument("--pair-list", metavar="FILE",
                       help="lines of: path1 path2 0|1, the paths relative to --imgs-root")
    group.add_argument("--bin", type=file_list, default=(), metavar="FILE,FILE,...",
                       help="evaluation sets in one file each, such as lfw.bin,cfp_fp.bin, instead of a list or beside it")

    group = parser.add_argument_group("model")
    group.add_argument("--resume", metavar="PATH",
                       help="checkpoint.pth.tar, or a published backbone's weights")
    group.add_argument("-a", "--arch", metavar="ARCH",
                       help="its architecture, checked (default: what the checkpoint says); needed with --untrained")
    group.add_argument("--untrained", action="store_true",
                       help="instead of --resume: random initial weights, for a baseline")
    group.add_argument("--seed", type=int, default=None, metavar="S",
                       help="of --untrained; nothing else here is random (default: 0)")

    group = parser.add_argument_group("evaluation")
    group.add_argument("-b", "--batch-size", type=int, default=256, metavar="N",
                       help="images at a time (default: %(default)s)")
    group.add_argument("-j", "--workers", "-workers", type=int, default=4, metavar="N",
                       help="image reading processes; 0: none beside the main one (default: %(default)s)")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                       help="default: the GPU if there is one")
    group.add_argument("--flip", action="store_true", help="sum the embeddings of each image and of its mirror image")

    group.add_argument("--multiprocessing-distributed", action="store_true",
                       help="one process per GPU; they share the images")
    group.add_argument("--nproc-per-node", type=int, default=None, metavar="N",
                       help="with --multiprocessing-distributed: processes, also on the CPU (default: the visible GPUs, or 1)")

    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write the result there too, with the ROC curve; "
                       'of several sets: {"sets": {name: result}}')
    group.add_argument("--plot", metavar="FILE", help="draw the ROC curves of all sets: .png, .svg or .pdf")
    group.add_argument("--montage", metavar="FILE",
                       help="draw the worst false accepts and false rejects of each set: .png or .jpg")
    group.add_argument("-p", "--print-freq", type=int, default=100, metavar="N",
                       help="batches between reports where the output is not a terminal (default: %(default)s)")
    options = Options(**vars(parser.parse_args(argv)))
    _check(options)
    return options


def _check(o: Options) -> None:
    for flag, value, other in (("--imgs-root", o.imgs_root, o.pair_list), ("--pair-list", o.pair_list, o.imgs_root)):
        if not value and (other or not o.bin):
            raise UserError(f"{flag} is missing: give the images and the pairs with --imgs-root DIR --pair-list FILE"
                            + ("" if o.bin else ", or --bin FILE"))
    if o.untrained and o.resume:
        raise UserError(f"--untrained with --resume {o.resume}: choose one of them")
    if not o.untrained and not o.resume:
        raise UserError("--resume is missing: give the checkpoint to evaluate, "
                        "or --untrained with -a ARCH for a baseline")
    if o.untrained and not o.arch:
        raise UserError("--untrained: give the architecture with -a ARCH, such as -a mobilefacenet")
    if o.arch:
        check_arch(o.arch)
    if o.seed is not None and not o.untrained:
        raise UserError(f"--seed {o.seed}: only --untrained draws random weights; add it, or drop --seed")
    files = [(flag, path) for flag, path in (("--json", o.json), ("--plot", o.plot), ("--montage", o.montage)) if path is not None]
    for number, (flag, path) in enumerate(files):
        for other_flag, other in files[:number]:
            if os.path.abspath(path) == os.path.abspath(other):
                raise UserError(f"{flag} {path}: is the file of {other_flag} too; give it another name")
    if o.resume and not os.path.exists(o.resume):
        raise UserError(f"--resume {o.resume}: no such file")
    for flag, value, minimum in (
        ("--batch-size", o.batch_size, 1),
        ("--workers", o.workers, 0),
        ("--print-freq", o.print_freq, 1),
        ("--seed", o.seed or 0, 0),
        ("--nproc-per-node", o.nproc_per_node, 1),
    ):
        if value is not None and value < minimum:
            raise UserError(f"{flag} {value}: give a number of at least {minimum}")
    if o.seed is not None and o.seed >= 2**63:
        raise UserError(f"--seed {o.seed}: give a number below 2**63")
    if o.nproc_per_node is not None and not o.multiprocessing_distributed:
        raise UserError(f"--nproc-per-node {o.nproc_per_node}: add --multiprocessing-distributed, which starts the processes")
    if o.plot is not None:
        check_picture("--plot", o.plot, PLOT_FORMATS)
        require_matplotlib("--plot")
    if o.montage is not None:
        check_picture("--montage", o.montage, MONTAGE_FORMATS)


def check_writable(flag: str, path: str) -> None:
    """Raise UserError unless the file of `flag` can be written: better before the work than after it."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.exists(path) and not os.path.isfile(path):  # a device as well: it would be replaced
        raise UserError(f"{flag} {path}: is not a file; give the name of one")
    if not os.path.isdir(directory):
        raise UserError(f"{flag} {path}: there is no directory {directory}; create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: the directory {directory} is not writable")


def to_json(results: dict[str, VerificationResult]) -> dict[str, Any]:
    """The result's attributes; of several sets {"sets": {name: the attributes}}."""
    objects = {name: result.to_json_dict() for name, result in results.items()}
    return next(iter(objects.values())) if len(objects) == 1 else {"sets": objects}


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write the JSON object: `path` holds the whole of it or what it held before."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_picture(flag: str, path: str, draw: Callable[[Any, str], None], content: Any) -> None:
    try:
        draw(content, path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror or error})") from None


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


if __name__ == "__main__":
    exit_on_user_error(main)
