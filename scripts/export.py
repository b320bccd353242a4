"""A checkpoint -> the formats of other programs.

    python3 scripts/export.py --resume checkpoint.pth.tar --format torchshard  --output exported.pth.tar
    python3 scripts/export.py --resume checkpoint.pth.tar --format insightface --output backbone.pth
    python3 scripts/export.py --resume checkpoint.pth.tar --format onnx        --output backbone.onnx
    python3 scripts/export.py --resume checkpoint.pth.tar --format safetensors --output backbone.safetensors [--centers]

Whatever the format, the network's input is RGB, (n, 3, 112, 112), (value / 255 - 0.5) / 0.5 = (value - 127.5) / 127.5, and its
output (n, d) is not L2-normalised: compare embeddings by their cosine. Weights are written in float32.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.decode import IMAGE_SIZE  # noqa: E402
from models import check_arch  # noqa: E402
from utils.checkpoint.initial import StoredCenters, StoredWeights, open_weights  # noqa: E402
from utils.checkpoint.weights import IDENTITIES_TENSOR, SAFETENSORS_EXTENSION  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402

CENTERS_NAME = "arcface_linear.weight"  # torchshard's
ONNX_OPSET = 18
ONNX_INPUT, ONNX_OUTPUT = "input", "embedding"
# What onnxruntime may differ by from PyTorch: other kernels sum in another order, and a network of a hundred layers adds up.
ONNX_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per argument (see `parse_options` for their meaning)."""

    resume: str
    format: str
    output: str
    centers: bool
    arch: str | None


def main() -> None:
    options = parse_options()
    check_output(options.output)
    weights = open_weights(options.resume, options.arch)
    if weights.centers is None and (options.centers or options.format == "torchshard"):
        raise UserError(f"--resume {options.resume}: has no class centers, which "
                        f"{'--centers' if options.centers else '--format torchshard'} writes; give a checkpoint of main.py")
    try:
        said = WRITERS[options.format](weights, options)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written ({error.strerror or error})") from None
    print(f"{weights.arch} of {options.resume} as {options.format}: {options.output}, "
          f"{os.path.getsize(options.output) / 2**20:,.1f} MiB; {said}")


@contextlib.contextmanager
def replacing(output: str) -> Iterator[str]:
    """A name beside `output` to write to; it takes the place of `output` once all is written and on the disk."""
    temporary = f"{output}.{os.getpid()}.part"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors makes its files for their owner alone
        os.replace(temporary, output)
    except RuntimeError as error:  # torch.save's and safetensors' way to say that the disk is full
        raise OSError(0, str(error).splitlines()[0]) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextlib.contextmanager
def gathered(centers: StoredCenters, output: str) -> Iterator[Tensor]:
    """All class centers (C, d) in float32, in a temporary file beside `output` that is mapped into memory.

    Rows are copied to it block by block: in memory there are a block and what the system keeps of the file of its own accord.
    """
    shape = centers.num_classes, centers.embedding_size
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(output)), prefix=".centers-") as file:
        # Before it is mapped: a full disk would be told by a signal then, here it is an error.
        os.posix_fallocate(file.fileno(), 0, max(4 * shape[0] * shape[1], 1))
        whole = torch.from_file(file.name, shared=True, size=shape[0] * shape[1], dtype=torch.float32).view(shape)
        for first, rows in centers.blocks():
            whole[first:first + len(rows)] = rows
        yield whole


# ---------------------------------------------------------------------------------------------------------------------
# The formats: each writes `options.output` and returns what is to be said about it


def write_torchshard(weights: StoredWeights, options: Options) -> str:
    """{"epoch", "arch", "state_dict"}, names with "module." in front, the classifier as "module.arcface_linear.weight" (C, d).

    Beside them "identities", the names by class, where they are known: other programs do not look at it, --init-from does.
    """
    with gathered(weights.centers, options.output) as centers, replacing(options.output) as temporary:
        entries = {**weights.backbone.state_dict(), CENTERS_NAME: centers}
        contents = {
            "epoch": weights.epoch,
            "arch": weights.arch,
            "state_dict": {f"module.{name}": tensor for name, tensor in entries.items()},
        }
        if weights.centers.identities:
            contents["identities"] = weights.centers.identities
        torch.save(contents, temporary)
    return f"backbone and {weights.centers.num_classes:,} class centers"


def write_insightface(weights: StoredWeights, options: Options) -> str:
    """The bare state dict of the backbone, as insightface's backbone.pth."""
    with replacing(options.output) as temporary:
        torch.save(weights.backbone.state_dict(), temporary)
    return "backbone"


def write_safetensors(weights: StoredWeights, options: Options) -> str:
    """The backbone's state dict; with --centers also "arcface_linear.weight" and the identities' names."""
    save_file = _require("safetensors.torch", options.format).save_file
    entries = {name: tensor.contiguous() for name, tensor in weights.backbone.state_dict().items()}
    metadata = {"format": "pt", "arch": weights.arch, "embedding_size": str(weights.backbone.embedding_size)}
    with contextlib.ExitStack() as stack:
        if options.centers:
            entries[CENTERS_NAME] = stack.enter_context(gathered(weights.centers, options.output))
            if weights.centers.identities:
                names = json.dumps(weights.centers.identities).encode("ascii")
                entries[IDENTITIES_TENSOR] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
        save_file(entries, stack.enter_context(replacing(options.output)), metadata=metadata)
    return "backbone" + (f" and {weights.centers.num_classes:,} class centers" if options.centers else "")


def write_onnx(weights: StoredWeights, options: Options) -> str:
    """The backbone with any batch size, input "input", output "embedding". Gets its name only if onnxruntime computes what PyTorch does."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package, options.format)
    with replacing(options.output) as temporary:
        export_onnx(weights.backbone, temporary)
        worst = largest_difference(weights.backbone, temporary)
        if not worst <= ONNX_TOLERANCE:
            raise UserError(f"--format onnx: onnxruntime's embeddings differ from PyTorch's by {worst:.2g} of their length, more than "
                            f"{ONNX_TOLERANCE:g}; {options.output} was not written. Other versions of onnxscript and onnxruntime may help")
    return f"batch of any size, opset {ONNX_OPSET}; onnxruntime agrees with PyTorch to {worst:.1g} of an embedding's length"


def export_onnx(backbone: nn.Module, path: str) -> None:
    """Write `backbone`, in evaluation mode, as one ONNX file."""
    example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # its progress
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            backbone, (example,), input_names=[ONNX_INPUT], output_names=[ONNX_OUTPUT], opset_version=ONNX_OPSET, dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # where in which file of this machine each layer was called
    program.save(path, external_data=False)


def largest_difference(backbone: nn.Module, path: str) -> float:
    """max |onnxruntime's embedding - PyTorch's| / |PyTorch's| over batches of 1, 2 and 5 random images."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator) * 2 - 1
        with torch.inference_mode():
            true = backbone(images).numpy()
        (mine,) = session.run([ONNX_OUTPUT], {ONNX_INPUT: images.numpy()})
        difference = np.linalg.norm(mine - true, axis=1) / np.linalg.norm(true, axis=1)
        worst = max(worst, float(difference.max())) if np.isfinite(difference).all() else float("nan")
    return worst


WRITERS: dict[str, Callable[[StoredWeights, Options], str]] = {
    "torchshard": write_torchshard, "insightface": write_insightface, "onnx": write_onnx, "safetensors": write_safetensors,
}


def _require(package: str, format: str):
    """The package, or a UserError that says where to get it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"--format {format}: the package {package.partition('.')[0]} is missing or does not load ({error}); "
                        "pip install -r scripts/requirements.txt") from None


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without opening a file. Raises UserError."""
    parser = Parser("export.py", "A checkpoint as a file for other programs. Input of the network: RGB, (value - 127.5) / 127.5.")
    parser.add_argument("--resume", metavar="PATH", help="checkpoint.pth.tar, or a published backbone's weights")
    parser.add_argument("-a", "--arch", metavar="ARCH", help="its architecture, checked (default: what the file says)")
    parser.add_argument("--format", choices=sorted(WRITERS),
                        help="torchshard: one file with backbone and classifier; insightface: the backbone's state dict; onnx: the "
                             "backbone for any batch size, checked with onnxruntime; safetensors: the backbone")
    parser.add_argument("--output", metavar="FILE", help="file to write; an older one is replaced when the new one is whole")
    parser.add_argument("--centers", action="store_true", help="with --format safetensors: the class centers, too")
    options = Options(**vars(parser.parse_args(argv)))
    for flag, value in (("--resume", options.resume), ("--format", options.format), ("--output", options.output)):
        if not value:
            raise UserError(f"{flag} is missing (see export.py --help)")
    if options.arch:
        check_arch(options.arch)
    if options.centers and options.format != "safetensors":
        raise UserError(f"--centers with --format {options.format}: goes with safetensors only; torchshard always has them, insightface "
                        "and onnx never")
    extension = {"onnx": ".onnx", "safetensors": SAFETENSORS_EXTENSION}.get(options.format, "")
    if not options.output.endswith(extension):
        raise UserError(f"--output {options.output}: give a name that ends in {extension}, by which other programs know the format")
    return options


def check_output(output: str) -> None:
    """Raise UserError unless `output` can be written: better before the work than after it."""
    directory = os.path.dirname(os.path.abspath(output))
    if os.path.exists(output) and not os.path.isfile(output):
        raise UserError(f"--output {output}: is not a file; give the name of one")
    if not os.path.isdir(directory):
        raise UserError(f"--output {output}: there is no directory {directory}; create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"--output {output}: the directory {directory} is not writable")


if __name__ == "__main__":
    exit_on_user_error(main)
