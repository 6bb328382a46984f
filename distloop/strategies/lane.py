"""The order in which buckets are sent, and who sends them: a thread beside backward, or whoever waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable

PATIENCE = 0.5  # seconds for which the lane's end waits for its thread


class ClosedError(Exception):
    """What was waited for will not come: its strategy was closed."""


class Lane:
    """Runs ``send(0)``, ``send(1)``, ... one after the other, each once it is ready.

    While backward still runs, a thread of the lane's own does it. Whoever waits for a bucket that nobody has begun to
    send does it at once instead of waiting for that thread to wake up.
    """

    def __init__(self, send: Callable[[int], None], *, threaded: bool):
        self._send, self._threaded = send, threaded
        self._changed = threading.Condition()
        self._ready = self._done = 0
        self._busy = self._closed = False
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin a step: nothing is ready, nothing done."""
        self._ready = self._done = 0

    def ready(self, count: int, *, soon_awaited: bool = False) -> None:
        """Say that the first ``count`` buckets may be sent; ``soon_awaited``: the caller comes for them next."""
        with self._changed:
            self._ready = count
            if not self._threaded or soon_awaited:
                self._changed.notify_all()
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="collecting gradients", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, number: int) -> None:
        """Return when bucket ``number`` has been sent; raise what went wrong with it or with one before.

        Raises:
            ClosedError: the lane was closed meanwhile.
        """
        with self._changed:
            while self._done <= number and self._failure is None:
                if self._ready > self._done and not self._busy:
                    self._send_next()
                elif self._closed:
                    raise ClosedError
                else:
                    self._changed.wait()
            if self._failure is not None:
                raise self._failure
            if self._threaded and self._ready > self._done:
                self._changed.notify_all()  # the rest, while the caller makes use of this one

    def wait_for_ready(self) -> None:
        """Return when everything that is ready has been sent."""
        self.wait(self._ready - 1)

    def close(self) -> None:
        """End the thread; after a failure it may be waiting for another rank, and ends when that is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            self._thread = None

    def _work(self) -> None:
        with self._changed:
            while not self._closed and self._failure is None:
                if self._ready > self._done and not self._busy:
                    self._send_next()
                else:
                    self._changed.wait()

    def _send_next(self) -> None:
        """Send the next bucket; called with the lock held, which is free meanwhile."""
        self._busy = True
        failure: BaseException | None = None
        try:
            self._changed.release()
            self._send(self._done)
        except BaseException as error:
            failure = error
        finally:
            self._changed.acquire()
            self._busy, self._failure = False, failure
            self._done += failure is None
            self._changed.notify_all()
