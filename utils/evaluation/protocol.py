"""What an evaluation set provides, and what evaluating it returns.

Shapes: U images in a set, d embedding size, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from utils.evaluation.operating_points import PairScores


@dataclass(frozen=True)
class Source:
    """Where to find an evaluation set."""

    kind: str  # a key of EVAL_SETS in sets.py
    path: str
    flag: str  # the user's, for messages
    imgs_root: str | None = None  # its images, if they are elsewhere
    skip_missing: bool = False  # --skip-missing-pairs
    settings: Mapping[str, Any] = field(default_factory=dict)  # of this kind of set


@dataclass(frozen=True)
class RocCurve:
    """A ROC curve and the numbers in its legend entry."""

    label: str
    fpr: np.ndarray  # (T,), rising
    tpr: np.ndarray  # (T,)
    accuracy: float | None  # None where the protocol has no single threshold
    auc: float


@dataclass(frozen=True)
class MontageSection:
    """Image pairs under one title."""

    title: str
    pairs: Sequence[tuple[np.ndarray, np.ndarray, str]]  # two uint8 (3, 112, 112) images and a caption


@dataclass(frozen=True)
class Result:
    """The outcome of one evaluation set."""

    headline: float  # in [0, 1], larger is better; training keeps the checkpoint with the best mean over its sets
    summary: str  # the headline as the training log prints it, such as "98.50% +- 0.40"
    metrics: dict[str, float]  # for metrics.jsonl and TensorBoard
    report: str  # the lines that valid.py prints for the set
    details: str  # one more line for valid.py
    json: dict[str, Any]  # what `valid.py --json` writes; strict JSON only
    curves: Sequence[RocCurve] = ()  # for `valid.py --plot`
    montage: Callable[[], list[MontageSection]] | None = None  # decodes the worst errors, for `valid.py --montage`
    scores: Callable[[], PairScores] | None = None  # of sets of pairs, for `valid.py --far` and what needs it


class Images(Protocol):
    """Item i is (uint8 (3, 112, 112), label); the label is ignored. Raises UserError for an unreadable image."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[torch.Tensor, int]: ...


class EvalSet(Protocol):
    """Images to embed, and a score of their embeddings."""

    name: str  # what logs and metrics call the set
    source: str  # the file or directory it was opened from
    size: str  # such as "6,000 pairs"; nodes compare it to detect different data
    contents: str  # a longer description

    @property
    def fingerprint(self) -> str | None:
        """For a large set, whose embeddings are kept in a file: a hash of the images' names, sizes, times of change and
        alignment, which changes when their pixels may have. None for other sets."""

    @property
    def images(self) -> Images:
        """U images, each of which is embedded once."""

    def score(self, embeddings: Any) -> Result:
        """Score float32 (U, d): row i is the embedding of image i, L2-normalised, or zero where it is unusable.

        With a fingerprint: an EmbeddingFile, of which parts are read as embeddings[a:b]. Its rows are as the backbone
        gave them: not normalised, perhaps zero, NaN or infinite.

        Prints warnings to stderr about anything that makes the numbers doubtful.
        """
