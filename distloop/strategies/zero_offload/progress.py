"""How far updates are that run in another thread, for those who wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Progress:
    """Counts updates that are under way, and keeps the first thing that went wrong; ``changed`` guards it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.updates = 0  # that have not ended
        self._undecided = 0  # of these, those that have applied nothing yet: they may have to add up a norm
        self._deciding = False
        self._failure: BaseException | None = None

    def updating(self, update: Callable[[], None]) -> Callable[[], None]:
        """Return ``update``, a step's, so that those who need its values know when it has ended, and how."""
        with self.changed:
            self.updates += 1
            self._undecided += 1

        def run() -> None:
            self._deciding = True
            try:
                update()
            except BaseException as failure:
                self.fail(failure)
                raise
            finally:
                self.decide()
                with self.changed:
                    self.updates -= 1
                    self.changed.notify_all()

        return run

    def decide(self) -> None:
        """Note that the update under way has nothing more to ask the other ranks."""
        if self._deciding:
            self._deciding = False
            with self.changed:
                self._undecided -= 1
                self.changed.notify_all()

    def await_decisions(self) -> None:
        """Return when no update has anything more to ask the other ranks."""
        with self.changed:
            while self._undecided and self._failure is None:
                self.changed.wait()
        self.check()

    def await_updates(self) -> None:
        """Return when every update has ended."""
        with self.changed:
            while self.updates and self._failure is None:
                self.changed.wait()
        self.check()

    def fail(self, failure: BaseException) -> None:
        """Let everyone who waits raise ``failure``, or what went wrong before."""
        with self.changed:
            self._failure = self._failure or failure
            self.changed.notify_all()

    def check(self) -> None:
        """Raise what went wrong in another thread."""
        if self._failure is not None:
            raise self._failure
