"""The order in which buckets are sent, and who sends them: a thread beside backward, or whoever waits for them."""

from __future__ import annotations

from collections.abc import Callable

from distloop.strategies.own_thread import OwnThread


class ClosedError(Exception):
    """What was waited for will not come: its strategy was closed."""


class Lane(OwnThread):
    """Runs ``send(0)``, ``send(1)``, ... one after the other, each once it is ready.

    While backward still runs, a thread of the lane's own does it. Whoever waits for a bucket that nobody has begun to
    send does it at once instead of waiting for that thread to wake up.
    """

    def __init__(self, send: Callable[[int], None], *, threaded: bool):
        super().__init__("collecting gradients")
        self._send, self._threaded = send, threaded
        self._ready = self._done = 0
        self._busy = False

    def start(self) -> None:
        """Begin a step: nothing is ready, nothing done."""
        self._ready = self._done = 0

    def ready(self, count: int, *, soon_awaited: bool = False) -> None:
        """Say that the first ``count`` buckets may be sent; ``soon_awaited``: the caller comes for them next."""
        with self._changed:
            self._ready = count
            if self._threaded and not soon_awaited:
                self._wake()
            else:
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
