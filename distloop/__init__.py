"""distloop: one readable training loop, and any way of collecting gradients behind it.

What a user needs is here, imported when first used, so that ``import distloop`` and ``distloop --help`` cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distloop.api import fit
    from distloop.averages import MovingAverage
    from distloop.errors import DistloopError
    from distloop.learner import Learner
    from distloop.loop import Update, train
    from distloop.memory import ReplayMemory
    from distloop.objective import Objective
    from distloop.records import Record, Result
    from distloop.site import Site
    from distloop.tasks.base import Supervised, Task, accuracy
    from distloop.uneven import PerRank
    from distloop.world import World

__version__ = "0.1.0"

_HOME = {
    "fit": "distloop.api",
    "DistloopError": "distloop.errors",
    "MovingAverage": "distloop.averages",
    "PerRank": "distloop.uneven",
    "ReplayMemory": "distloop.memory",
    "Site": "distloop.site",
    "Learner": "distloop.learner",
    "Objective": "distloop.objective",
    "Update": "distloop.loop",
    "train": "distloop.loop",
    "Record": "distloop.records",
    "Result": "distloop.records",
    "Supervised": "distloop.tasks.base",
    "Task": "distloop.tasks.base",
    "accuracy": "distloop.tasks.base",
    "World": "distloop.world",
}

__all__ = [
    "DistloopError",
    "Learner",
    "MovingAverage",
    "Objective",
    "PerRank",
    "Record",
    "ReplayMemory",
    "Result",
    "Site",
    "Supervised",
    "Task",
    "Update",
    "World",
    "accuracy",
    "fit",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("distloop.losses")
    if name not in _HOME:
        raise AttributeError(f"module 'distloop' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__", "losses"]
