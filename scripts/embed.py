"""Face images -> L2-normalised embeddings; two images -> their similarity.

    python3 scripts/embed.py --resume checkpoint.pth.tar IMAGE_OR_DIR [IMAGE_OR_DIR ...] --output embeddings.npy
    python3 scripts/embed.py --resume checkpoint.pth.tar IMAGE IMAGE
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.decode import read_image  # noqa: E402
from data.folder import IMAGE_EXTENSIONS  # noqa: E402
from models import check_arch  # noqa: E402
from utils.checkpoint.weights import open_weights  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.evaluation.embed import choose_device, embed_images  # noqa: E402


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per argument (see `parse_options` for their meaning)."""

    images: tuple[str, ...]
    resume: str
    arch: str | None
    output: str | None
    batch_size: int
    workers: int
    device: str
    flip: bool
    print_freq: int


class ImageFiles(Dataset):
    """Item i is (uint8 (3, 112, 112) of paths[i], 0)."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return read_image(self.paths[i]), 0


def main() -> None:
    options = parse_options()
    device = choose_device(options.device)
    paths = find_images(options.images)
    two_images = len(options.images) == len(paths) == 2 and all(map(os.path.isfile, options.images))
    if options.output is not None:
        list_path = check_output(options.output)
    elif not two_images:
        raise UserError("--output is missing: give the .npy file to write (without it: two image files, to compare)")

    backbone = open_weights(options.resume, options.arch).backbone
    embeddings = embed_images(
        backbone, ImageFiles(paths), batch_size=options.batch_size, workers=options.workers, device=device,
        flip=options.flip, progress=options.output is not None, print_freq=options.print_freq,
    )
    if options.output is None:
        print(compare(embeddings, paths))
        return
    write(embeddings, paths, options.output, list_path)
    print(f"{len(paths)} embeddings of {embeddings.shape[1]} numbers: {options.output}, their images: {list_path}")


def find_images(arguments: tuple[str, ...]) -> list[str]:
    """The files among `arguments` as they are, and the images below its directories, sorted; in the order given.

    Hidden entries, and in directories files without an image extension, are ignored. Raises UserError for an argument
    that does not exist and for a directory without images.
    """
    paths: list[str] = []
    for argument in arguments:
        if os.path.isdir(argument):
            below = sorted(_images_below(argument))
            if not below:
                raise UserError(f"{argument}: no images below it; expected {', '.join(IMAGE_EXTENSIONS)}")
            paths += below
        elif os.path.isfile(argument):
            paths.append(argument)
        else:
            raise UserError(f"{argument}: no such file or directory")
    return paths


def _images_below(directory: str) -> list[str]:
    images = []
    for parent, directories, files in os.walk(directory, followlinks=True):
        directories[:] = [name for name in directories if not name.startswith(".")]
        images += [
            os.path.join(parent, name) for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
        ]
    return images


def compare(embeddings: np.ndarray, paths: list[str]) -> str:
    """Two lines for float32 (2, d): cos = e1·e2 and |e1 - e2|^2 = 2 - 2 cos."""
    for embedding, path in zip(embeddings, paths):
        if not embedding.any():
            raise UserError(f"{path}: its embedding is zero, NaN or infinite: there is no similarity")
    first, second = embeddings.astype(np.float64)
    return (f"cosine similarity: {first @ second:.6f}\n"
            f"L2 distance squared: {np.sum((first - second) ** 2):.6f}")


def check_output(output: str) -> str:
    """The path of the text file beside `output`. Raises UserError unless both can be written."""
    base, extension = os.path.splitext(output)
    if extension != ".npy":
        raise UserError(f"--output {output}: give a name that ends in .npy; the paths go beside it as .txt")
    directory = os.path.dirname(os.path.abspath(output))
    if not os.path.isdir(directory):
        raise UserError(f"--output {output}: there is no directory {directory}; create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: the directory {directory} is not writable")
    for path in (output, f"{base}.txt"):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"--output {output}: {path} is not a file")
    return f"{base}.txt"


def write(embeddings: np.ndarray, paths: list[str], output: str, list_path: str) -> None:
    """float32 (N, d) to `output`, and the N paths, one a line in the same order, to `list_path`."""
    try:
        np.save(output, embeddings)
        with open(list_path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{path}\n" for path in paths)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without opening a file. Raises UserError."""
    parser = Parser("embed.py", "Face images -> L2-normalised embeddings; two images -> their similarity.")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR",
                        help="aligned 112x112 images, or directories of them (searched at any depth)")
    parser.add_argument("--resume", metavar="PATH", help="checkpoint.pth.tar, or a published backbone's weights")
    parser.add_argument("-a", "--arch", metavar="ARCH",
                        help="its architecture, checked (default: what the checkpoint says)")
    parser.add_argument("--output", metavar="FILE.npy",
                        help="float32 (images, d) there, and the images' paths beside it as FILE.txt; "
                             "may be left out for two images, whose similarity is then printed")
    parser.add_argument("-b", "--batch-size", type=int, default=256, metavar="N",
                        help="images at a time (default: %(default)s)")
    parser.add_argument("-j", "--workers", type=int, default=4, metavar="N",
                        help="image reading processes; 0: none beside the main one (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto",
                        help="default: the GPU if there is one")
    parser.add_argument("--flip", action="store_true", help="sum the embeddings of each image and of its mirror image")
    parser.add_argument("-p", "--print-freq", type=int, default=100, metavar="N",
                        help="batches between reports where the output is not a terminal (default: %(default)s)")
    values = vars(parser.parse_args(argv))
    options = Options(**{**values, "images": tuple(values["images"])})
    if not options.resume:
        raise UserError("--resume is missing: give the checkpoint, or a published backbone's weights")
    if not os.path.exists(options.resume):
        raise UserError(f"--resume {options.resume}: no such file")
    if options.arch:
        check_arch(options.arch)
    for flag, value, minimum in (
        ("--batch-size", options.batch_size, 1),
        ("--workers", options.workers, 0),
        ("--print-freq", options.print_freq, 1),
    ):
        if value < minimum:
            raise UserError(f"{flag} {value}: give a number of at least {minimum}")
    return options


if __name__ == "__main__":
    exit_on_user_error(main)
