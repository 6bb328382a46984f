"""Keys that are read only where another key has a certain value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from distloop.config import Config


class Idle(NamedTuple):
    """A key, the key that chooses whether it is read, and with what."""

    key: str
    chooser: str
    reader: str
    reads: Callable[[Config], bool]


CONDITIONS = (
    Idle("precision.loss_scale", "precision.name", "precision.name fp16", lambda c: c.precision.name == "fp16"),
    Idle("precision.growth_interval", "precision.name", "precision.name fp16", lambda c: c.precision.name == "fp16"),
    Idle("train.leaves", "train.deterministic", "train.deterministic", lambda c: c.train.deterministic),
    Idle(
        "monitor.most_skipped", "monitor.nonfinite", "monitor.nonfinite skip", lambda c: c.monitor.nonfinite == "skip"
    ),
)


def idle(config: Config) -> Iterator[Idle]:
    """Yield the keys that nothing reads in this configuration."""
    return (one for one in CONDITIONS if not one.reads(config))
