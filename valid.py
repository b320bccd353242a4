"""Checkpoint -> backbone -> pair accuracy by the LFW protocol.

    python3 valid.py --batch-size 1024 -workers 16 --imgs-root data/lfw/imgs --pair-list data/lfw/pair.list \
        --resume checkpoint.pth.tar
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.pairs import PairImages, PairList
from models import build_backbone, check_arch, load_backbone
from models.embedding import choose_device, embed_images
from utils.errors import Parser, UserError, exit_on_user_error
from utils.verification import TARGET_FAR, VerificationResult, evaluate, format_result, usable_folds

FOLDS = 10


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per flag (see `parse_options` for their meaning)."""

    imgs_root: str | None
    pair_list: str | None
    resume: str | None
    untrained: bool
    arch: str | None
    seed: int
    batch_size: int
    workers: int
    device: str
    flip: bool
    json: str | None
    print_freq: int


def main() -> None:
    options = parse_options()
    device = choose_device(options.device)
    pairs = PairList(options.imgs_root, options.pair_list)
    if options.json is not None:
        check_writable(options.json)
    if options.untrained:
        torch.manual_seed(options.seed)
        backbone, arch = build_backbone(options.arch), options.arch
        print(f"=> untrained {arch}, seed {options.seed}")
    else:
        backbone, arch = load_backbone(options.resume, options.arch)
        print(f"=> {arch} of {options.resume}")
    same = np.count_nonzero(pairs.is_same)
    print(f"=> {len(pairs)} pairs of {options.pair_list}, {same} of them same, {len(pairs.paths)} images")
    print(f"=> device {describe(device)}, batch size {options.batch_size}, {options.workers} workers"
          + (", with mirrored images" if options.flip else ""), flush=True)

    started = time.perf_counter()
    result = validate(
        backbone, pairs, batch_size=options.batch_size, workers=options.workers, device=device, flip=options.flip,
        print_freq=options.print_freq,
    )
    print(f"=> evaluated in {time.perf_counter() - started:.1f} s")
    print(format_result(result))
    if options.json is not None:
        write_json(options.json, result)


def validate(
    backbone: nn.Module,
    pairs: PairList,
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
    folds = usable_folds(pairs.is_same, FOLDS)
    if folds < FOLDS:
        print(f"warning: too few pairs of a label for {FOLDS} folds; using {folds}", file=sys.stderr)
    embeddings = embed_images(
        backbone, PairImages(pairs), batch_size=batch_size, workers=workers, device=device, flip=flip,
        print_freq=print_freq,
    )
    unusable = ~embeddings.any(axis=1)
    if unusable.any():
        affected = np.count_nonzero(unusable[pairs.index1] | unusable[pairs.index2])
        print(f"warning: {affected} of {len(pairs)} pairs lack a usable embedding and count as errors; "
              f"the first such image: {pairs.paths[np.argmax(unusable)]}", file=sys.stderr)
    result = evaluate(embeddings[pairs.index1], embeddings[pairs.index2], pairs.is_same, FOLDS)
    # With few pairs the measured FAR is coarse: a few false accepts are no sign of trouble.
    different = np.count_nonzero(~pairs.is_same)
    if result.far > 10 * TARGET_FAR and result.far * different > 10:
        print(f"warning: the validation rate means little: the false accept rate is {result.far:.5f}, "
              f"not {TARGET_FAR:g} (do many distances coincide?)", file=sys.stderr)
    return result


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without opening a file. Raises UserError."""
    parser = Parser("valid.py", "Pair accuracy of a face recognition backbone by the LFW protocol.")
    group = parser.add_argument_group("pairs")
    group.add_argument("--imgs-root", metavar="DIR", help="the images of the pairs, aligned, 112x112")
    group.add_argument("--pair-list", metavar="FILE",
                       help="lines of: path1 path2 0|1, the paths relative to --imgs-root")

    group = parser.add_argument_group("model")
    group.add_argument("--resume", metavar="PATH",
                       help="checkpoint.pth.tar, or a published backbone's weights")
    group.add_argument("-a", "--arch", metavar="ARCH",
                       help="its architecture, checked (default: what the checkpoint says); needed with --untrained")
    group.add_argument("--untrained", action="store_true",
                       help="instead of --resume: random initial weights, for a baseline")
    group.add_argument("--seed", type=int, default=0, metavar="S",
                       help="of --untrained; nothing else here is random (default: %(default)s)")

    group = parser.add_argument_group("evaluation")
    group.add_argument("-b", "--batch-size", type=int, default=256, metavar="N",
                       help="images at a time (default: %(default)s)")
    group.add_argument("-j", "--workers", "-workers", type=int, default=4, metavar="N",
                       help="image reading processes; 0: none beside the main one (default: %(default)s)")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                       help="default: the GPU if there is one")
    group.add_argument("--flip", action="store_true", help="sum the embeddings of each image and of its mirror image")

    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="write the result there too, with the ROC curve")
    group.add_argument("-p", "--print-freq", type=int, default=100, metavar="N",
                       help="batches between reports where the output is not a terminal (default: %(default)s)")
    options = Options(**vars(parser.parse_args(argv)))
    _check(options)
    return options


def _check(o: Options) -> None:
    for flag, value in (("--imgs-root", o.imgs_root), ("--pair-list", o.pair_list)):
        if not value:
            raise UserError(f"{flag} is missing: give the images and the pairs with --imgs-root DIR --pair-list FILE")
    if o.untrained and o.resume:
        raise UserError(f"--untrained with --resume {o.resume}: choose one of them")
    if not o.untrained and not o.resume:
        raise UserError("--resume is missing: give the checkpoint to evaluate, "
                        "or --untrained with -a ARCH for a baseline")
    if o.untrained and not o.arch:
        raise UserError("--untrained: give the architecture with -a ARCH, such as -a mobilefacenet")
    if o.arch:
        check_arch(o.arch)
    if o.resume and not os.path.exists(o.resume):
        raise UserError(f"--resume {o.resume}: no such file")
    for flag, value, minimum in (
        ("--batch-size", o.batch_size, 1),
        ("--workers", o.workers, 0),
        ("--print-freq", o.print_freq, 1),
        ("--seed", o.seed, 0),
    ):
        if value < minimum:
            raise UserError(f"{flag} {value}: give a number of at least {minimum}")
    if o.seed >= 2**63:
        raise UserError(f"--seed {o.seed}: give a number below 2**63")


def check_writable(path: str) -> None:
    """Raise UserError unless the file of --json can be written: better before the work than after it."""
    directory = os.path.dirname(os.path.abspath(path))
    if os.path.exists(path) and not os.path.isfile(path):  # a device as well: it would be replaced
        raise UserError(f"--json {path}: is not a file; give the name of one")
    if not os.path.isdir(directory):
        raise UserError(f"--json {path}: there is no directory {directory}; create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--json {path}: the directory {directory} is not writable")


def write_json(path: str, result: VerificationResult) -> None:
    """Write the result's attributes as one JSON object: `path` holds the whole of it or what it held before."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(result.to_json_dict(), file, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


if __name__ == "__main__":
    exit_on_user_error(main)
