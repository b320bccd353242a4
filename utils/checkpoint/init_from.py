"""--init-from: a new run starts with the weights of another one, or with published weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from models.classifier import MarginClassifier
from utils.checkpoint.agreement import RankFailed, run_together
from utils.checkpoint.identities import can_be_compared
from utils.checkpoint.weights import Weights, open_weights
from utils.errors import UserError


def check_init_from(
    path: str, arch: str, embedding_size: int, sub_centers: int = 1, channel_order: str | None = None
) -> Weights:
    """Raise UserError unless a run with this backbone and this number of centers of a class can start from a file.

    Returns what the file at `path` holds.
    """
    try:
        weights = open_weights(path, with_centers=True, channel_order=channel_order)
    except UserError as error:
        raise UserError(f"--init-from {error}") from None
    if weights.arch != arch:
        raise UserError(f"--init-from {path}: holds {weights.arch}, and this run trains {arch}; give --arch "
                        f"{weights.arch}, or weights of {arch}")
    found = weights.backbone.embedding_size
    if found != embedding_size:
        raise UserError(f"--init-from {path}: has embedding size {found}, and this run {embedding_size}; give "
                        f"--embedding-size {found}, or another file")
    if weights.sub_centers > sub_centers:
        # Only the training images would tell which of a class's centers most of them belong to.
        raise UserError(f"--init-from {path}: has {weights.sub_centers} centers of each class, and this run has "
                        f"{sub_centers}; give --sub-centers {weights.sub_centers}, or take the backbone alone: write "
                        "it to a file with scripts/export.py --format insightface")
    return weights


def init_from(
    path: str, arch: str, backbone: nn.Module, classifier: MarginClassifier, identities: Sequence[str],
    channel_order: str | None = None,
) -> str:
    """Collective. Copy the weights in a file into a run that has not begun. Returns a line that says what was copied.

    Class centers are matched by identity name if both the file and the training set have names; otherwise all of them
    are copied if the number of classes is the same. Everything else keeps its initial value. If the run has more
    centers of each class than the file, the file's become the first ones.

    backbone, classifier: the run's own, changed in place. The classifier has this rank's classes. identities: names of
    the training set by label, at most as many as there are classes. Raises UserError on every rank.
    """
    weights = check_init_from(path, arch, classifier.weight.shape[1], classifier.sub_centers, channel_order)
    start = (f"starting from {path}{' (EMA weights)' if weights.averaged else ''}: "
             f"backbone{weights.describe_order()}")
    backbone.load_state_dict(weights.backbone.state_dict())
    centers, names, shard = weights.centers, weights.identities or [], classifier.shard
    if centers is None:
        return f"{start}; the file has no class centers, so all of them are initialized"
    stored_classes, rows = centers.shape[0] // weights.sub_centers, np.arange(shard.start, shard.stop)
    same_size = stored_classes == shard.num_classes
    by_name = can_be_compared(names, identities) and not (same_size and names == list(identities))
    if by_name:
        own = identities[shard.start:shard.stop]
        rows[:] = -1  # Classes without an identity keep -1.
        rows[:len(own)] = rows_by_name(names, own)
    elif not same_size:
        return (f"{start}; its {stored_classes:,} class centers have no names and this run has "
                f"{shard.num_classes:,} classes, so all of them are initialized")

    def copy_own() -> int:
        centers.copy_rows(rows_of_classes(rows, weights.sub_centers, classifier.sub_centers),
                          classifier.weight.detach())
        return int(np.count_nonzero(rows >= 0))

    try:
        counts = run_together(copy_own, classifier.weight.device)
    except (UserError, RankFailed) as error:
        raise UserError(f"--init-from {path}: {error}") from None
    several = ("" if classifier.sub_centers == 1 else f" ({weights.sub_centers} of each class)"
               if weights.sub_centers == classifier.sub_centers else
               f" ({weights.sub_centers} of each class; its other centers are initialized)")
    if not by_name:
        return f"{start}, all {stored_classes:,} class centers{several}"
    kept = sum(counts) if classifier.group is not None else counts[0]
    return (f"{start}, class centers by identity{several}: {kept:,} kept, "
            f"{len(identities) - kept:,} new with initial values, {len(names) - kept:,} dropped")


def rows_of_classes(classes: np.ndarray, stored: int, own: int) -> np.ndarray:
    """For each row of the run, int64 (M * own,): the stored row to copy, or -1 to keep the initial value.

    classes: int64 (M,), the stored class of each of the run's classes, or -1. own, stored: centers per class of the run
    and of the file, own >= stored.
    """
    rows = np.full((len(classes), own), -1)
    rows[:, :stored] = np.where(classes[:, None] >= 0, classes[:, None] * stored + np.arange(stored), -1)
    return rows.ravel()


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
