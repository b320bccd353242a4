"""--init-from: a new run starts with the weights of another one, or with published weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from models.classifier import MarginClassifier
from utils.checkpoint.agreement import RankFailed, run_together
from utils.checkpoint.weights import Weights, open_weights
from utils.errors import UserError


def check_init_from(path: str, arch: str, embedding_size: int) -> Weights:
    """Raise UserError unless a run with this backbone can start from the file at `path`. Returns what it holds."""
    try:
        weights = open_weights(path, with_centers=True)
    except UserError as error:
        raise UserError(f"--init-from {error}") from None
    if weights.arch != arch:
        raise UserError(f"--init-from {path}: holds {weights.arch}, and this run trains {arch}; give --arch "
                        f"{weights.arch}, or weights of {arch}")
    found = weights.backbone.embedding_size
    if found != embedding_size:
        raise UserError(f"--init-from {path}: has embedding size {found}, but runs have {embedding_size}; give "
                        "another file")
    return weights


def init_from(
    path: str, arch: str, backbone: nn.Module, classifier: MarginClassifier, identities: Sequence[str]
) -> str:
    """Collective. Copy the weights in a file into a run that has not begun. Returns a line that says what was copied.

    Class centers are matched by identity name if both the file and the training set have names; otherwise all of them
    are copied if the number of classes is the same. Everything else keeps its initial value.

    backbone, classifier: the run's own, changed in place. The classifier has this rank's classes. identities: names of
    the training set by label, at most as many as there are classes. Raises UserError on every rank.
    """
    weights = check_init_from(path, arch, classifier.weight.shape[1])
    backbone.load_state_dict(weights.backbone.state_dict())
    path += " (EMA weights)" if weights.averaged else ""
    centers, names, shard = weights.centers, weights.identities or [], classifier.shard
    if centers is None:
        return f"starting from {path}: backbone; the file has no class centers, so all of them are initialized"
    stored_classes, rows = centers.shape[0], np.arange(shard.start, shard.stop)
    same_size = stored_classes == shard.num_classes
    by_name = _are_names(names) and _are_names(identities) and not (same_size and names == list(identities))
    if by_name:
        own = identities[shard.start:shard.stop]
        rows[:] = -1  # Classes without an identity keep -1.
        rows[:len(own)] = rows_by_name(names, own)
    elif not same_size:
        return (f"starting from {path}: backbone; its {stored_classes:,} class centers have no names and this run has "
                f"{shard.num_classes:,} classes, so all of them are initialized")

    def copy_own() -> int:
        centers.copy_rows(rows, classifier.weight.detach())
        return int(np.count_nonzero(rows >= 0))

    try:
        counts = run_together(copy_own, classifier.weight.device)
    except (UserError, RankFailed) as error:
        raise UserError(f"--init-from {path}: {error}") from None
    if not by_name:
        return f"starting from {path}: backbone, all {stored_classes:,} class centers"
    kept = sum(counts) if classifier.group is not None else counts[0]
    return (f"starting from {path}: backbone, class centers by identity: {kept:,} kept, "
            f"{len(identities) - kept:,} new, {len(names) - kept:,} dropped")


def _are_names(identities: Sequence[str]) -> bool:
    """False for label numbers, which replace names that a package lacks: equal numbers are different people."""
    return any(name != str(label) for label, name in enumerate(identities))


def rows_by_name(names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """int64 (len(wanted),): the position of each wanted name in `names`, or -1. Neither list has duplicates.

    Only `wanted`, a rank's part of possibly millions of names, goes into a table.
    """
    labels = {name: label for label, name in enumerate(wanted)}
    rows = np.full(len(wanted), -1)
    for row, name in enumerate(names):
        if name in labels:
            rows[labels[name]] = row
    return rows
