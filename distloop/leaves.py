"""Parts of a global batch that do not depend on the number of ranks: how many, and sums over them in one order."""

from __future__ import annotations

from torch import Tensor

from distloop.collectives.tree import own_leaves
from distloop.transports import Transport


def leaves_of_at_most(micro_batch_size: int | None, leaves: int, global_batch_size: int) -> int:
    """Return ``leaves``, doubled until none is larger than ``micro_batch_size``."""
    while micro_batch_size is not None and -(-global_batch_size // leaves) > micro_batch_size:
        leaves *= 2
    return leaves


def by_leaf(own: Tensor, leaves: int, transport: Transport) -> Tensor:
    """Return a row for each leaf, with zeros for those of other ranks; one row in all where there are no leaves.

    Such rows are exact when they are added over ranks. Added over leaves after that, they are added in one order.

    Args:
        own: a row for each of this rank's micro-batches.
        leaves: parts of a global batch; 0 where ranks cut it.
        transport: to the other ranks.
    """
    if not leaves:
        return own.sum(0, keepdim=True)
    mine = own_leaves(transport.rank, leaves, transport.size)
    rows = own.new_zeros((leaves, *own.shape[1:]))
    rows[mine.start : mine.stop] = own
    return rows
