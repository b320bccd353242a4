#!/usr/bin/env python3
"""Face images -> L2-normalised embeddings; two images -> their similarity.

    python3 scripts/embed.py --resume checkpoint.pth.tar IMAGE_OR_DIR [IMAGE_OR_DIR ...] --output embeddings.npy
    python3 scripts/embed.py --resume checkpoint.pth.tar IMAGE IMAGE [--calibration FILE]
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Python puts the script's own directory on sys.path instead of the repository's root.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np
import torch

from data.decode import decode_image, read_bytes  # noqa: E402
from data.folder import IMAGE_EXTENSIONS, describe_files, is_image, unused_extension  # noqa: E402
from models import check_arch  # noqa: E402
from utils.checkpoint.weights import CHANNEL_ORDERS, open_weights, weights_fingerprint  # noqa: E402
from utils.dist.context import DistContext, MatmulFlag, check_gpus, choose_device, choose_matmul, set_matmul  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.evaluation.calibration import read_calibration  # noqa: E402
from utils.evaluation.embed import embed_images  # noqa: E402
from utils.files import atomic_write, require_writable  # noqa: E402
from utils.flags import add_flags, check_values, flag, flags_of  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class EmbeddingFlags(MatmulFlag):
    """The flags of programs that embed images in one process."""

    resume: str = flag("--resume", default="", metavar="PATH",
                       help="checkpoint.pth.tar, or the weights of a published backbone")
    arch: str | None = flag("-a", "--arch", metavar="ARCH", default_text="that of the checkpoint", help="architecture")
    channel_order: str | None = flag("--channel-order", choices=CHANNEL_ORDERS, default_text="that of the file",
                                     help="order of the colors that the network in --resume was trained with")
    flip: bool = flag("--flip", default=False, help="sum the embeddings of each image and of its mirror image")
    batch_size: int = flag("-b", "--batch-size", default=256, metavar="N", at_least=1, help="images at a time")
    workers: int = flag("-j", "--workers", default=4, metavar="N", at_least=0,
                        help="image reading processes; 0 reads in the main process")
    device: str = flag("--device", default="auto", choices=("auto", "cuda", "cpu"),
                       help="auto: the GPU if there is one")

    def check_weights(self) -> None:
        """Raises UserError unless there is a file to read the network from."""
        if not self.resume:
            raise UserError("--resume is missing: give the checkpoint, or the weights of a published backbone")
        if not os.path.exists(self.resume):
            raise UserError(f"--resume {self.resume}: no such file")
        if self.arch:
            check_arch(self.arch)

    def set_up(self) -> DistContext:
        """Prepare this process to compute on --device. Raises UserError."""
        context = DistContext(0, 1, 1, choose_device(self.device))
        set_matmul(choose_matmul(self.matmul, context.device.type))
        if context.device.type == "cpu":
            keep_freed_memory()
        else:
            check_gpus([0])
        return context


@dataclass(frozen=True, kw_only=True)
class Options(EmbeddingFlags):
    """The arguments of embed.py."""

    images: tuple[str, ...]
    output: str | None = flag(
        "--output", metavar="FILE.npy",
        help="float32 (images, d) go there, and the images' paths to FILE.txt beside it; without it, give two images "
             "and their similarity is printed")
    force: bool = flag("--force", default=False, help="replace existing files of --output")
    calibration: str | None = flag(
        "--calibration", metavar="FILE",
        help="what valid.py --calibration fitted with these weights: print the probability that two images show one "
             "person, and whether they are accepted at each false accept rate")
    print_freq: int = flag("-p", "--print-freq", default=100, metavar="N", at_least=1,
                           help="batches between reports if the output is not a terminal")


class ImageFiles:
    """Item i is the image in the file paths[i], which the loading processes decode."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return decode_image(*self.encoded(i)), 0

    def encoded(self, i: int) -> tuple[bytes, str]:
        return read_bytes(self.paths[i]), self.paths[i]


def main() -> None:
    options = parse_options()
    context = options.set_up()
    paths = find_images(options.images)
    output = options.output
    if output is None and not (len(options.images) == len(paths) == 2 and all(map(os.path.isfile, options.images))):
        raise UserError("--output is missing: give the .npy file to write, or two image files to compare")

    calibration = read_calibration(options.calibration, "--calibration") if options.calibration else None
    weights = open_weights(options.resume, options.arch, channel_order=options.channel_order)
    if calibration is not None and calibration.weights != weights_fingerprint(weights.backbone):
        raise UserError(f"--calibration {options.calibration}: was fitted with other weights than those of "
                        f"{options.resume}; fit it again with valid.py --calibration")
    if calibration is not None and calibration.flip != options.flip:
        raise UserError(f"--calibration {options.calibration}: was fitted {'with' if calibration.flip else 'without'} "
                        f"--flip; {'add' if calibration.flip else 'drop'} the flag")
    if weights.channel_order != "rgb":
        print(weights.describe(options.resume), flush=True)
    embeddings = embed_images(
        weights.backbone, ImageFiles(paths), context, batch_size=options.batch_size, workers=options.workers,
        flip=options.flip, progress=output is not None, print_freq=options.print_freq, mean_face=weights.mean_face,
    )
    if output is None:
        for embedding, path in zip(embeddings, paths):
            if not embedding.any():
                raise UserError(f"{path}: its embedding is zero, NaN or infinite, so there is no similarity")
        first, second = embeddings.astype(np.float64)
        cosine = float(first @ second)
        print(f"cosine similarity: {cosine:.6f}")
        print(f"L2 distance squared: {np.sum((first - second) ** 2):.6f}")  # 2 - 2 cos
        if calibration is not None:
            print(f"probability of one person: {calibration.probability(cosine):.6f} (calibrated on {calibration.set}, "
                  "if one person was as likely as two)")
            for far, threshold, interval in calibration.thresholds:
                within = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
                print(f"FAR {far:g}: {'accepted' if cosine > threshold else 'rejected'} (threshold "
                      f"{threshold:.4f}{within})")
        return
    try:
        with atomic_write(output) as file, atomic_write(list_path(output)) as list_file:
            np.save(file, embeddings)
            list_file.writelines(os.fsencode(path) + b"\n" for path in paths)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"{len(paths)} embeddings of {embeddings.shape[1]} numbers: {output}, their images: {list_path(output)}")


def find_images(arguments: Sequence[str]) -> list[str]:
    """The files among `arguments`, and the images below its directories (sorted), in the order of `arguments`.

    Ignores hidden entries and, in directories, files without an image extension, with a warning if they may be images.
    Raises UserError for an argument that does not exist and for a directory without images.
    """
    paths: list[str] = []
    for argument in arguments:
        if not os.path.exists(argument):
            raise UserError(f"{argument}: no such file or directory")
        below, unused = [], Counter[str]()
        seen: set[str] = set()  # links may lead back
        for parent, directories, files in os.walk(argument, followlinks=True):
            if (real := os.path.realpath(parent)) in seen:
                directories.clear()
                continue
            seen.add(real)
            directories[:] = [name for name in directories if not name.startswith(".")]
            below += [os.path.join(parent, name) for name in files if is_image(name)]
            unused.update(extension for extension in map(unused_extension, files) if extension is not None)
        others = f"files of other kinds: {describe_files(unused)}" if unused else ""
        if os.path.isdir(argument) and not below:
            raise UserError(f"{argument}: no images below it; expected {', '.join(IMAGE_EXTENSIONS)}"
                            + (f"; {others}" if others else ""))
        if others:
            print(f"warning: {argument}: not used: {others}", file=sys.stderr)
        paths += sorted(below) or [argument]
    return paths


def list_path(output: str) -> str:
    """The file of paths beside `output`."""
    return os.path.splitext(output)[0] + ".txt"


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check the arguments without reading a file. Raises UserError."""
    parser = Parser("embed.py", "Face images -> L2-normalised embeddings; two images -> their similarity.")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR",
                        help="aligned 112x112 images, or directories, which are searched at any depth")
    add_flags(parser, flags_of(Options))
    options = Options(**vars(parser.parse_args(argv)))
    check_values(options)
    options.check_weights()
    if options.output is not None:
        if options.calibration is not None:
            raise UserError(f"--calibration {options.calibration}: is for the similarity of two images; drop it, or "
                            "--output")
        if not options.output.endswith(".npy"):
            raise UserError(f"--output {options.output}: the name must end in .npy; the paths go beside it as .txt")
        for path in (options.output, list_path(options.output)):
            require_writable("--output", path, force=options.force, inputs=[options.resume, *options.images])
    return options


if __name__ == "__main__":
    exit_on_user_error(main)
