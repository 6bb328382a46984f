"""An accelerator behind PCIe, emulated on the CPU: layers that take their time, and copies at a given rate."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from distloop.host_memory import allocate
from distloop.strategies.zero_offload.links import Link, Mark


class Clock:
    """A queue of work on the accelerator: each piece begins when the one before it has ended.

    The thread that gives it work waits for its end. That it comes late with the next piece, by less than the piece
    takes, costs nothing: it would have been in the queue. What it has to wait for on the accelerator itself does cost.
    """

    def __init__(self) -> None:
        self.free_at = 0.0

    def work(self, seconds: float) -> None:
        now = time.perf_counter()
        self.free_at = (now if now - self.free_at > seconds else self.free_at) + seconds
        time.sleep(max(0.0, self.free_at - time.perf_counter()))


class Copy(Mark):
    """A copy under way."""

    def __init__(self, clock: Clock, source: Tensor, to: Tensor):
        self.source, self.to = source, to
        self.ends_at = 0.0
        self.ended = threading.Event()
        self._clock = clock

    def wait(self) -> None:
        self.ended.wait()

    def reached(self) -> bool:
        return self.ended.is_set()

    def follow(self) -> None:
        self.ended.wait()
        self._clock.free_at = max(self._clock.free_at, self.ends_at)


class Engine:
    """One direction of the link: copies one after the other, ``rate`` bytes per second."""

    def __init__(self, name: str, rate: float):
        self.rate, self.copied, self.busy = rate, 0, 0.0
        self._free_at = 0.0
        self._copies: deque[tuple[Copy, float]] = deque()
        self._there = threading.Semaphore(0)
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, copy: Copy) -> Copy:
        self._copies.append((copy, time.perf_counter()))
        self._there.release()
        return copy

    def _work(self) -> None:
        while True:
            self._there.acquire()
            copy, asked_at = self._copies.popleft()
            seconds = copy.source.nbytes / self.rate
            copy.ends_at = max(self._free_at, asked_at) + seconds
            copy.to.copy_(copy.source)
            time.sleep(max(0.0, copy.ends_at - time.perf_counter()))
            self._free_at = copy.ends_at
            self.copied, self.busy = self.copied + copy.source.nbytes, self.busy + seconds
            copy.source = copy.to = torch.empty(0)
            copy.ended.set()


class EmulatedLink(Link):
    """Both directions at once, as PCIe has them."""

    def __init__(self, clock: Clock, rate: float):
        self.down_engine, self.up_engine = Engine("down", rate), Engine("up", rate)
        self._clock = clock
        self.allocated = 0  # bytes of the host

    def set_rate(self, rate: float) -> None:
        self.down_engine.rate = self.up_engine.rate = rate

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        self.allocated += numel * dtype.itemsize
        return allocate(numel, dtype)

    def down(self, source: Tensor, to: Tensor) -> Mark:
        return self.down_engine.submit(Copy(self._clock, source, to))

    def up(self, source: Tensor, to: Tensor) -> Mark:
        return self.up_engine.submit(Copy(self._clock, source, to))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:
        ctx.layer = layer
        layer.accelerator.clock.work(layer.accelerator.forward_seconds)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        accelerator = ctx.layer.accelerator
        accelerator.clock.work(accelerator.backward_seconds)
        return upstream, accelerator.gradient(ctx.layer.number), None


class Layer(nn.Module):
    """Real parameters, and the time that the accelerator takes for them."""

    def __init__(self, accelerator: Accelerator, number: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 0.5))
        self.accelerator, self.number = accelerator, number

    def forward(self, x: Tensor) -> Tensor:
        return _Layer.apply(x, self.weight, self)


class Accelerator:
    """A model of ``layers`` times ``width`` parameters, and how long its layers take.

    Gradients are stretches of one long row of random numbers, other ones in each step: nothing computes them.
    """

    STEPS = 64  # then the gradients repeat themselves

    def __init__(self, layers: int, width: int, dtype: torch.dtype):
        self.clock = Clock()
        self.forward_seconds = self.backward_seconds = 0.0
        self.step = 0
        self._width = width
        generator = torch.Generator().manual_seed(1)
        self._noise = torch.empty(width + self.STEPS * 4096, dtype=dtype).normal_(0, 0.01, generator=generator)
        self.model = nn.Sequential(*(Layer(self, i, width) for i in range(layers)))

    def gradient(self, layer: int) -> Tensor:
        start = (self.step + 7 * layer) % self.STEPS * 4096
        return self._noise[start : start + self._width]

    def set_seconds(self, seconds: float) -> None:
        """Let a step take ``seconds``: two thirds of it backward, as with most models."""
        count = len(self.model)
        self.forward_seconds, self.backward_seconds = seconds / 3 / count, seconds * 2 / 3 / count
