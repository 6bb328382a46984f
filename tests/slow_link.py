"""A device that is apart from the host, in memory and in time, for tests of what travels between them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from distloop.strategies.zero_offload.links import Link, Mark


class Later(Mark):
    def __init__(self, future: Future[None]):
        self._future = future

    def wait(self) -> None:
        self._future.result()

    follow = wait


class SlowLink(Link):
    """Copies by a thread for each direction, each after a random while; what is read too early is NaN."""

    def __init__(self, seconds: float = 1e-3, seed: int = 0):
        self._seconds, self._random = seconds, random.Random(seed)
        self._down, self._up = (ThreadPoolExecutor(1) for _ in range(2))
        self.copied = 0
        self.allocated = 0
        self._lock = threading.Lock()

    def sending(self, after: Mark) -> AbstractContextManager[object]:
        after.wait()
        return nullcontext()

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        with self._lock:
            self.allocated += numel * dtype.itemsize
        return torch.full((numel,), float("nan"), dtype=dtype)

    def down(self, source: Tensor, to: Tensor) -> Mark:
        to.fill_(float("nan"))
        return self._later(self._down, lambda: to.copy_(source))

    def up(self, source: Tensor, to: Tensor) -> Mark:
        return self._later(self._up, lambda: to.copy_(source))

    def _later(self, direction: ThreadPoolExecutor, copy: Callable[[], Tensor]) -> Mark:
        with self._lock:
            seconds = self._random.uniform(0, self._seconds)

        def work() -> None:
            time.sleep(seconds)
            copy()
            self.copied += 1

        return Later(direction.submit(work))
