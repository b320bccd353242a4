"""Learning rates: warm-up, the step schedule, and the registry."""

from __future__ import annotations

import pytest

from utils.training.schedules import SCHEDULES, ScheduleFlags, learning_rate


def rates(flags: ScheduleFlags, steps: int, steps_per_epoch: int = 4) -> list[float]:
    return [learning_rate(step, steps_per_epoch, steps, flags) for step in range(steps)]


def test_step_schedule():
    flags = ScheduleFlags(lr=0.4, lr_milestones=(1.0, 2.5))
    assert rates(flags, 12) == [0.4] * 4 + [0.4 * 0.1] * 6 + [0.4 * 0.1**2] * 2
    assert rates(ScheduleFlags(lr=0.4, lr_milestones=()), 12) == [0.4] * 12


def test_warm_up_rises_linearly_before_any_schedule():
    assert rates(ScheduleFlags(lr=0.4, warmup_epochs=0.5), 4) == [0.2, 0.4, 0.4, 0.4]
    # A warm-up that ends within a step, and a milestone within the warm-up.
    assert rates(ScheduleFlags(lr=1.0, warmup_epochs=0.6, lr_milestones=(0.25,)), 4) == [
        1 / 2.4, 2 / 2.4, 1.0, 0.1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_gives_a_factor_for_every_step(name):
    assert all(0 <= rate <= 0.1 for rate in rates(ScheduleFlags(schedule=name), 120))


def test_a_schedule_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "linear", lambda step, per_epoch, total, flags: 1 - step / total)
    assert rates(ScheduleFlags(lr=1.0, schedule="linear", warmup_epochs=0.25), 4) == [1.0, 0.75, 0.5, 0.25]
