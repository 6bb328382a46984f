"""A fixed tree of sums: the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distloop.transports import Transport

Node = tuple[int, int]  # the first leaf below it, and how wide the tree is there: a power of two


def all_reduce(transport: Transport, tensor: Tensor) -> None:
    """Replace ``tensor`` on every rank by the sum over all ranks, added along a binary tree; 2 log2(N) (a + S/B)."""
    sum_nodes(transport, {(transport.rank, 1): tensor}, transport.size, into=tensor)


def owner(leaf: int, leaves: int, ranks: int) -> int:
    """Return the rank that has a leaf: ranks have consecutive leaves, as evenly as can be."""
    return leaf * ranks // leaves


def own_leaves(rank: int, leaves: int, ranks: int) -> range:
    """Return the leaves that :func:`owner` gives to a rank."""
    return range(-(-rank * leaves // ranks), -(-(rank + 1) * leaves // ranks))


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
    total = torch.empty_like(like)
    sum_nodes(transport, {(leaf, 1): tensor.clone() for leaf, tensor in own.items()}, leaves, into=total)
    return total


class Fold:
    """Adds up consecutive leaves as they come, along the tree of all leaves: two siblings as soon as both are there.

    What is held are the sums that wait for a sibling, two for each level of the tree at most.

    Args:
        leaves: how many there are over all ranks.
        first: the first leaf that will come.
        free: called with a tensor that has been added to another, and can be used again.
    """

    def __init__(self, leaves: int, first: int, free: Callable[[Tensor], None] | None = None):
        self.leaves, self.next = leaves, first
        self._free = free
        self._waiting: list[tuple[Node, Tensor]] = []

    def add(self, tensor: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add the next leaf, in place of a sum if there is one to add it to.

        ``keep``, if it is given, returns what to hold in place of ``tensor`` if that has to wait itself.
        """
        start, width, held = self.next, 1, tensor
        self.next += 1
        while width < self.leaves:
            if start % (2 * width) == 0:
                if start + width < self.leaves:
                    break  # its sibling has yet to come
            elif self._waiting and self._waiting[-1][0] == (start - width, width):
                (start, _), left = self._waiting.pop()
                left.add_(held)
                if held is not tensor and self._free is not None:
                    self._free(held)
                held = left
            else:
                break  # its sibling is another rank's
            width *= 2
        self._waiting.append(((start, width), keep(held) if keep is not None and held is tensor else held))

    def take(self) -> dict[Node, Tensor]:
        """Return the sums that are waiting, by their place in the tree, and forget them."""
        nodes = dict(self._waiting)
        self._waiting.clear()
        return nodes


def sum_nodes(transport: Transport, own: Mapping[Node, Tensor], leaves: int, *, into: Tensor) -> None:
    """Put the sum of all leaves into ``into`` on every rank, as :func:`sum_leaves` adds them.

    Args:
        transport: to the other ranks.
        own: this rank's leaves, or sums of them that :class:`Fold` has made of them; their contents are used up.
        leaves: how many there are over all ranks.
        into: a tensor of the leaves' shape and dtype; it may be one of them.
    """
    width = 1 << max(leaves - 1, 0).bit_length()
    root = _Sums(transport, own, leaves, into).node(0, width)
    if root is not None and root is not into:
        into.copy_(root)
    _spread(transport, into)


class _Sums:
    def __init__(self, transport: Transport, own: Mapping[Node, Tensor], leaves: int, like: Tensor):
        self._transport, self._own, self._leaves, self._like = transport, own, leaves, like
        self._incoming: Tensor | None = None

    def node(self, start: int, width: int) -> Tensor | None:
        """Return the sum of leaves ``start`` to ``start + width`` on the rank of the first of them; None elsewhere."""
        if (start, width) in self._own or width == 1:
            return self._own.get((start, width))
        half, rank = width // 2, self._transport.rank
        here, last = self._owner(start), self._owner(min(start + width, self._leaves) - 1)
        if not here <= rank <= last:
            return None
        left = self.node(start, half)
        if start + half >= self._leaves:
            return left
        right, there = self.node(start + half, half), self._owner(start + half)
        if rank == there != here:
            assert right is not None
            self._transport.send(right, here)
        if rank != here:
            return None
        if here != there:
            if self._incoming is None:
                self._incoming = torch.empty_like(self._like)
            right = self._incoming
            self._transport.recv(right, there)
        assert left is not None and right is not None
        return left.add_(right)

    def _owner(self, leaf: int) -> int:
        return owner(leaf, self._leaves, self._transport.size)


def _spread(transport: Transport, tensor: Tensor) -> None:
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
