"""Learning-rate schedules: the factor on the base learning rate as a function of the step.

A step is one applied update, counted from 0. Steps that are skipped (fp16 overflow) do not count. All but ``Plateau``
are pure functions of the step, so that nothing has to be saved to go on with one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass


class Schedule(ABC):
    """The factor on the base learning rate."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the factor for the update numbered ``step``."""

    def observe(self, cost: float) -> None:  # noqa: B027 (only Plateau listens)
        """Take note of an evaluation; the lower the better."""

    def state_dict(self) -> dict[str, float]:
        """Return what it has taken note of, in JSON's types."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:  # noqa: B027 (the same)
        """Go on from :meth:`state_dict`."""


@dataclass(frozen=True)
class Constant(Schedule):
    """1 throughout."""

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Step(Schedule):
    """``gamma ** (step // every)``."""

    every: int
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        return float(self.gamma ** (step // self.every))


@dataclass(frozen=True)
class Linear(Schedule):
    """From 1 in a straight line to ``final`` at ``steps``, then constant."""

    steps: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        return 1.0 + (self.final - 1.0) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 to ``final`` at ``steps`` (Loshchilov and Hutter 2017, equation 5, without restarts)."""

    steps: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        return self.final + (1.0 - self.final) * _half_cosine(min(step / self.steps, 1.0))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up by half a cosine to 1, then down by another (Smith and Topin 2018, as torch's ``OneCycleLR`` has it).

    The base learning rate is the highest one; it starts at 1/``start_div`` of it, reaches it after ``peak`` of the
    ``steps``, and ends at 1/``final_div`` of the start.
    """

    steps: int
    peak: float = 0.3
    start_div: float = 25.0
    final_div: float = 1e4

    def __call__(self, step: int) -> float:
        start = 1.0 / self.start_div
        final = start / self.final_div
        top = self.peak * self.steps - 1.0
        last = self.steps - 1.0
        if step <= top:
            return start + (1.0 - start) * (1.0 - _half_cosine(step / max(top, 1e-9)))
        return final + (1.0 - final) * _half_cosine(min((step - top) / max(last - top, 1e-9), 1.0))


class Plateau(Schedule):
    """Multiply by ``gamma`` whenever the cost has not fallen for more than ``patience`` evaluations."""

    def __init__(self, *, gamma: float = 0.1, patience: int = 10, threshold: float = 1e-4):
        self.gamma, self.patience, self.threshold = gamma, patience, threshold
        self.factor, self.best, self.bad = 1.0, math.inf, 0

    def __call__(self, step: int) -> float:
        return self.factor

    def observe(self, cost: float) -> None:
        # The threshold is relative to the best so far, which is infinite at first.
        if cost < self.best - (self.threshold * abs(self.best) if math.isfinite(self.best) else 0.0):
            self.best, self.bad = cost, 0
            return
        self.bad += 1
        if self.bad > self.patience:
            self.factor, self.bad = self.factor * self.gamma, 0

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor, "best": self.best, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if state:  # it may have been another schedule's
            self.factor, self.best, self.bad = state["factor"], state["best"], int(state["bad"])


class WarmUp(Schedule):
    """A straight line from ``start`` to the schedule's own value over the first ``steps`` updates.

    The schedule runs on underneath, so its end does not move. Update 0 already takes the first stride, as in Goyal et
    al. (2017, section 2.2), so that no update is wasted on a learning rate of 0.
    """

    def __init__(self, schedule: Schedule, steps: int, start: float = 0.0):
        self.schedule, self.steps, self.start = schedule, steps, start

    def __call__(self, step: int) -> float:
        factor = self.schedule(step)
        if step >= self.steps:
            return factor
        return factor * (self.start + (1.0 - self.start) * (step + 1) / self.steps)

    def observe(self, cost: float) -> None:
        self.schedule.observe(cost)

    def state_dict(self) -> dict[str, float]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.schedule.load_state_dict(state)


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))
