"""A thread beside backward, which begins when there is something for it to do."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

PATIENCE = 0.5  # seconds for which the end waits for the thread


class OwnThread(ABC):
    """Something with a thread of its own; ``_changed`` guards what the thread and others share, and wakes who waits."""

    def __init__(self, name: str):
        self._name = name
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """End the thread; after a failure it may be waiting for another rank, and ends when that is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            self._thread = None

    def _wake(self) -> None:
        """Have the thread look at what has changed, after it has begun; called with the lock held."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._changed.notify_all()

    @abstractmethod
    def _work(self) -> None:
        """Do what there is to do, until closed."""
