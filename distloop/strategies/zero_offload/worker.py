"""A thread beside backward and forward, which updates shards while those run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

PATIENCE = 0.5  # seconds for which the end waits for the thread


class Worker:
    """Runs tasks one after the other in a thread of its own, which begins with the first."""

    def __init__(self, name: str):
        self._name = name
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()  # the first is being done
        self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` once those before have ended."""
        with self._changed:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def join(self) -> None:
        """Return when all tasks have ended; raise what went wrong with one."""
        with self._changed:
            while self._tasks and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """End the thread; after a failure elsewhere it may be waiting for another rank, and ends when that is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            self._thread = None

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._tasks and not self._closed:
                    self._changed.wait()
                if not self._tasks:
                    return
                task = self._tasks[0]
            failure: BaseException | None = None
            try:
                task()
            except BaseException as error:
                failure = error
            with self._changed:
                self._tasks.popleft()
                self._failure = failure
                self._changed.notify_all()
                if failure is not None:
                    return
