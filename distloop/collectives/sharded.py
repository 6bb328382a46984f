"""The two halves of an all-reduce by themselves, for those who own a part of the sum: reduce-scatter and all-gather."""

from __future__ import annotations

import torch
from torch import Tensor

from distloop.collectives.direct import add_in_rank_order, in_stages, segments_of
from distloop.transports import Shared, Transport, Work

LINES = 64  # elements: ranks that share memory cut a buffer at multiples of it


def unit(numel: int, size: int) -> int:
    """Return the number of which the length of a buffer of about ``numel`` elements must be a multiple.

    So that all parts are of one size, as NCCL wants them, and large ones begin where shared memory cuts them.
    """
    return size * LINES if numel >= size * LINES else size


def reduce_scatter(transport: Transport, flat: Tensor, out: Tensor) -> None:
    """Set ``out`` to this rank's part of the sum of ``flat`` over all ranks; ``flat`` may be used for it.

    Between CPUs added in rank order, in the precision of ``out``, which may be higher than that of ``flat``. A rank
    sends and receives (N - 1)/N S bytes, in one latency.

    Args:
        transport: to the other ranks.
        flat: contiguous; its length is a multiple of the number of ranks.
        out: a part: the first for rank 0, and so on.
    """
    shared = _shared(transport, flat)
    if shared is not None:
        out.copy_(shared.reduce_scatter(flat))
        shared.barrier()  # nobody fills the buffer again while another still adds from it
    elif flat.is_cuda:
        _of_library(transport, flat, out)
    else:
        parts = flat.chunk(transport.size)
        count = segments_of(parts[0].nbytes)
        pieces = zip(*(part.chunk(count) for part in parts), strict=True)
        in_stages([_Sum(transport, p, o) for p, o in zip(pieces, out.chunk(count), strict=True)])


def all_gather(transport: Transport, flat: Tensor) -> None:
    """Complete ``flat``, of which this rank has filled its own part, by those of the other ranks."""
    shared = _shared(transport, flat)
    if shared is not None:
        shared.all_gather(flat)
    elif flat.is_cuda:
        import torch.distributed as dist

        own = flat.chunk(transport.size)[transport.rank]
        dist.all_gather_into_tensor(flat, own, group=transport.process_group())
    else:
        parts = flat.chunk(transport.size)
        pieces = zip(*(part.chunk(segments_of(parts[0].nbytes)) for part in parts), strict=True)
        in_stages([_Share(transport, p) for p in pieces])


def _shared(transport: Transport, flat: Tensor) -> Shared | None:
    """Return the memory that all ranks share, if ``flat`` lies in it and is cut there as it is here."""
    shared = transport.shared
    if shared is None or len(shared.ranks) < transport.size or len(flat) % (transport.size * LINES):
        return None
    return shared if flat.dtype.itemsize >= 4 and not flat.is_cuda and shared.holds(flat) else None


def _of_library(transport: Transport, flat: Tensor, out: Tensor) -> None:
    import torch.distributed as dist

    own = out if out.dtype == flat.dtype else torch.empty_like(out, dtype=flat.dtype)
    dist.reduce_scatter_tensor(own, flat, group=transport.process_group())
    if own is not out:
        out.copy_(own)


class _Sum:
    """A stretch of every rank's part: each sends the others theirs and adds up its own."""

    def __init__(self, transport: Transport, parts: tuple[Tensor, ...], out: Tensor):
        self._transport, self._parts, self._out = transport, parts, out
        self._works: list[Work] = []

    def scatter(self) -> None:
        transport, own = self._transport, self._parts[self._transport.rank]
        self._rows = torch.empty((transport.size, len(own)), dtype=own.dtype)
        self._works = [transport.irecv(self._rows[peer], peer) for peer in transport.peers()]
        self._works += [transport.isend(self._parts[peer], peer) for peer in transport.peers()]

    def reduce(self) -> None:
        for work in self._works:
            work.wait()
        rank = self._transport.rank
        self._out.copy_(self._parts[rank])
        add_in_rank_order(self._rows, self._out, rank)

    def finish(self) -> None:
        del self._rows


class _Share:
    """A stretch of every rank's part: each sends its own to all others."""

    def __init__(self, transport: Transport, parts: tuple[Tensor, ...]):
        self._transport, self._parts = transport, parts
        self._works: list[Work] = []

    def scatter(self) -> None:
        transport = self._transport
        self._works = [transport.irecv(self._parts[peer], peer) for peer in transport.peers()]
        self._works += [transport.isend(self._parts[transport.rank], peer) for peer in transport.peers()]

    def reduce(self) -> None: ...

    def finish(self) -> None:
        for work in self._works:
            work.wait()
