"""Deterministic mode: what a run needs so that the same bits come out on any number of ranks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distloop.config import Config
from distloop.leaf_state import LeafState
from distloop.learner import Learner
from distloop.leaves import leaves_of_at_most
from distloop.objective import held_modules


def leaves_of(config: Config) -> int:
    """Return how many leaves each global batch has, whatever the number of ranks; 0 if that is up to the ranks."""
    if not config.train.deterministic:
        return 0
    return leaves_of_at_most(config.data.micro_batch_size, config.train.leaves, config.data.global_batch_size)


def hold_to_leaves(learners: Sequence[Learner], task: Any, seed: int) -> None:
    """Have learners draw the same random numbers and keep the same buffers on any number of ranks, if they can."""
    objectives = [learner.objective for learner in learners]
    models = [o.model for o in objectives] + [m for o in objectives for m in held_modules(o).values()]
    models += [value for value in getattr(task, "__dict__", {}).values() if isinstance(value, nn.Module)]
    for learner in learners:
        strategy = learner.strategy
        if strategy.leaves:
            learner.leaf_state = LeafState(learner.name, seed, models, strategy)


class _Switch:
    """Torch's deterministic algorithms, on while any rank of this process needs them, then as they were before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holding = 0
        self._before = (False, False, False)

    def on(self) -> None:
        with self._lock:
            if self._holding == 0:
                self._before = (
                    torch.are_deterministic_algorithms_enabled(),
                    torch.is_deterministic_algorithms_warn_only_enabled(),
                    torch.backends.cudnn.benchmark,
                )
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False  # which kernel is fastest is not the same each time
            self._holding += 1

    def off(self) -> None:
        with self._lock:
            self._holding -= 1
            if self._holding == 0:
                enabled, warn_only, torch.backends.cudnn.benchmark = self._before
                torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


_SWITCH = _Switch()


@contextmanager
def reproducible(config: Config) -> Iterator[None]:
    """Have torch use algorithms that give the same bits each time, where the configuration asks for that.

    An operation that has no such algorithm raises an error then.
    """
    if not config.train.deterministic:
        yield
        return
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS begins
    _SWITCH.on()
    try:
        yield
    finally:
        _SWITCH.off()
