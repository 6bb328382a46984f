"""One rank at a time: who runs next, and whose random numbers are drawn."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy as np
import torch


class Generators:
    """The states of the generators that a process has once: torch's on the CPU, Python's and numpy's.

    Ranks that are processes have one of each, and ``torch.manual_seed`` on a rank means that rank.
    """

    def __init__(self) -> None:
        self._torch = torch.default_generator.get_state()
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def restore(self) -> None:
        """Make the process's generators go on from here."""
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


class Baton:
    """Whoever holds it runs. It goes from a rank that waits to the next in cyclic order that can run.

    Time has no part in that, so a program that does not ask for the time runs in the same order every time. Every
    method is called with the lock held; :meth:`wait` releases it meanwhile.

    Args:
        size: how many ranks there are; rank 0 has the baton first.
        lock: what guards everything that ``can_run`` looks at.
        can_run: whether a rank neither waits for a message that is not there nor has ended.
        stuck: called if nobody can run; somebody can afterwards, unless all have ended.
    """

    def __init__(self, size: int, lock: threading.Lock, can_run: Callable[[int], bool], stuck: Callable[[], None]):
        self._turned = [threading.Condition(lock) for _ in range(size)]
        self._can_run, self._stuck = can_run, stuck
        self._holder = 0
        self._first = Generators()
        self._last: Generators | None = None

    def enter(self, rank: int) -> None:
        """Begin as ``rank``: every rank starts with the generators as they were when the baton was made."""
        self._until_it_comes(rank)
        self._first.restore()

    def wait(self, rank: int) -> None:
        """Let the others run; return when it is this rank's turn again, with its own generators."""
        own = Generators()
        self._pass_on(rank)
        if self._holder != rank:
            self._until_it_comes(rank)
            own.restore()

    def leave(self, rank: int) -> None:
        """End as ``rank``; one that was interrupted while another had the baton leaves it there."""
        if self._holder == rank:
            if rank == 0:
                self._last = Generators()
            self._pass_on(rank)

    def close(self) -> None:
        """Leave the generators as rank 0 left them, as if nobody else had been there; all ranks have ended."""
        if self._last is not None:
            self._last.restore()

    def _until_it_comes(self, rank: int) -> None:
        # Python looks for a signal after a wait, not before: one that comes just then would go unseen for as long as
        # the others run. Rank 0 may be the main thread, whose signals these are.
        patience = 1.0 if rank == 0 else None
        while self._holder != rank:
            self._turned[rank].wait(patience)

    def _pass_on(self, rank: int) -> None:
        following = self._following(rank)
        if following is None:
            self._stuck()
            following = self._following(rank)
        if following is not None:
            self._holder = following
            self._turned[following].notify()

    def _following(self, rank: int) -> int | None:
        size = len(self._turned)
        order = ((rank + i) % size for i in range(1, size + 1))
        return next((other for other in order if self._can_run(other)), None)
