"""Two shots: every rank sums its part of the buffer, sent to it by all others, and sends the sum to all others."""

from __future__ import annotations

import torch
from torch import Tensor

from distloop.transports import Transport


def all_reduce(transport: Transport, tensor: Tensor, wire: torch.dtype | None = None) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added in rank order.

    Bitwise what adding the ranks' tensors one after the other gives, whoever arrives first. Every rank sends and
    receives 2 (N - 1)/N S bytes, the least there is, in two latencies: 2a + 2 (N - 1)/N S/B.

    Args:
        transport: to the other ranks.
        tensor: contiguous.
        wire: dtype on the wire, of fewer bits than the tensor's. Sums are taken in the tensor's own dtype; with unit
            roundoff u of ``wire`` (2**-8 for bf16) the error of an element is at most u times the sum of the ranks'
            magnitudes, plus u times that of the (already rounded) sum. All ranks get the same bits.
    """
    flat, rank, size = tensor.view(-1), transport.rank, transport.size
    parts = _split(flat, size)
    narrow = wire is not None and wire != tensor.dtype
    sent = [part.to(wire) for part in parts] if narrow else list(parts)
    rows = torch.empty((size, len(parts[rank])), dtype=sent[rank].dtype, device=tensor.device)
    peers = transport.peers()
    coming = {peer: transport.irecv(rows[peer], peer) for peer in peers}
    going = [transport.isend(sent[peer], peer) for peer in peers]
    for work in [*coming.values(), *going]:
        work.wait()
    own = add_in_rank_order(rows, parts[rank], rank)
    if narrow:
        sent[rank] = own.to(wire)
    coming = {peer: transport.irecv(sent[peer], peer) for peer in peers}
    going = [transport.isend(sent[rank], peer) for peer in peers]
    for work in [*coming.values(), *going]:
        work.wait()
    if narrow:
        for part, values in zip(parts, sent, strict=True):
            part.copy_(values)


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


def _split(flat: Tensor, size: int) -> list[Tensor]:
    """Cut a buffer into one part per rank, as even as can be; some may be empty."""
    return [flat[len(flat) * r // size : len(flat) * (r + 1) // size] for r in range(size)]
