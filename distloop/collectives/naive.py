"""Everyone sends to rank 0, which sums and sends back; as in the textbook, and in chunks that follow each other."""

from __future__ import annotations

import torch
from torch import Tensor

from distloop.transports import Transport, Work

CHUNK = 64 * 1024  # bytes
AHEAD = 16  # chunks that rank 0 expects from each


def all_reduce(transport: Transport, tensor: Tensor) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added in rank order.

    Rank 0 receives and then sends ``(N - 1) * S`` bytes, so the time grows with the number of ranks N: with latency a
    and bandwidth B it is 2a + 2 (N - 1) S/B. What it has for it is that anyone can check it, and that the result does
    not depend on who arrives first.
    """
    if transport.rank != 0:
        transport.send(tensor, 0)
        transport.recv(tensor, 0)
        return
    incoming = torch.empty_like(tensor)
    for source in range(1, transport.size):
        transport.recv(incoming, source)
        tensor.add_(incoming)
    for work in [transport.isend(tensor, to) for to in range(1, transport.size)]:
        work.wait()


def pipelined(transport: Transport, tensor: Tensor) -> None:
    """Do the same in chunks: while one is sent back the next comes in, so that rank 0 uses its link both ways.

    The same sums, to the bit, in 2a + (N - 1) S/B and a chunk.
    """
    chunks = tensor.view(-1).split(max(CHUNK // tensor.element_size(), 1))
    if transport.rank != 0:
        works = [transport.isend(chunk, 0) for chunk in chunks]
        for chunk, sent in zip(chunks, works, strict=True):
            sent.wait()
            transport.recv(chunk, 0)
        return
    others = range(1, transport.size)
    incoming = [[torch.empty_like(chunk) for _ in others] for chunk in chunks[:AHEAD]]
    expected = [_expect(transport, rows) for rows in incoming]
    returned = []
    for i, chunk in enumerate(chunks):
        rows = [row[: len(chunk)] for row in incoming[i % AHEAD]]
        for work, row in zip(expected[i % AHEAD], rows, strict=True):
            work.wait()
            chunk.add_(row)
        if i + AHEAD < len(chunks):
            expected[i % AHEAD] = _expect(transport, [row[: len(chunks[i + AHEAD])] for row in incoming[i % AHEAD]])
        returned += [transport.isend(chunk, to) for to in others]
    for work in returned:
        work.wait()


def _expect(transport: Transport, rows: list[Tensor]) -> list[Work]:
    return [transport.irecv(row, source) for source, row in enumerate(rows, 1)]
