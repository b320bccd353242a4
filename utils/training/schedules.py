"""Learning-rate schedules.

To add one: write a function like `step_schedule`, add it to SCHEDULES, declare its settings in ScheduleFlags, and list
their defaults in SCHEDULE_SETTINGS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils.flags import flag

SECTION = "schedule"


def step_schedule(step: int, steps_per_epoch: int, total_steps: int, flags: ScheduleFlags) -> float:
    """A factor of 0.1 from each milestone epoch on."""
    milestones = SCHEDULE_SETTINGS["step"]["lr_milestones"] if flags.lr_milestones is None else flags.lr_milestones
    return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in milestones)


def poly_schedule(step: int, steps_per_epoch: int, total_steps: int, flags: ScheduleFlags) -> float:
    """r ** P with P of --poly-power and r = (T - t) / (T - w): 1 at the end of warm-up, (1 / (T - w)) ** P at the end.

    t: the step, from 0. w: the steps of warm-up, not rounded. T: the steps of all --epochs. So the last step, T - 1,
    still has a rate above 0. insightface's PolyScheduler had P = 2, its later PolynomialLRWarmup has P = 1.
    """
    power = SCHEDULE_SETTINGS["poly"]["poly_power"] if flags.poly_power is None else flags.poly_power
    return _steps_left(step, steps_per_epoch, total_steps, flags) ** power


def cosine_schedule(step: int, steps_per_epoch: int, total_steps: int, flags: ScheduleFlags) -> float:
    """(1 - cos(pi * r)) / 2, half a cosine, with r as in `poly_schedule`. Loshchilov and Hutter, SGDR, 2017, eq. 5."""
    # sin^2 of half the angle: 1 - cos would round to 0 at the end of a long run.
    return math.sin(math.pi / 2 * _steps_left(step, steps_per_epoch, total_steps, flags)) ** 2


def _steps_left(step: int, steps_per_epoch: int, total_steps: int, flags: ScheduleFlags) -> float:
    """The share of the steps after warm-up that this one and those after it are, in (0, 1]."""
    return (total_steps - step) / (total_steps - flags.warmup_epochs * steps_per_epoch)


# name -> (step, steps_per_epoch, total_steps, flags) -> factor of --lr. Steps count from 0; total_steps is the length
# of all --epochs, whatever --max-steps says. The function is not called for steps of warm-up.
SCHEDULES: dict[str, Callable[[int, int, int, ScheduleFlags], float]] = {
    "step": step_schedule, "poly": poly_schedule, "cosine": cosine_schedule}

# The settings that only this schedule has: {schedule: {field: default}}. For other schedules they are None.
SCHEDULE_SETTINGS: dict[str, dict[str, Any]] = {
    "step": {"lr_milestones": (10.0, 16.0, 21.0)}, "poly": {"poly_power": 2.0}}


@dataclass(frozen=True)
class ScheduleFlags:
    """The flags that decide the learning rate of a step."""

    lr: float | None = flag("--lr", "--learning-rate", metavar="LR", at_least=0, section=SECTION,
                            default_text="0.1, adamw 0.001", help="learning rate after warm-up")
    schedule: str = flag("--schedule", default="step", metavar="NAME", choices=SCHEDULES, section=SECTION,
                         help="how the learning rate changes after warm-up")
    lr_milestones: tuple[float, ...] | None = flag(
        "--lr-milestones", metavar="E,E,...", at_least=0, section=SECTION, default_text="10,16,21",
        help="--schedule step: epochs, counted from 0, at which the learning rate falls to a tenth")
    poly_power: float | None = flag(
        "--poly-power", metavar="P", above=0, section=SECTION, default_text="2",
        help="--schedule poly: the learning rate falls as (steps left / steps after warm-up) ^ P")
    warmup_epochs: float = flag("--warmup-epochs", default=0.0, metavar="E", at_least=0, section=SECTION,
                                help="epochs, or a fraction of one, over which the learning rate rises linearly")


def learning_rate(step: int, steps_per_epoch: int, total_steps: int, flags: ScheduleFlags) -> float:
    """The rate of a step: a linear rise to --lr, then --lr times the factor of the schedule.

    Step t, from 0, of w warm-up steps has --lr * (t + 1) / w: the first one is small, not 0, and the last one has --lr.
    Steps of a global batch count, so the rate does not depend on the world size.
    """
    assert flags.lr is not None
    warmup_steps = flags.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return flags.lr * min(1.0, (step + 1) / warmup_steps)
    return flags.lr * SCHEDULES[flags.schedule](step, steps_per_epoch, total_steps, flags)
