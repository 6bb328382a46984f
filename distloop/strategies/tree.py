"""Gradients added leaf by leaf along one tree: the same bits on any number of ranks."""

from __future__ import annotations

from functools import partial
from itertools import count

import torch
from torch import Tensor

from distloop.collectives.tree import Fold, own_leaves, sum_nodes
from distloop.errors import ConfigError, WorldError
from distloop.strategies.all_reduce import BucketedAllReduce
from distloop.strategies.base import Options, Parameters
from distloop.strategies.buckets import Capacity
from distloop.transports import Transport


class Tree(BucketedAllReduce):
    """Every global batch has the same leaves, of which each rank has consecutive ones, and each backward is the next.

    Two siblings are added as soon as both are there, so that a rank holds two sums for each level of the tree and not
    one for each of its leaves; after the final backward the ranks add what is left along the same tree.

    Raises:
        WorldError: there are more ranks than leaves.
    """

    def __init__(self, parameters: Parameters, transport: Transport, options: Options):
        refuse_more_ranks(transport.size, options.leaves)
        own = own_leaves(transport.rank, options.leaves, transport.size)
        self.leaves, self.leaf, self._own = options.leaves, own.start, own
        self.about = f"{options.leaves} leaves added along one tree: the same bits on 1 to {options.leaves} ranks"
        capacity = Capacity(options.bucket_bytes(parameters))
        numbers = count()
        super().__init__(
            parameters, transport, options, lambda _: ("tree", partial(self._add_up, next(numbers))), capacity
        )
        self._spare: list[list[Tensor]] = [[] for _ in self.buckets]
        self._folds = [Fold(self.leaves, own.start, free=spare.append) for spare in self._spare]

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        if final != (self.leaf + 1 == self._own.stop):
            raise ConfigError(
                f"rank {self.transport.rank} has {len(self._own)} of the {self.leaves} leaves of a global batch, and "
                f"{'no more than' if final else 'more than'} {self.leaf + 1 - self._own.start} backward passes"
            )
        super().backward(loss, weight, final=final)
        if final:
            return  # buckets have left, or leave, one by one
        self.leaf += 1
        for i, bucket in enumerate(self.buckets):
            bucket.check()
            self._folds[i].add(bucket.flat, keep=partial(self._copy, i))
            bucket.flat.zero_()

    def settle(self) -> None:
        super().settle()
        self.leaf = self._own.start

    def _add_up(self, i: int, transport: Transport, flat: Tensor) -> None:
        """Add this rank's last leaf to its others, and all ranks' sums to each other."""
        fold = self._folds[i]
        fold.add(flat)
        nodes = fold.take()
        sum_nodes(transport, nodes, self.leaves, into=flat)
        self._spare[i] += [held for held in nodes.values() if held is not flat]
        fold.next = self._own.start

    def _copy(self, i: int, flat: Tensor) -> Tensor:
        held = self._spare[i].pop() if self._spare[i] else torch.empty_like(flat)
        return held.copy_(flat)


def refuse_more_ranks(ranks: int, leaves: int) -> None:
    """Raise WorldError if some ranks would have no leaf."""
    if ranks > leaves:
        raise WorldError(
            f"train.leaves: {leaves} parts of a global batch are too few for {ranks} ranks; start at most {leaves}, or "
            "set it higher, which gives other bits",
            everywhere=True,
        )
