"""Learning rates: warm-up, the schedules, and the registry."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_poly_schedule(power):
    """torch's LinearLR and PolynomialLR, one after the other; and the values at the steps that matter."""
    flags = ScheduleFlags(lr=0.4, schedule="poly", poly_power=power, warmup_epochs=1.25)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    true = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=35, power=power)
    found = rates(flags, 40)
    assert found[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])  # from the first step, and not at the full rate
    for rate in found[5:]:
        assert rate == pytest.approx(true.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        true.step()
    assert found[5] == 0.4 and found[39] == pytest.approx(0.4 / 35**power) and true.get_last_lr() == [0.0]
    assert rates(ScheduleFlags(lr=0.4, schedule="poly"), 4) == pytest.approx([0.4, 0.225, 0.1, 0.025])  # power 2


def test_cosine_schedule():
    flags = ScheduleFlags(lr=0.4, schedule="cosine", warmup_epochs=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.4)
    true = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=38)
    found = rates(flags, 40)
    assert found[:3] == pytest.approx([0.2, 0.4, 0.4])
    for rate in found[2:]:
        assert rate == pytest.approx(true.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        true.step()
    assert found[21] == pytest.approx(0.2) and 0 < found[39] < 1e-3 and true.get_last_lr() == [0.0]
    assert learning_rate(10**9 - 1, 1000, 10**9, flags) > 0  # the last step of a long run


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_as_long_as_the_run(name):
    flags = ScheduleFlags(lr=1.0, schedule=name, warmup_epochs=1.0, lr_milestones=None)
    assert rates(flags, 4) == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_gives_a_factor_for_every_step(name):
    assert all(0 <= rate <= 0.1 for rate in rates(ScheduleFlags(lr=0.1, schedule=name), 120))


def test_a_schedule_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "linear", lambda step, per_epoch, total, flags: 1 - step / total)
    assert rates(ScheduleFlags(lr=1.0, schedule="linear", warmup_epochs=0.25), 4) == [1.0, 0.75, 0.5, 0.25]
