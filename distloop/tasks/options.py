"""Checks of what a task is given, each a sentence that names the option."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distloop.errors import ConfigError, nearest


def check_numbers(least: float = 1, most: float = math.inf, **options: float) -> None:
    """Refuse an option outside ``least`` to ``most``.

    Raises:
        ConfigError: names the option, its value, and its range.
    """
    for name, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise ConfigError(f"task.{name}: {value!r} must be {'a number ' if not number else ''}{bounds}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse an option that is none of ``choices``.

    Raises:
        ConfigError: names the option, and the nearest choice.
    """
    if value not in choices:
        raise ConfigError(f"task.{name}: {value!r} is none of {', '.join(choices)}{nearest(value, choices)}")
