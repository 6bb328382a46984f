"""Checks of a task's options that say what is wrong in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distloop.errors import ConfigError, nearest


def check_sizes(**sizes: int) -> None:
    """Raise a ConfigError unless each option is a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise ConfigError(f"task.{name}: {size!r} is no whole number")
        if size < 1:
            raise ConfigError(f"task.{name}: {size} is too small; it must be at least 1")


def check_range(least: float = 0.0, most: float = math.inf, *, below: bool = False, **numbers: float) -> None:
    """Raise a ConfigError unless each option is a number from ``least`` to ``most``; ``below`` excludes ``most``."""
    for name, number in numbers.items():
        check_finite(**{name: number})
        if not least <= number <= most or (below and number == most):
            bounds = f"at least {least:g}" + (
                f" and {'below' if below else 'at most'} {most:g}" if most < math.inf else ""
            )
            raise ConfigError(f"task.{name}: {number} must be {bounds}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ConfigError, with the nearest choice, unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"task.{name}: unknown {value!r}{nearest(value, choices)}")


def check_positive(**numbers: float) -> None:
    """Raise a ConfigError unless each option is a finite number above 0."""
    for name, number in numbers.items():
        check_finite(**{name: number})
        if number <= 0:
            raise ConfigError(f"task.{name}: {number} is too small; it must be above 0")


def check_finite(**numbers: float) -> None:
    """Raise a ConfigError unless each option is a finite number."""
    for name, number in numbers.items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise ConfigError(f"task.{name}: {number!r} is no finite number")
