"""Memory of the host in which gradients wait until they are applied: as much as is needed at once."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from distloop.strategies.zero_offload.links import Link


class Stock:
    """Buffers that are taken by whoever brings gradients and given back by whoever has applied them.

    There are as many as have been in use at once: few, where shards are applied as they arrive; one for each, where
    all must have arrived before the first is applied, as for clipping by the global norm.

    Args:
        spare: bytes up to which gradients that arrive faster than they are applied get a buffer at once, so that
            backward need not wait; beyond that they wait for one to be given back.
    """

    def __init__(self, spare: int) -> None:
        self._spare, self._allocated = spare, 0
        self._changed = threading.Condition()
        self._free: dict[tuple[Link, torch.dtype, int], list[Tensor]] = {}
        self._taken = 0  # buffers
        self._streams = False

    def take(self, link: Link, dtype: torch.dtype, numel: int) -> Tensor:
        """Return a buffer, an old one if one is free or soon will be."""
        free = self._free.setdefault((link, dtype, numel), [])
        nbytes = numel * dtype.itemsize
        with self._changed:
            while not free and self._streams and self._taken and self._allocated + nbytes > self._spare:
                self._changed.wait()
            self._taken += 1
            if free:
                return free.pop()
            self._allocated += nbytes
        return link.allocate(numel, dtype)

    def give_back(self, link: Link, buffer: Tensor) -> None:
        with self._changed:
            self._taken -= 1
            self._free[link, buffer.dtype, len(buffer)].append(buffer)
            self._changed.notify_all()

    def streams(self, yes: bool) -> None:
        """Say whether every buffer that is taken will be given back before the next is needed, in another thread.

        Else it is of no use to wait for one.
        """
        with self._changed:
            self._streams = yes
            self._changed.notify_all()
