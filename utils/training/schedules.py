"""Learning-rate schedules."""

from __future__ import annotations

from collections.abc import Sequence


def learning_rate(
    step: int, steps_per_epoch: int, *, base: float, milestones: Sequence[float], warmup_epochs: float
) -> float:
    """The rate of the step with number `step`, from 0: a linear rise to `base`, then a factor 0.1 at every milestone epoch.

    Counted in steps of a global batch, so it is the same at every world size.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return base * min(1.0, (step + 1) / warmup_steps)
    return base * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in milestones)
