"""Read weights from files: checkpoints of this program, and published ones. Nothing in them is executed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import BACKBONES, build_backbone, check_arch
from models.iresnet import BLOCK_COUNTS
from utils.checkpoint.layout import read_manifest, step_directory
from utils.checkpoint.safe_load import SAFETENSORS_EXTENSION, read_safetensors, read_torch_file
from utils.checkpoint.shards import StoredRows, open_shards
from utils.errors import UserError

_ENTRIES_SHOWN = 3

# Entries of a classifier, which published files have beside the backbone's. No other entries may be left over.
_CLASSIFIER_ENTRY = re.compile(r"(arcface_linear|arcface|classifier|logits)\.(weight|kernel|bias)")
# The name of the class centers, in torchshard's files and in ours.
_CENTERS_ENTRY = re.compile(r"(module\.)?(arcface_linear|classifier)\.weight")


@dataclass(frozen=True)
class Weights:
    """What `open_weights` found in a file.

    backbone: in evaluation mode, on the CPU, in float32. It does not depend on the file anymore.
    epoch: of the file's run, 0 if unknown.
    centers: the class centers, mapped from the file; None if it has none, or if they were not asked for.
    identities: the centers' names by class; None if the file has no names.
    """

    path: str
    backbone: nn.Module
    arch: str
    epoch: int
    centers: StoredRows | None
    identities: list[str] | None


def open_weights(path: str, arch: str | None = None, *, with_centers: bool = False) -> Weights:
    """Read the backbone in a file, and open its class centers if asked for. The global random state does not change.

    The file is one of
      - this program's checkpoint.pth.tar: a dict with "arch", "embedding_size", "state_dict" and more;
      - a published backbone: the bare state dict, whose names and shapes determine arch and embedding size;
      - torchshard's {"epoch", "arch", "state_dict", "optimizer"}, with names that start with "module.", and the
        classifier as "arcface_linear.weight";
      - any of these weights as FILE.safetensors.
    Both of torch's serialization formats are read. Counters that old versions of torch did not write
    (num_batches_tracked) become 0.

    Args:
        arch: what the file must hold; None accepts any architecture.

    Raises:
        UserError: the file is missing or not a checkpoint, contains code, fits none of BACKBONES, holds another
            architecture than `arch`, or its class centers are damaged. The message names the file.
    """
    if arch is not None:
        check_arch(arch)
    content: Any = read_safetensors(path) if path.endswith(SAFETENSORS_EXTENSION) else read_torch_file(path)
    entries = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(entries, Mapping) or not entries or not all(isinstance(name, str) for name in entries):
        raise UserError(f"{path}: holds no state_dict; give a checkpoint, or the state dict of a published backbone")
    backbone, found = _build(path, content, entries)
    if arch is not None and arch != found:
        raise UserError(f"{path}: holds {found}, but --arch says {arch}; give {found}, or leave --arch out")
    is_checkpoint = "shards" in content and "position" in content
    epoch = content["position"]["epoch"] if is_checkpoint else content.get("epoch")
    centers = identities = None
    if with_centers:
        size: Any = backbone.embedding_size
        centers = _open_sharded(path, content) if is_checkpoint else _open_entry(path, entries, size)
        identities = _identities(path, content, centers.shape[0]) if centers is not None else None
    return Weights(path, backbone, found, epoch if isinstance(epoch, int) else 0, centers, identities)


def _build(path: str, content: Mapping[str, Any], entries: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The backbone with the entries' values, and its arch."""
    plain = {name.removeprefix("module."): value for name, value in entries.items()}
    if len(plain) != len(entries):
        raise UserError(f"{path}: holds the same weights with and without 'module.' in front; give one set of them")
    weights = {name: value for name, value in plain.items() if not _CLASSIFIER_ENTRY.fullmatch(name)}
    arch = _nearest_arch(path, weights)
    bias = weights.get("features.bias")  # of the last BatchNorm: d values
    embedding_size = len(bias) if isinstance(bias, Tensor) and bias.ndim == 1 and len(bias) else 512
    # What the file says about itself must be true. An arch in another program's naming says nothing here.
    said_arch, said_size = content.get("arch"), content.get("embedding_size")
    for what, said, found in (("arch", said_arch, arch), ("embedding size", said_size, embedding_size)):
        if (said in BACKBONES if isinstance(said, str) else isinstance(said, int)) and said != found:
            raise UserError(f"{path}: says {what} {said}, but holds {found}; give a file that was put together "
                            "correctly")
    with torch.random.fork_rng(devices=[]):  # Initial values, which are overwritten, must not use up random numbers.
        backbone = build_backbone(arch, embedding_size)
    expected = backbone.state_dict()
    missing = [name for name in expected if name not in weights and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in weights if name not in expected]
    wrong = [
        f"{name} {_describe(value)} instead of {_describe(expected[name])}"
        for name, value in weights.items() if name in expected and _describe(value) != _describe(expected[name])
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shapes:", wrong)) if names
    ]
    if problems:
        raise UserError(f"{path}: does not fit {arch}, the nearest architecture: {'; '.join(problems)}")
    backbone.load_state_dict(expected | weights)
    return backbone.eval(), arch


def _nearest_arch(path: str, weights: Mapping[str, Any]) -> str:
    """The arch that the names suggest; an IResNet has a typical number of residual blocks in each stage."""
    if any(name.startswith("bottlenecks.") for name in weights):
        return "mobilefacenet"
    blocks = {tuple(name.split(".")[:2]) for name in weights if re.match(r"layer[1-4]\.\d+\.", name)}
    if not blocks:
        raise UserError(f"{path}: holds none of {', '.join(BACKBONES)}, but {_some(weights)}")
    counts = [sum(stage == f"layer{number}" for stage, _ in blocks) for number in range(1, 5)]
    return min(BLOCK_COUNTS, key=lambda arch: sum(abs(a - b) for a, b in zip(BLOCK_COUNTS[arch], counts)))


def _describe(value: object) -> str:
    """The shape, and the kind unless it is dense floating point. Equal for a weight and what can be copied into it."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = "" if value.is_floating_point() else " complex" if value.is_complex() else " integer"
    return f"{tuple(value.shape)}{kind}{'' if value.layout == torch.strided else ' sparse'}"


def _some(items: Iterable[str]) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    more = len(items) - _ENTRIES_SHOWN
    return ", ".join(items[:_ENTRIES_SHOWN]) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Class centers


def _open_entry(path: str, entries: Mapping[str, Any], embedding_size: int) -> StoredRows | None:
    """The class centers in the state dict that has the backbone, if any."""
    for name, weight in entries.items():
        if _CENTERS_ENTRY.fullmatch(name):
            if (not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != embedding_size
                    or not weight.is_floating_point()):
                raise UserError(f"{path}: its {name} is not a matrix of class centers (classes, {embedding_size})")
            rows = weight.detach().contiguous().view(torch.uint8).numpy()
            return StoredRows((len(weight), embedding_size), weight.dtype, [(0, rows)])
    return None


def _open_sharded(path: str, content: dict[str, Any]) -> StoredRows:
    """The class centers in the shards of a checkpoint."""
    try:
        directory = step_directory(path, content)
        shape = int(content["num_classes"]), int(content["embedding_size"])
        return open_shards(directory, ["centers"], shape, read_manifest(directory))["centers"]
    except UserError as error:
        raise UserError(f"{path}: its class centers are missing or damaged: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its class centers are missing or damaged ({error})") from None


def _identities(path: str, content: Mapping[str, Any], num_classes: int) -> list[str] | None:
    names = content.get("identities")
    if not names:
        return None
    if not isinstance(names, list) or len(names) > num_classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: its list of identities is damaged; copy the file again")
    return names
