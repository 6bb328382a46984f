"""A cluster in one process: ranks are threads and messages are queues. For tests and for debugging."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from distloop.errors import RankDiedError
from distloop.transports.base import Transport, Work

Result = TypeVar("Result")


class _Sent:
    def wait(self) -> None:
        """Messages are copied when sent, so a send is complete at once."""


class _Receiving:
    def __init__(self, cluster: ThreadCluster, key: tuple[int, int, int], into: Tensor):
        self._cluster, self._key, self._into = cluster, key, into

    def wait(self) -> None:
        message = self._cluster.take(self._key)
        if message.shape != self._into.shape or message.dtype != self._into.dtype:
            source, to, _ = self._key
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
        return _Receiving(self.cluster, (source, self.rank, tag), tensor)


class ThreadCluster:
    """Message queues for ``size`` ranks that are threads of this process."""

    def __init__(self, size: int, timeout: float = 60.0):
        self.size, self.timeout = size, timeout
        self._lock = threading.Lock()
        self._queues: defaultdict[tuple[int, int, int], queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)
        self._failed = threading.Event()

    def put(self, key: tuple[int, int, int], message: Tensor) -> None:
        self._queue(key).put(message)

    def take(self, key: tuple[int, int, int]) -> Tensor:
        source, to, tag = key
        messages = self._queue(key)
        # Wake up now and then to see whether a rank failed: a queue has no other way to learn it.
        for _ in range(max(1, int(self.timeout / 0.05))):
            try:
                return messages.get(timeout=0.05)
            except queue.Empty:
                if self._failed.is_set():
                    raise RankDiedError(f"rank {to} stopped waiting for rank {source}: a rank failed") from None
        raise TimeoutError(f"rank {to} heard nothing from rank {source} (tag {tag}) for {self.timeout} s")

    def run(self, function: Callable[[ThreadTransport], Result]) -> list[Result]:
        """Call ``function`` on every rank at once; return the results by rank, or raise the first failure."""
        results: dict[int, Result] = {}
        failures: list[BaseException] = []

        def main(rank: int) -> None:
            try:
                results[rank] = function(ThreadTransport(self, rank))
            except BaseException as failure:
                with self._lock:
                    failures.append(failure)
                self._failed.set()

        threads = [threading.Thread(target=main, args=(rank,), name=f"rank {rank}") for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [results[rank] for rank in range(self.size)]

    def _queue(self, key: tuple[int, int, int]) -> queue.SimpleQueue[Tensor]:
        with self._lock:
            return self._queues[key]
