"""Backbone weights from files: this program's checkpoints and published ones. Runs no code from them."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from models import BACKBONES, build_backbone, check_arch
from models.iresnet import BLOCK_COUNTS
from utils.errors import UserError

# A classifier's entries, which published files carry beside the backbone. Nothing else may be left over.
CLASSIFIER_ENTRY = re.compile(r"(arcface_linear|arcface|classifier|logits)\.(weight|kernel|bias)")
ZIP_MAGIC = b"PK\x03\x04"  # first bytes of what torch.save writes since torch 1.6
PICKLE_MAGIC = b"\x80"  # first byte of a Python pickle since protocol 2, so of what older torch wrote too
ENTRIES_SHOWN = 3
SAFETENSORS_EXTENSION = ".safetensors"
IDENTITIES_TENSOR = "identities.json"  # in a safetensors file with class centers: the list of names as JSON, uint8


def load_backbone(path: str, arch: str | None = None) -> tuple[nn.Module, str]:
    """Read a trained backbone from a file; return (module in eval mode on the CPU in float32, its arch).

    The file is one of
      - this program's checkpoint.pth.tar: a dict with "arch", "embedding_size", "state_dict" and more;
      - a published backbone: the bare state dict; arch and embedding size follow from its names and shapes;
      - torchshard's {"epoch", "arch", "state_dict", "optimizer"}, its names with "module." in front, and beside them
        the classifier "arcface_linear.weight", which is ignored;
      - any of these weights as FILE.safetensors.
    Both of torch's serializations are read, and no code in them is ever run. Counters that old torch versions did not
    write (num_batches_tracked) start at 0. The global random state is left as it is.

    Args:
        path: the file.
        arch: what the file must hold, or None for whatever it holds.

    Raises:
        UserError: one line that names the file: missing, a directory, unreadable, not a checkpoint, or holding code;
            with names or shapes of no backbone in BACKBONES; or of another architecture than `arch`.
    """
    return backbone_of(path, read_weights_file(path), arch)


def backbone_of(path: str, content: object, arch: str | None = None) -> tuple[nn.Module, str]:
    """`load_backbone` from what `read_weights_file(path)` returned."""
    if arch is not None:
        check_arch(arch)
    weights = _find_weights(path, content)
    found = _nearest_arch(path, weights)
    if arch is not None and arch != found:
        raise UserError(f"{path}: holds {found}, but --arch says {arch}; give {found}, or leave --arch out")
    embedding_size = _embedding_size(weights)
    _check_claims(path, content, found, embedding_size)
    with torch.random.fork_rng(devices=[]):  # the initial values are overwritten: do not let them use up random numbers
        backbone = build_backbone(found, embedding_size)
    expected = backbone.state_dict()
    _check_names(path, weights, expected, found)
    _check_shapes(path, weights, expected, found)
    backbone.load_state_dict(expected | weights)
    return backbone.eval(), found


def read_weights_file(path: str) -> object:
    """What the file holds, mapped into memory where its format allows: see read_torch_file and _read_safetensors."""
    return _read_safetensors(path) if path.endswith(SAFETENSORS_EXTENSION) else read_torch_file(path)


def _read_safetensors(path: str) -> dict[str, object]:
    """{"state_dict", "arch", "embedding_size", "identities"}, the last three where the file says them. Raises UserError."""
    try:
        import safetensors  # here: one format of four needs it
    except ImportError:
        raise UserError(f"{path}: the package safetensors is missing: pip install -r scripts/requirements.txt") from None
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give a file of weights")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # mapped into memory, not read
            metadata = file.metadata() or {}
        content: dict[str, object] = {"state_dict": weights}
        if "arch" in metadata:
            content["arch"] = metadata["arch"]
        if "embedding_size" in metadata:
            content["embedding_size"] = int(metadata["embedding_size"])
        if IDENTITIES_TENSOR in weights:
            content["identities"] = json.loads(weights.pop(IDENTITIES_TENSOR).numpy().tobytes())
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a safetensors file, or a damaged one ({error}); copy or download it again") from None
    return content


def read_torch_file(path: str) -> object:
    """The file's content by torch.load, plain values and tensors only, or a UserError that says what is wrong."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a directory; give a checkpoint file")
    try:
        with open(path, "rb") as file:
            head = file.read(len(ZIP_MAGIC))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a checkpoint file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path}: is empty, not a checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.load also warns about what it then refuses: the error below says it
        try:
            # Mapped into memory (which the old format does not allow), what is not used stays on the disk: the
            # optimizer's state and a classifier of some GB.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head == ZIP_MAGIC)
        except Exception as error:  # of any type: arbitrary bytes are read as a pickle's instructions
            raise UserError(f"{path}: {_why_refused(error, head)}") from None


def _why_refused(error: Exception, head: bytes) -> str:
    """What is wrong with a file that begins with `head` and on which torch.load(weights_only=True) raised `error`."""
    advice = "a checkpoint holds tensors and plain values only, such as a saved state_dict"
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return f"holds code ({code[1]}) and was not loaded; {advice}"
    if isinstance(error, pickle.UnpicklingError) and head.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        return f"is a pickle that may hold code and was not loaded; {advice}"
    if head.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        return "is not a checkpoint, or a truncated one; copy or download it again"
    return f"is not a checkpoint; {advice}"


def _find_weights(path: str, content: object) -> dict[str, object]:
    """The backbone's entries under plain names, the classifier's left out."""
    entries = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(entries, Mapping) or not entries or not all(isinstance(name, str) for name in entries):
        raise UserError(f"{path}: holds no state_dict; give a checkpoint, or a published backbone's state dict")
    weights = {name.removeprefix("module."): value for name, value in entries.items()}
    if len(weights) != len(entries):
        raise UserError(f"{path}: holds the same weights with and without 'module.' in front; give one set of them")
    return {name: value for name, value in weights.items() if not CLASSIFIER_ENTRY.fullmatch(name)}


def _nearest_arch(path: str, weights: Mapping[str, object]) -> str:
    """The arch told by the names: an IResNet by its number of residual blocks in each stage."""
    if any(name.startswith("bottlenecks.") for name in weights):
        return "mobilefacenet"
    blocks = {tuple(name.split(".")[:2]) for name in weights if re.match(r"layer[1-4]\.\d+\.", name)}
    if not blocks:
        raise UserError(f"{path}: holds none of {', '.join(BACKBONES)}, but {_some(weights)}")
    counts = [sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5)]
    return min(BLOCK_COUNTS, key=lambda arch: sum(abs(a - b) for a, b in zip(BLOCK_COUNTS[arch], counts)))


def _embedding_size(weights: Mapping[str, object]) -> int:
    """d, the length of the last BatchNorm's bias; 512 where there is none, which the checks that follow then refuse."""
    bias = weights.get("features.bias")
    return len(bias) if isinstance(bias, Tensor) and bias.ndim == 1 and len(bias) else 512


def _check_claims(path: str, content: Mapping[str, object], arch: str, embedding_size: int) -> None:
    """What the file says of itself must be what it holds. An arch of another program's naming says nothing here."""
    said_arch, said_size = content.get("arch"), content.get("embedding_size")
    if isinstance(said_arch, str) and said_arch in BACKBONES and said_arch != arch:
        raise UserError(f"{path}: says that it is {said_arch}, but holds {arch}; it was put together wrongly")
    if isinstance(said_size, int) and said_size != embedding_size:
        raise UserError(f"{path}: says embedding size {said_size}, but holds {embedding_size}; "
                        "it was put together wrongly")


def _check_names(path: str, weights: Mapping[str, object], expected: Mapping[str, Tensor], arch: str) -> None:
    missing = [name for name in expected if name not in weights and not _is_counter(name)]
    unexpected = [name for name in weights if name not in expected]
    problems = []
    if missing:
        problems.append(f"missing {_some(missing)}")
    if unexpected:
        problems.append(f"unexpected {_some(unexpected)}")
    if problems:
        raise UserError(f"{path}: does not fit {arch}, the nearest architecture: {'; '.join(problems)}")


def _check_shapes(path: str, weights: Mapping[str, object], expected: Mapping[str, Tensor], arch: str) -> None:
    wrong = [
        f"{name} {_describe(value)} instead of {_describe(expected[name])}"
        for name, value in weights.items() if _describe(value) != _describe(expected[name])
    ]
    if wrong:
        raise UserError(f"{path}: wrong shapes for {arch}: {_some(wrong)}")


def _some(items: Iterable[str]) -> str:
    """The first few of the items, and how many more there are."""
    items = list(items)
    more = len(items) - ENTRIES_SHOWN
    return ", ".join(items[:ENTRIES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _is_counter(name: str) -> bool:
    """BatchNorm's count of batches: old torch did not write it, and no embedding depends on it."""
    return name.endswith(".num_batches_tracked")


def _describe(value: object) -> str:
    """Shape, and kind where it is not dense floating point: equal for a weight and what may be copied into it."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    layout = "" if value.layout == torch.strided else " sparse"
    return f"{tuple(value.shape)}{kind}{layout}"
