"""What a run changes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from models.classifier import MarginClassifier
from utils.training.optim import Optimizers
from utils.training.scaler import SharedGradScaler


@dataclass
class Position:
    """Where the run is: `step` steps are done in all, `step_in_epoch` of them in epoch `epoch` (from 0).

    best_score: the best mean accuracy of --val-pairs and --val-bin so far.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_score: float | None = None


@dataclass(frozen=True)
class TrainState:
    """All that a run changes while it trains, and what it is trained on."""

    backbone: nn.Module
    classifier: MarginClassifier
    optimizers: Optimizers
    scaler: SharedGradScaler
    position: Position
    seed: int
    num_images: int
    global_batch: int
    identities: list[str] = field(default_factory=list)
