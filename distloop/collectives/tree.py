"""A fixed tree of sums: the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distloop.transports import Transport


def all_reduce(transport: Transport, tensor: Tensor) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added along a binary tree; 2 log2(N) (a + S/B)."""
    tensor.copy_(sum_leaves(transport, {transport.rank: tensor}, transport.size, like=tensor))


def owner(leaf: int, leaves: int, ranks: int) -> int:
    """Return the rank that has a leaf: ranks have consecutive leaves, as evenly as can be."""
    return leaf * ranks // leaves


def sum_leaves(transport: Transport, own: Mapping[int, Tensor], leaves: int, *, like: Tensor) -> Tensor:
    """Return, on every rank, the sum of ``leaves`` tensors, of which this rank has those that :func:`owner` says.

    They are added pairwise along one binary tree: ``((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))``. The tree depends on
    the number of leaves alone, so the result has the same bits on any number of ranks.

    Args:
        transport: to the other ranks.
        own: this rank's leaves, by number; they are left as they are.
        leaves: how many there are over all ranks.
        like: a tensor of the leaves' shape and dtype, for ranks that have none.
    """
    width = 1 << max(leaves - 1, 0).bit_length()
    root = _Sums(transport, own, leaves, like).node(0, width)
    if root is None:
        root = torch.empty_like(like)
    return _spread(transport, root)


class _Sums:
    def __init__(self, transport: Transport, own: Mapping[int, Tensor], leaves: int, like: Tensor):
        self._transport, self._own, self._leaves, self._like = transport, own, leaves, like

    def node(self, start: int, width: int) -> Tensor | None:
        """Return the sum of leaves ``start`` to ``start + width`` on the rank of the first of them; None elsewhere."""
        if width == 1:
            return self._own.get(start)
        half = width // 2
        left = self.node(start, half)
        if start + half >= self._leaves:
            return left
        right = self.node(start + half, half)
        here, there, rank = self._owner(start), self._owner(start + half), self._transport.rank
        if rank == there != here:
            assert right is not None
            self._transport.send(right, here)
        if rank != here:
            return None
        if here != there:
            right = torch.empty_like(self._like)
            self._transport.recv(right, there)
        assert left is not None and right is not None
        return left + right

    def _owner(self, leaf: int) -> int:
        return owner(leaf, self._leaves, self._transport.size)


def _spread(transport: Transport, tensor: Tensor) -> Tensor:
    """Give rank 0's tensor to all, along a binary tree: each rank to one as far away as it is itself, then half."""
    rank, size = transport.rank, transport.size
    step = 1 << max(size - 1, 0).bit_length()
    works = []
    while step := step // 2:
        if rank % (2 * step) == 0 and rank + step < size:
            works.append(transport.isend(tensor, rank + step))
        elif rank % (2 * step) == step:
            transport.recv(tensor, rank - step)
    for work in works:
        work.wait()
    return tensor
