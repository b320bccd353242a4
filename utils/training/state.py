"""What a run changes while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from models.classifier import MarginClassifier
from utils.training.clip import GradientClip
from utils.training.ema import WeightAverage
from utils.training.optim import Optimizers
from utils.training.scaler import SharedGradScaler


@dataclass
class Position:
    """How far training has come.

    epoch: the current epoch, from 0.
    step_in_epoch: steps done in this epoch.
    step: steps done in all epochs.
    best_score: the best mean accuracy on the validation sets so far; None before the first evaluation.
    to_evaluate: an evaluation of this step is due and has not been made.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_score: float | None = None
    to_evaluate: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that training changes, and what a checkpoint must say about it.

    arch: the backbone's name in BACKBONES.
    loss, loss_settings: the margin's name, and its constants such as scale and margin.
    margin: the margin's module, whose buffers are running statistics. The default has none.
    seed: all random numbers derive from it and from the position.
    num_images, global_batch: what position.step_in_epoch was counted in.
    images: TrainingSet.fingerprint(), the same on all ranks; "" if it is unknown.
    identities: names of the training set by label.
    mean_face: of the training set, for evaluations to compare with; only rank 0 has it.
    ema: the average of the backbone's weights; None without --ema.
    clip: limits the gradients; None without --clip-grad-norm.
    """

    backbone: nn.Module
    classifier: MarginClassifier
    optimizers: Optimizers
    scaler: SharedGradScaler
    position: Position
    arch: str
    seed: int
    num_images: int
    global_batch: int
    images: str = ""
    identities: list[str] = field(default_factory=list)
    loss: str = "arcface"
    loss_settings: dict[str, Any] = field(default_factory=dict)
    margin: nn.Module = field(default_factory=nn.Module)
    mean_face: Tensor | None = None
    ema: WeightAverage | None = None
    clip: GradientClip | None = None

    def has_same_images(self, sampler: dict[str, Any]) -> bool:
        """Whether `sampler`, an entry of a checkpoint, was counted in the images of this run, in the same order.

        Where one of both has no fingerprint, or they are of two formats such as a folder and its package, only the
        number of images is compared.
        """
        saved = sampler.get("images", "")
        comparable = saved.partition(":")[0] == self.images.partition(":")[0]
        return sampler["num_images"] == self.num_images and (not comparable or saved == self.images)
