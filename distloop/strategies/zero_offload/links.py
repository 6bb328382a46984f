"""The way between the device, where the model is, and the host, where it is updated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from distloop.host_memory import allocate


class Mark:
    """A point in what the device has been given to do. This one has been reached."""

    def wait(self) -> None:
        """Return when the device has come to it."""

    def follow(self) -> None:
        """Let what the caller gives the device from now on begin after it."""

    def reached(self) -> bool:
        """Return whether the device has come to it, as far as is known without waiting."""
        return True


REACHED = Mark()


class Link(ABC):
    """Copies between device and host; each call returns at once with the mark of its end."""

    direct = False  # whether the host's memory is the device's, so that nothing need be copied

    def mark(self) -> Mark:
        """Return the mark of all that the caller has given the device so far."""
        return REACHED

    def sending(self, after: Mark) -> AbstractContextManager[object]:
        """Return the context in which collectives on the device's memory follow ``after``."""
        after.wait()
        return nullcontext()

    @abstractmethod
    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return memory of the host."""

    def keep(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return memory of the host for what stays there: masters."""
        return self.allocate(numel, dtype)

    @abstractmethod
    def down(self, source: Tensor, to: Tensor) -> Mark:
        """Copy from the device to the host, in the order of the context that :meth:`sending` makes."""

    @abstractmethod
    def up(self, source: Tensor, to: Tensor) -> Mark:
        """Copy from the host to the device."""


class Direct(Link):
    """Model and optimizer in the same memory: on a CPU, or on the device for what stays there."""

    direct = True

    def __init__(self, device: torch.device):
        self._device = device

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        if self._device.type == "cpu":
            return allocate(numel, dtype)
        return torch.empty(numel, dtype=dtype, device=self._device)

    def down(self, source: Tensor, to: Tensor) -> Mark:
        to.copy_(source)
        return REACHED

    def up(self, source: Tensor, to: Tensor) -> Mark:
        to.copy_(source)
        return REACHED


class _Event(Mark):
    def __init__(self, event: torch.cuda.Event):
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()

    def follow(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def reached(self) -> bool:
        return bool(self._event.query())


class Cuda(Link):
    """A GPU behind PCIe: page-locked memory, and a stream for each direction so that both are used at once.

    Not run on a GPU so far (docs/zero.md).
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._sending, self._down, self._up = (torch.cuda.Stream(device) for _ in range(3))

    def mark(self) -> Mark:
        return _Event(torch.cuda.current_stream(self._device).record_event())

    def sending(self, after: Mark) -> AbstractContextManager[object]:
        context = torch.cuda.stream(self._sending)
        with context:
            after.follow()
        return context

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return allocate(numel, dtype, pinned=True)

    def down(self, source: Tensor, to: Tensor) -> Mark:
        return self._copy(self._down, source, to, self.mark())

    def up(self, source: Tensor, to: Tensor) -> Mark:
        return self._copy(self._up, source, to, REACHED)

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, to: Tensor, after: Mark) -> Mark:
        with torch.cuda.stream(stream):
            after.follow()
            to.copy_(source, non_blocking=True)
            return self.mark()


def link_to(device: torch.device) -> Link:
    """Return the way from here to a device."""
    return Cuda(device) if device.type == "cuda" else Direct(device)
