"""The store that the agents of several hosts have in common, watched: where it is gone, ranks must end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

PERIOD = 1.0  # seconds between two questions
SILENCE = 30.0  # seconds without an answer after which the store counts as gone
PATIENCE = 20.0  # seconds that ranks then have to end by themselves, as those do that do not stand still


class StoreWatch:
    """Asks the store now and then whether it is there; once it is not, calls ``gone``, from a thread.

    Args:
        store: of torch.distributed; it is asked over a connection of its own.
        gone: ends the ranks.
    """

    def __init__(self, store: Any, gone: Callable[[], None]):
        self._store, self._gone = _alone(store), gone
        self._answered, self._failed = time.monotonic(), False
        self._ended = threading.Event()
        for work in (self._ask, self._watch):
            threading.Thread(target=work, name="store", daemon=True).start()

    def end(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _ask(self) -> None:
        try:
            while not self._ended.wait(PERIOD):
                self._store.check(["distloop/agents"])
                self._answered = time.monotonic()
        except RuntimeError:  # torch.distributed's errors are
            self._failed = True

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD):
            if self._failed or time.monotonic() - self._answered > SILENCE:
                if not self._ended.wait(PATIENCE):
                    self._gone()
                return


def _alone(store: Any) -> Any:
    """Return a connection of its own to the store under ``store``, which may wait for an answer there."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store.clone()
