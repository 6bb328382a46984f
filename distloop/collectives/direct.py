"""Two shots: every rank sums its part of the buffer, sent to it by all others, and sends the sum to all others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distloop.transports import Transport, Work

MESSAGE = 256 * 1024  # bytes of a message on the wire: large buffers go in segments of so much to each rank
MANY = 32  # segments
LAG = 3  # segments that are sent before the first is finished


def all_reduce(transport: Transport, tensor: Tensor, wire: torch.dtype | None = None) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added in rank order.

    Bitwise what adding the ranks' tensors one after the other gives, whoever arrives first. Every rank sends and
    receives 2 (N - 1)/N S bytes, the least there is, in two latencies: 2a + 2 (N - 1)/N S/B. A large buffer goes in
    segments, so that one is added up while others are on the wire.

    Args:
        transport: to the other ranks.
        tensor: contiguous.
        wire: dtype on the wire, of fewer bits than the tensor's. Sums are taken in the tensor's own dtype; with unit
            roundoff u of ``wire`` (2**-8 for bf16) the error of an element is at most u times the sum of the ranks'
            magnitudes, plus u times that of the (already rounded) sum. All ranks get the same bits.
    """
    flat, size = tensor.view(-1), transport.size
    narrow = wire if wire is not None and wire != tensor.dtype else None
    count = segments_of(len(flat) * (narrow or tensor.dtype).itemsize // size)
    in_stages([Segment(transport, part, narrow, alone=count > 1) for part in flat.chunk(count)])


def segments_of(nbytes: int) -> int:
    """Return in how many segments to send a message of ``nbytes`` to each rank."""
    return max(1, min(MANY, round(nbytes / MESSAGE)))


class Staged(Protocol):
    """A part of an all-reduce, in three stages."""

    def scatter(self) -> None: ...
    def reduce(self) -> None: ...
    def finish(self) -> None: ...


def in_stages(segments: Sequence[Staged]) -> None:
    """Do segments side by side: while one is added up another is on the wire, in the same order on every rank."""
    count = len(segments)
    for i in range(count + LAG):  # each stage on a segment of its own, so that none waits for what has just been sent
        if i < count:
            segments[i].scatter()
        if 1 <= i <= count:
            segments[i - 1].reduce()
        if i >= LAG:
            segments[i - LAG].finish()


class Segment:
    """A stretch of the buffer, summed and sent back while the next is on its way.

    ``alone``: send to one rank after the other, each beginning with the one behind it, so that every link carries one
    message at a time; all to all at once get into each other's way (measured: 90 % of the wire in place of 98).
    """

    def __init__(self, transport: Transport, flat: Tensor, wire: torch.dtype | None, *, alone: bool):
        self._transport, self._wire, self._alone = transport, wire, alone and transport.eager
        n, size = len(flat), transport.size
        self._parts = [flat[n * r // size : n * (r + 1) // size] for r in range(size)]  # by the rank that sums them
        self._sent = self._parts
        self._works: list[Work] = []

    def scatter(self) -> None:
        """Send every rank its part, and expect this rank's from every other."""
        transport, own = self._transport, self._parts[self._transport.rank]
        if self._wire is not None:
            self._sent = [part.to(self._wire) for part in self._parts]
        self._rows = torch.empty((transport.size, len(own)), dtype=self._sent[0].dtype, device=own.device)
        self._works = [transport.irecv(self._rows[peer], peer) for peer in transport.peers()]
        for peer in transport.peers():
            self._send(self._sent[peer], peer)

    def reduce(self) -> None:
        """Sum this rank's part, send it to every other, and expect theirs."""
        transport = self._transport
        self._wait()
        rank = transport.rank
        own = add_in_rank_order(self._rows, self._parts[rank], rank)
        if self._wire is not None:
            self._sent[rank] = own.to(self._wire)
        self._works = [transport.irecv(self._sent[peer], peer) for peer in transport.peers()]
        for peer in transport.peers():
            self._send(self._sent[rank], peer)

    def finish(self) -> None:
        self._wait()
        if self._wire is not None:
            for part, values in zip(self._parts, self._sent, strict=True):
                part.copy_(values)

    def _send(self, tensor: Tensor, to: int) -> None:
        work = self._transport.isend(tensor, to)
        if self._alone:
            work.wait()
        else:
            self._works.append(work)

    def _wait(self) -> None:
        for work in self._works:
            work.wait()


def one_shot(transport: Transport, tensor: Tensor, wire: torch.dtype | None = None) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added in rank order; each sends all to all.

    One latency, and (N - 1) S bytes: a + (N - 1) S/B, best where latency is what costs. With ``wire`` each rank's part
    of the sum is rounded once, this rank's own too: the error is at most u times the sum of magnitudes.
    """
    flat, rank = tensor.view(-1), transport.rank
    narrow = wire is not None and wire != tensor.dtype
    sent = flat.to(wire) if narrow else flat
    rows = torch.empty((transport.size, len(flat)), dtype=sent.dtype, device=tensor.device)
    peers = transport.peers()
    works = [transport.irecv(rows[peer], peer) for peer in peers]
    works += [transport.isend(sent, peer) for peer in peers]
    for work in works:
        work.wait()
    if narrow:
        flat.copy_(sent)
    add_in_rank_order(rows, flat, rank)


def add_in_rank_order(rows: Tensor, own: Tensor, rank: int) -> Tensor:
    """Set ``own``, which counts as row ``rank``, to the sum of all rows, added in rank order; return it."""
    if rank == 0:
        total = own
    else:
        total = rows[0].to(own.dtype)  # its own memory, or a row that nobody needs any more
        for row in rows[1:rank]:
            total += row
        own.copy_(total.add_(own))
    for row in rows[rank + 1 :]:
        own += row
    return own
