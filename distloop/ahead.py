"""A step's update, run by the strategy beside backward and forward, and what the loop must know of it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from distloop.transforms import Collected, Stream


class Ahead:
    """What the loop does with gradients, done in a thread of the strategy's, beside backward and forward."""

    def __init__(self, stream: Callable[[], Stream], apply: Callable[[int, Collected], None]):
        self._stream, self._apply = stream, apply
        self._decided = threading.Event()  # it has begun to apply, or has ended
        self._failure: BaseException | None = None

    def __call__(self) -> None:
        try:
            for i, collected in self._stream():
                self._decided.set()
                self._apply(i, collected)
        except BaseException as failure:
            self._failure = failure
            raise
        finally:
            self._decided.set()

    def await_decision(self) -> None:
        """Return when the norm, and whether it has overflowed, are known."""
        self._decided.wait()
        if self._failure is not None:
            raise self._failure
