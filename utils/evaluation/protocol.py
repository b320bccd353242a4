"""What an evaluation set provides, and what evaluating it returns.

Shapes: U images in a set, d embedding size, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class RocCurve:
    """A ROC curve and the numbers in its legend entry."""

    label: str
    fpr: np.ndarray  # (T,), rising
    tpr: np.ndarray  # (T,)
    accuracy: float
    auc: float


@dataclass(frozen=True)
class MontageSection:
    """Image pairs under one title."""

    title: str
    pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]  # two uint8 (3, 112, 112) images and a caption


@dataclass(frozen=True)
class Result:
    """The outcome of one evaluation set.

    Attributes:
        headline: in [0, 1], larger is better. Training keeps the checkpoint with the best mean over its sets.
        summary: the headline as the training log prints it, such as "98.50% +- 0.40".
        metrics: numbers by name, for metrics.jsonl and TensorBoard.
        report: the lines that valid.py prints for the set.
        details: one more line for valid.py.
        json: what `valid.py --json` writes; strict JSON only.
        curves: for `valid.py --plot`; draw nothing if empty.
        montage: decodes and returns the worst errors, for `valid.py --montage`. None if the set has no such pictures.
    """

    headline: float
    summary: str
    metrics: dict[str, float]
    report: str
    details: str
    json: dict[str, Any]
    curves: Sequence[RocCurve] = ()
    montage: Callable[[], list[MontageSection]] | None = None


class Images(Protocol):
    """Item i is (uint8 (3, 112, 112), label); the label is ignored. Raises UserError for an unreadable image."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[torch.Tensor, int]: ...


class EvalSet(Protocol):
    """Images to embed, and a score of their embeddings.

    Attributes:
        name: what logs and metrics call the set.
        source: the file or directory it was opened from.
        size: its size in a few words, such as "6000 pairs". Nodes compare it to detect different data.
        contents: a longer description.
        images: U images, each of which is embedded once.
    """

    name: str
    source: str
    size: str
    contents: str

    @property
    def images(self) -> Images: ...

    def score(self, embeddings: np.ndarray) -> Result:
        """Score float32 (U, d): row i is the embedding of image i, L2-normalised, or zero where it is unusable.

        Prints warnings to stderr about anything that makes the numbers doubtful.
        """
