"""A cluster in one process: ranks are threads. For tests and for debugging."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from distloop.transports.base import Transport, Work
from distloop.transports.exchange import Delay, Exchange, Ticket

Result = TypeVar("Result")


class _Sent:
    def wait(self) -> None:
        """Messages are copied when sent, so a send is complete at once."""


_SENT = _Sent()


class _Receiving:
    def __init__(self, exchange: Exchange, ticket: Ticket, into: Tensor):
        self._exchange, self._ticket, self._into = exchange, ticket, into

    def wait(self) -> None:
        message = self._exchange.take(self._ticket)
        if message.shape != self._into.shape or message.dtype != self._into.dtype:
            (source, to, _), _ = self._ticket
            raise RuntimeError(
                f"rank {to} expected {tuple(self._into.shape)} {self._into.dtype} from rank {source}, "
                f"which sent {tuple(message.shape)} {message.dtype}"
            )
        self._into.copy_(message)


class ThreadTransport(Transport):
    """One rank's end of a :class:`ThreadCluster`."""

    def __init__(self, exchange: Exchange, rank: int, *, overlaps: bool = True):
        self._exchange, self.rank, self.size = exchange, rank, exchange.size
        self.overlaps = overlaps

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        self._exchange.put((self.rank, to, tag), tensor.detach().clone())
        return _SENT

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        return _Receiving(self._exchange, self._exchange.post((source, self.rank, tag)), tensor)


class ThreadCluster:
    """Runs a function on ``size`` ranks that are threads of this process.

    Args:
        timeout: seconds after which a rank that waits in vain fails; has no effect in order.
        ordered: one rank runs at a time, until it waits for a message that is not there yet, or ends; then the next in
            cyclic order that can run. A program runs the same way every time, every rank has its own random numbers
            (torch's on the CPU, Python's, numpy's), and rank 0 is the calling thread. Ranks that wait for one another
            are found at once. Threads that a rank starts itself may not use its transport.
        delay: called with source, destination, tag and number of bytes of every message; returns the seconds after
            which it is there. Has no effect in order, where time has no part.
        failures: by rank, the number of messages that it sends before it dies: whatever it asks of its transport next
            raises :class:`RankDiedError`.
        silent: by rank, the number of messages that it sends before all others of it are lost.

    Attributes:
        errors: after :meth:`run`, what ended the ranks that failed, by rank, the first failure first.
    """

    def __init__(
        self,
        size: int,
        timeout: float = 60.0,
        *,
        ordered: bool = False,
        delay: Delay | None = None,
        failures: Mapping[int, int] | None = None,
        silent: Mapping[int, int] | None = None,
    ):
        self.size, self.timeout, self.ordered = size, timeout, ordered
        self.errors: dict[int, BaseException] = {}
        self._delay = None if ordered else delay
        self._failures, self._silent = dict(failures or {}), dict(silent or {})

    def run(self, function: Callable[[ThreadTransport], Result]) -> list[Result]:
        """Call ``function`` on every rank; return the results by rank, or raise the first failure.

        In order the process's generators are those of rank 0 afterwards.
        """
        exchange = Exchange(
            self.size,
            self.timeout,
            ordered=self.ordered,
            delay=self._delay,
            failures=self._failures,
            silent=self._silent,
        )
        results: dict[int, Result] = {}
        self.errors = exchange.errors

        def main(rank: int) -> None:
            failure: BaseException | None = None
            try:
                exchange.begin(rank)
                results[rank] = function(ThreadTransport(exchange, rank, overlaps=not self.ordered))
            except BaseException as raised:
                failure = raised
            exchange.end(rank, failure)

        first = 1 if self.ordered else 0  # in order rank 0 is this thread
        # As daemons, so that whoever interrupts the wait for them need not wait for their computing.
        threads = [
            threading.Thread(target=main, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(first, self.size)
        ]
        for thread in threads:
            thread.start()
        if self.ordered:
            main(0)
        for thread in threads:
            thread.join()
        exchange.close()
        if exchange.errors:
            raise next(iter(exchange.errors.values()))
        return [results[rank] for rank in range(self.size)]
