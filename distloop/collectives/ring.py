"""The ring: sums travel round once to be completed, and once more to be known everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from distloop.transports import Transport, Work

STRIPES = 8  # rings that turn at once, each over its own part of the buffer
SMALLEST = 32 * 1024  # bytes of a message below which a stripe more costs more than it hides


def all_reduce(transport: Transport, tensor: Tensor) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks.

    2 (N - 1) (a + S/(N B)): as few bytes as any (Patarasuk and Yuan, 2009), each over a link to a neighbour, but a
    latency for every step. Several rings turn at once, each over a stripe of the buffer, so that a stripe is added up
    while others are on the wire, and all-gathered as soon as it is complete. The receives of a step are posted before
    what is to be received is needed. Added in the order of the ring, which begins at another rank in each part: the
    same bits on all ranks, but not those of a sum in rank order.
    """
    size = transport.size
    if size == 1:
        return
    flat = tensor.view(-1)
    stripes = [_Stripe(transport, part) for part in flat.chunk(_count(flat, size))]
    for step in range(2 * (size - 1)):
        for stripe in stripes:
            stripe.turn(step)
    for stripe in stripes:
        stripe.finish()


class _Stripe:
    """One ring."""

    def __init__(self, transport: Transport, part: Tensor):
        self._transport, self._rank, self._size = transport, transport.rank, transport.size
        self._parts = [part[len(part) * r // self._size : len(part) * (r + 1) // self._size] for r in range(self._size)]
        self._incoming = torch.empty_like(max(self._parts, key=len))
        self._works: list[Work] = []
        self._send(0)
        self._expect(0)

    def turn(self, step: int) -> None:
        """Take what step ``step`` brings, and pass it on."""
        self._expected.wait()
        if step < self._size - 1:
            part = self._part(step + 1)
            part += self._incoming[: len(part)]
        if step + 1 < 2 * (self._size - 1):
            self._expect(step + 1)
            self._send(step + 1)

    def finish(self) -> None:
        for work in self._works:
            work.wait()

    def _part(self, step: int) -> Tensor:
        """Return the part that this rank sends at ``step``, which is the one that it got at the step before."""
        return self._parts[(self._rank - step) % self._size]

    def _send(self, step: int) -> None:
        self._works.append(self._transport.isend(self._part(step), (self._rank + 1) % self._size))

    def _expect(self, step: int) -> None:
        part = self._part(step + 1)
        into = self._incoming[: len(part)] if step < self._size - 1 else part
        self._expected = self._transport.irecv(into, (self._rank - 1) % self._size)


def _count(flat: Tensor, size: int) -> int:
    return max(1, min(STRIPES, flat.nbytes // (size * SMALLEST)))
