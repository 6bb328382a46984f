"""Whether a model is better than those before it, and whether it is worth waiting for a better one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from distloop.errors import ConfigError, nearest

LOWER_IS_BETTER = ("loss", "error", "bits_per", "perplexity", "nll", "entropy", "distance", "divergence")
LOWER_IS_BETTER_ABBREVIATED = {
    "mae",
    "mse",
    "rmse",
    "mape",
    "wer",
    "cer",
    "per",
    "ppl",
    "bpc",
    "bpb",
    "fid",
    "eer",
    "ece",
    "ber",
    "bler",
}


@dataclass(frozen=True)
class Monitor:
    """Which metric tells whether a model is better, and how long to wait for that."""

    metric: str | None = None  # None: the first that evaluation returns
    mode: str | None = None  # None: min for a loss, else max
    patience: int | None = None
    min_delta: float = 0.0
    keep_best: bool = True
    target: float | None = None  # good enough: stop


class Best(NamedTuple):
    """The best value so far, the step it was reached at, and all metrics there."""

    value: float
    step: int
    metrics: dict[str, float]


class Judge:
    """Looks at evaluations one after the other."""

    def __init__(self, monitor: Monitor):
        self.monitor = monitor
        self.best: Best | None = None
        self.metric: str | None = None  # which one is watched, once it is known
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.evaluated_at = -1
        self._without_better = 0

    def __call__(self, metrics: dict[str, float], step: int) -> tuple[bool, float]:
        """Take note of an evaluation; return whether it is the best, and its cost: the lower the better.

        Raises:
            ConfigError: it lacks the metric that is watched.
        """
        self.metrics, self.evaluated_at = metrics, step
        self.metric = name = self._choose()
        sign, monitor = self._sign(name), self.monitor
        cost = sign * metrics[name]
        limit = math.inf if self.best is None else sign * self.best.value - monitor.min_delta
        better = cost < limit or self._reached(metrics[name])
        if better:
            self.best, self._without_better = Best(metrics[name], step, metrics), 0
        else:
            self._without_better += 1
        return better, cost

    def enough(self) -> str | None:
        """Return a reason to stop, if there is one."""
        monitor = self.monitor
        if self.best is not None and self.best.step == self.evaluated_at and self._reached(self.best.value):
            return f"{self.metric} reached monitor.target, which is {monitor.target:g}"
        if monitor.patience is not None and self._without_better > monitor.patience:
            return f"no better {self.metric} in {monitor.patience + 1} evaluations"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return, in JSON's types, all that it goes on from."""
        return {
            "best": None if self.best is None else list(self.best),
            "metric": self.metric,
            "lower": None if self.metric is None else self._sign(self.metric) > 0,
            "metrics": self.metrics,
            "evaluated_at": self.evaluated_at,
            "without_better": self._without_better,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; what was the best of another metric, or of another mode, is forgotten."""
        self.metrics, self.evaluated_at = dict(state["metrics"]), state["evaluated_at"]
        self.metric = self.monitor.metric or state["metric"]
        if self.metric is not None and (self.metric, self._sign(self.metric) > 0) == (state["metric"], state["lower"]):
            self.best = None if state["best"] is None else Best(*state["best"])
            self._without_better = state["without_better"]

    def _reached(self, value: float) -> bool:
        target = self.monitor.target
        if target is None or self.metric is None:
            return False
        sign = self._sign(self.metric)
        return sign * value <= sign * target

    def _choose(self) -> str:
        name = self.monitor.metric or self.metric or next(iter(self.metrics))
        if name not in self.metrics:
            raise ConfigError(
                f"monitor.metric: this evaluation returned no metric {name!r}{nearest(name, self.metrics)}"
            )
        return name

    def _sign(self, name: str) -> float:
        lower = self.monitor.mode == "min" if self.monitor.mode else lower_is_better(name)
        return 1.0 if lower else -1.0


def lower_is_better(name: str) -> bool:
    """Return whether a metric of this name is a cost, as far as names tell; ``monitor.mode`` settles it."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return any(word in name.lower() for word in LOWER_IS_BETTER) or bool(words & LOWER_IS_BETTER_ABBREVIATED)
