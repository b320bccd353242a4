"""--init-from: a new run starts with the weights of another one, or with published weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from models.classifier import ArcFaceClassifier
from utils.checkpoint.weights import Weights, open_weights
from utils.errors import UserError


def check_init_from(path: str, arch: str, embedding_size: int) -> None:
    """Raise UserError unless a run with this backbone can start from the file at `path`."""
    _open(path, arch, embedding_size)


def _open(path: str, arch: str, embedding_size: int) -> Weights:
    try:
        weights = open_weights(path, arch, with_centers=True)
    except UserError as error:
        raise UserError(f"--init-from {error}") from None
    found = weights.backbone.embedding_size
    if found != embedding_size:
        raise UserError(f"--init-from {path}: has embedding size {found}, but runs have {embedding_size}; give "
                        "another file")
    return weights


def init_from(
    path: str, arch: str, backbone: nn.Module, classifier: ArcFaceClassifier, identities: Sequence[str]
) -> str:
    """Collective. Copy the weights in a file into a run that has not begun. Returns a line that says what was copied.

    Class centers are matched by identity name if both the file and the training set have names; otherwise all of them
    are copied if the number of classes is the same. Everything else keeps its initial value.

    Args:
        path, arch: the file, and the backbone that it must hold.
        backbone, classifier: the run's own, changed in place. The classifier has this rank's classes.
        identities: names of the training set by label, at most as many as there are classes.
    """
    embedding_size = classifier.weight.shape[1]
    weights = _open(path, arch, embedding_size)
    backbone.load_state_dict(weights.backbone.state_dict())
    centers, names, shard = weights.centers, weights.identities, classifier.shard
    if centers is None:
        return f"starting from {path}: backbone; the file has no class centers, so all of them are initialized"
    stored_classes = centers.shape[0]
    differ = names != list(identities) or stored_classes != shard.num_classes
    if names and _are_names(names) and _are_names(identities) and differ:
        rows = np.full(shard.size, -1)  # Classes without an identity keep -1.
        own = identities[shard.start:shard.stop]
        rows[:len(own)] = rows_by_name(names, own)
        matched = torch.tensor(np.count_nonzero(rows >= 0), device=classifier.weight.device)
        if classifier.group is not None:
            dist.all_reduce(matched, group=classifier.group)
        kept = int(matched)
        new, dropped = len(identities) - kept, len(names) - kept
        report = f"class centers by identity: {kept:,} kept, {new:,} new, {dropped:,} dropped"
    elif stored_classes == shard.num_classes:
        rows = np.arange(shard.start, shard.stop)
        report = f"all {stored_classes:,} class centers"
    else:
        return (f"starting from {path}: backbone; its {stored_classes:,} class centers have no names and this run has "
                f"{shard.num_classes:,} classes, so all of them are initialized")
    centers.copy_rows(rows, classifier.weight.detach())
    return f"starting from {path}: backbone, {report}"


def _are_names(identities: Sequence[str]) -> bool:
    """False for label numbers, which replace names that a package lacks: equal numbers are different people."""
    return any(name != str(label) for label, name in enumerate(identities))


def rows_by_name(names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """int64 (len(wanted),): the position of each wanted name in `names`, or -1. Neither list has duplicates.

    Only `wanted`, a rank's part of possibly millions of names, goes into a table.
    """
    positions = dict(zip(wanted, itertools.count()))
    position = np.fromiter(map(positions.get, names, itertools.repeat(-1)), dtype=np.int64, count=len(names))
    found = np.flatnonzero(position >= 0)
    rows = np.full(len(wanted), -1, dtype=np.int64)
    rows[position[found]] = found
    return rows
