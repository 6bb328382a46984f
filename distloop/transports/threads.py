"""A cluster in one process: ranks are threads. For tests and for debugging."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from distloop.errors import RankDiedError
from distloop.transports.base import Transport, Work

Result = TypeVar("Result")
Channel = tuple[int, int, int]  # source, destination, tag


class _Sent:
    def wait(self) -> None:
        """Messages are copied when sent, so a send is complete at once."""


class _Receiving:
    def __init__(self, cluster: ThreadCluster, ticket: tuple[Channel, int], into: Tensor):
        self._cluster, self._ticket, self._into = cluster, ticket, into

    def wait(self) -> None:
        message = self._cluster.take(self._ticket)
        if message.shape != self._into.shape or message.dtype != self._into.dtype:
            (source, to, _), _ = self._ticket
            raise RuntimeError(
                f"rank {to} expected {tuple(self._into.shape)} {self._into.dtype} from rank {source}, "
                f"which sent {tuple(message.shape)} {message.dtype}"
            )
        self._into.copy_(message)


class ThreadTransport(Transport):
    """One rank's end of a :class:`ThreadCluster`."""

    def __init__(self, cluster: ThreadCluster, rank: int):
        self.cluster, self.rank, self.size = cluster, rank, cluster.size

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        self.cluster.put((self.rank, to, tag), tensor.detach().clone())
        return _Sent()

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        return _Receiving(self.cluster, self.cluster.post((source, self.rank, tag)), tensor)


class ThreadCluster:
    """Messages between ``size`` ranks that are threads of this process."""

    def __init__(self, size: int, timeout: float = 60.0):
        self.size, self.timeout = size, timeout
        self._changed = threading.Condition()
        self._messages: dict[tuple[Channel, int], Tensor] = {}
        # The n-th receive posted on a channel gets the n-th message sent on it, in whatever order they are waited for.
        self._sent: Counter[Channel] = Counter()
        self._posted: Counter[Channel] = Counter()
        self._failed = False

    def put(self, channel: Channel, message: Tensor) -> None:
        with self._changed:
            self._messages[channel, self._sent[channel]] = message
            self._sent[channel] += 1
            self._changed.notify_all()

    def post(self, channel: Channel) -> tuple[Channel, int]:
        with self._changed:
            ticket = channel, self._posted[channel]
            self._posted[channel] += 1
            return ticket

    def take(self, ticket: tuple[Channel, int]) -> Tensor:
        (source, to, tag), _ = ticket
        with self._changed:
            in_time = self._changed.wait_for(lambda: ticket in self._messages or self._failed, self.timeout)
            if ticket in self._messages:
                return self._messages.pop(ticket)
        if in_time:
            raise RankDiedError(f"rank {to} stopped waiting for rank {source}: a rank failed")
        raise TimeoutError(f"rank {to} heard nothing from rank {source} (tag {tag}) for {self.timeout} s")

    def run(self, function: Callable[[ThreadTransport], Result]) -> list[Result]:
        """Call ``function`` on every rank at once; return the results by rank, or raise the first failure."""
        results: dict[int, Result] = {}
        failures: list[BaseException] = []

        def main(rank: int) -> None:
            try:
                results[rank] = function(ThreadTransport(self, rank))
            except BaseException as failure:
                with self._changed:
                    failures.append(failure)
                    self._failed = True
                    self._changed.notify_all()

        threads = [threading.Thread(target=main, args=(rank,), name=f"rank {rank}") for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [results[rank] for rank in range(self.size)]
