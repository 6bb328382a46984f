"""The textbook all-reduce: everyone sends to rank 0, which sums and sends back."""

from __future__ import annotations

import torch
from torch import Tensor

from distloop.transports import Transport


def all_reduce(transport: Transport, tensor: Tensor) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added in rank order.

    Rank 0 receives and sends ``(N - 1) * S`` bytes each, so the time grows with the number of ranks N; what it has
    for it is that anyone can check it, and that the result does not depend on who arrives first.
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
