"""Schedules against torch's, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from distloop import schedules


def torch_factors(make: object, steps: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)  # type: ignore[operator]
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"] / lr)
        optimizer.step()
        scheduler.step()
    return factors


def one_cycle(optimizer: torch.optim.Optimizer) -> lr_scheduler.OneCycleLR:
    return lr_scheduler.OneCycleLR(optimizer, 1.0, 30, pct_start=0.5, div_factor=10, final_div_factor=100)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schedules.Constant(), lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0)),
        (schedules.Step(7, 0.3), lambda o: lr_scheduler.StepLR(o, 7, 0.3)),
        (schedules.Linear(20, 0.1), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 20)),
        (schedules.Cosine(30, 0.0), lambda o: lr_scheduler.CosineAnnealingLR(o, 30)),
        (schedules.OneCycle(30), lambda o: lr_scheduler.OneCycleLR(o, 1.0, 30)),
        (schedules.OneCycle(30, 0.5, 10, 100), one_cycle),
    ],
    ids=["constant", "step", "linear", "cosine", "one cycle", "one cycle, other constants"],
)
def test_same_factor_as_torch(ours: schedules.Schedule, theirs: object) -> None:
    assert [ours(step) for step in range(30)] == pytest.approx(torch_factors(theirs, 30), rel=1e-9, abs=1e-12)


def test_schedules_stay_at_their_end() -> None:
    assert schedules.Linear(10, 0.2)(50) == pytest.approx(0.2)
    assert schedules.Cosine(10, 0.2)(50) == pytest.approx(0.2)
    assert schedules.OneCycle(10)(50) == pytest.approx(1 / 25e4)


def test_warm_up_reaches_the_schedule_and_never_starts_at_zero() -> None:
    warm = schedules.WarmUp(schedules.Constant(), 4)
    assert [warm(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    from_quarter = schedules.WarmUp(schedules.Constant(), 3, start=0.25)
    assert [from_quarter(step) for step in range(4)] == pytest.approx([0.5, 0.75, 1.0, 1.0])
    cosine = schedules.Cosine(20)
    assert schedules.WarmUp(cosine, 5)(12) == cosine(12)


def test_plateau_as_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    ours = schedules.Plateau(gamma=0.5, patience=2)
    costs = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.5, 2.9999, 3.5, 3.5, 3.5, 1.0, 1.0]
    for cost in costs:
        theirs.step(cost)
        ours.observe(cost)
        assert ours(0) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert ours(0) < 1.0


def test_plateau_knows_costs_below_zero() -> None:
    plateau = schedules.Plateau(gamma=0.5, patience=0)
    for cost in (-0.5, -0.6, -0.7):  # an accuracy that rises
        plateau.observe(cost)
    assert plateau(0) == 1.0
    plateau.observe(-0.7)
    assert plateau(0) == 0.5
    assert math.isfinite(plateau.best)
