"""Layers of settings, and what in them is said of one learner alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distloop.errors import ConfigError, nearest
from distloop.values import brief, key_of

LEARNERS = "learners"
PER_LEARNER = ("optimizer", "schedule", "gradients")  # sections that a learner may have of its own


@dataclass(frozen=True)
class Setting:
    """A value, and the words that name its source in an error."""

    value: Any
    source: str


Settings = dict[str, Setting]  # by dotted key


def divide(layer: Settings) -> tuple[Settings, dict[str, Settings]]:
    """Part what is said of all learners from what is said of one: by learner, in the words that are used of all.

    Raises:
        ConfigError: something is said of a learner that is not said of learners.
    """
    general: Settings = {}
    own: dict[str, Settings] = {}
    for dotted, setting in layer.items():
        if dotted.partition(".")[0] != LEARNERS:
            general[dotted] = setting
            continue
        for leaf, value in leaves(dotted, setting.value, depth=3 - dotted.count("."), source=setting.source):
            name, inner = learner_key(leaf, setting.source)
            if inner in own.setdefault(name, {}):
                raise ConfigError(f"{setting.source}: {leaf} is given twice, by {own[name][inner].source} too")
            own[name][inner] = Setting(value, setting.source)
    return general, own


def learner_key(dotted: str, source: str) -> tuple[str, str]:
    """Return NAME and SECTION.KEY of ``learners.NAME.SECTION.KEY``, or refuse it."""
    _, *parts = dotted.split(".")
    section = parts[1] if len(parts) > 1 else PER_LEARNER[0]
    for part in parts:
        key_of(part, f"{source}: {LEARNERS}")
    if section not in PER_LEARNER:
        raise ConfigError(f"{source}: {dotted}: a learner has no section {section!r}{nearest(section, PER_LEARNER)}")
    if len(parts) != 3 or not parts[0]:
        name = parts[0] if parts and parts[0] else "NAME"
        raise ConfigError(f"{source}: {brief(dotted)}: must be like {LEARNERS}.{name}.optimizer.lr")
    return parts[0], f"{section}.{parts[2]}"


def leaves(dotted: str, value: Any, depth: int, source: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what lies in nested mappings, ``depth`` levels down at most."""
    if depth <= 0 or not isinstance(value, Mapping):
        yield dotted, value
        return
    for key, inner in value.items():
        yield from leaves(f"{dotted}.{key_of(str(key), f'{source}: {dotted}')}", inner, depth - 1, source)
