"""Learning-rate schedules.

To add one: write a function like `step_schedule`, add it to SCHEDULES, and declare its settings in ScheduleFlags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from utils.flags import flag

SECTION = "schedule"


def step_schedule(step: int, steps_per_epoch: int, total_steps: int, flags: ScheduleFlags) -> float:
    """A factor of 0.1 from each milestone epoch on."""
    return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in flags.lr_milestones)


# name -> (step, steps_per_epoch, total_steps, flags) -> factor of --lr. Steps count from 0; total_steps is the length
# of all --epochs, whatever --max-steps says.
SCHEDULES: dict[str, Callable[[int, int, int, ScheduleFlags], float]] = {"step": step_schedule}


@dataclass(frozen=True)
class ScheduleFlags:
    """The flags that decide the learning rate of a step."""

    lr: float = flag("--lr", "--learning-rate", default=0.1, metavar="LR", at_least=0, section=SECTION,
                     help="learning rate after warm-up")
    schedule: str = flag("--schedule", default="step", metavar="NAME", choices=SCHEDULES, section=SECTION,
                         help="how the learning rate changes after warm-up")
    lr_milestones: tuple[float, ...] = flag(
        "--lr-milestones", default=(10.0, 16.0, 21.0), metavar="E,E,...", at_least=0, section=SECTION,
        help="--schedule step: epochs, counted from 0, at which the learning rate falls to a tenth")
    warmup_epochs: float = flag("--warmup-epochs", default=0.0, metavar="E", at_least=0, section=SECTION,
                                help="epochs, or a fraction of one, over which the learning rate rises linearly")


def learning_rate(step: int, steps_per_epoch: int, total_steps: int, flags: ScheduleFlags) -> float:
    """The rate of a step: a linear rise to --lr, then --lr times the factor of the schedule.

    Steps of a global batch count, so the rate does not depend on the world size.
    """
    warmup_steps = flags.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return flags.lr * min(1.0, (step + 1) / warmup_steps)
    return flags.lr * SCHEDULES[flags.schedule](step, steps_per_epoch, total_steps, flags)
