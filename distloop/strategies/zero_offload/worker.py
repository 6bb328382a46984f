"""A thread beside backward and forward, which updates shards while those run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from distloop.strategies.own_thread import OwnThread


class Worker(OwnThread):
    """Runs tasks one after the other in a thread of its own, which begins with the first."""

    def __init__(self, name: str):
        super().__init__(name)
        self._tasks: deque[Callable[[], None]] = deque()  # the first is being done

    def submit(self, task: Callable[[], None]) -> None:
        """Run ``task`` once those before have ended."""
        with self._changed:
            self._tasks.append(task)
            self._wake()

    def join(self) -> None:
        """Return when all tasks have ended; raise what went wrong with one."""
        with self._changed:
            while self._tasks and self._failure is None:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure

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
