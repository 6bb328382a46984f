"""Checks of a task's options that say what is wrong in one sentence."""

from __future__ import annotations

import math

from distloop.errors import ConfigError


def check_sizes(**sizes: int) -> None:
    """Raise a ConfigError unless each option is a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise ConfigError(f"task.{name}: {size!r} is no whole number")
        if size < 1:
            raise ConfigError(f"task.{name}: {size} is too small; it must be at least 1")


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
