"""On each host in shared memory, and between hosts over the network: only what must crosses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from distloop.collectives import direct
from distloop.transports import Transport, Work
from distloop.transports.base import Shared

ONE_SHOT = 16 * 1024  # bytes below which latency is what costs between hosts


def all_reduce(transport: Transport, tensor: Tensor, wire: torch.dtype | None = None) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, host by host and in rank order on each.

    The ranks of a host sum a part each; then the ranks of equal place on their hosts sum theirs over the hosts; then
    the ranks of a host show each other their parts. With H hosts of L ranks, each host's link carries 2 (H - 1)/H S
    bytes each way in two latencies (one if H is 2), where a ring through all ranks needs 2 (N - 1)/N S in 2 (N - 1).

    Without shared memory, or with unlike numbers of ranks on the hosts, it is :func:`direct.all_reduce`.
    """
    shared = transport.shared
    if shared is None or len(set(Counter(transport.hosts).values())) > 1:
        direct.all_reduce(transport, tensor, wire)
        return
    across, flat = Group(transport, _counterparts(transport)), tensor.view(-1)
    narrow = wire if wire is not None and wire != tensor.dtype else None
    # Only where a send does not wait for its receiver: that one may be waiting for a rank of its host meanwhile.
    if across.eager and shared.holds(flat):
        width = (narrow or tensor.dtype).itemsize
        count = direct.segments_of(len(flat) * width // (len(shared.ranks) * across.size))
        if count > 1:
            direct.in_stages([_Piece(across, shared, piece, narrow) for piece in flat.chunk(count)])
            return
    for piece in shared.pieces(flat):
        own = shared.reduce_scatter(piece)
        if across.size > 1 and len(own):
            small = across.size == 2 or own.nbytes <= ONE_SHOT
            (direct.one_shot if small else direct.all_reduce)(across, own, wire)
        shared.all_gather(piece)


class _Piece:
    """A part of the buffer, on its way between hosts while others are summed and shown within them."""

    def __init__(self, across: Group, shared: Shared, piece: Tensor, wire: torch.dtype | None):
        self._across, self._shared, self._piece, self._wire = across, shared, piece, wire

    def scatter(self) -> None:
        own = self._shared.reduce_scatter(self._piece)
        self._segment = direct.Segment(self._across, own, self._wire, alone=True)
        self._segment.scatter()

    def reduce(self) -> None:
        self._segment.reduce()

    def finish(self) -> None:
        self._segment.finish()
        self._shared.all_gather(self._piece)


def in_shared_memory(transport: Transport, tensor: Tensor) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added in rank order where it lies.

    For ranks of one host; each sums a part of the buffer over all ranks' memory, which it reads once and writes once:
    2 N S/M for a memory bandwidth of M. Over several hosts it is :func:`all_reduce`.
    """
    if transport.shared is None or len(transport.shared.ranks) < transport.size:
        all_reduce(transport, tensor)
    else:
        transport.shared.all_reduce(tensor)


class Group(Transport):
    """Some of a transport's ranks, numbered from 0."""

    def __init__(self, transport: Transport, ranks: Sequence[int]):
        self._transport, self._ranks, self.eager = transport, list(ranks), transport.eager
        self.rank, self.size = self._ranks.index(transport.rank), len(self._ranks)

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        return self._transport.isend(tensor, self._ranks[to], tag)

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        return self._transport.irecv(tensor, self._ranks[source], tag)


def _counterparts(transport: Transport) -> list[int]:
    """Return the ranks that have this one's place among the ranks of their host, by host."""
    seen: Counter[int] = Counter()
    places = []
    for host in transport.hosts:
        places.append(seen[host])
        seen[host] += 1
    return [rank for rank, place in enumerate(places) if place == places[transport.rank]]
