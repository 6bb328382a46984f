"""Global batches out of samples of which each rank has its own, and however many: 0, 1, 7 and 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from distloop.data import Assembly, Cut, Position, derive_seed
from distloop.errors import ConfigError, DataError
from distloop.order import Order, in_order
from distloop.plan import Plan
from distloop.world import World


@dataclass(frozen=True)
class PerRank:
    """What a task's ``collect`` returns if each rank collected samples of its own.

    Args:
        samples: a map-style data set of this rank's samples; it may be empty, or None.
        passes: how often all samples of all ranks are gone through.
    """

    samples: Any
    passes: int = 1

    def __post_init__(self) -> None:
        if type(self.passes) is not int or self.passes < 1:
            raise ConfigError(f"PerRank: passes {self.passes!r} must be a whole number, at least 1")


class UnevenBatches(Assembly):
    """Every rank's own samples in global batches: each sample once per pass, and the weights known before any backward.

    All samples of all ranks are put in one order, in which rank r's j-th sample of n stands at (j + 1/2) / n, so that
    each global batch takes from every rank in proportion.

    Args:
        own: this rank's.
        counts: how many samples each rank has.
        options: see :class:`distloop.data.Assembly`.

    Raises:
        DataError: no rank has a sample.
    """

    def __init__(
        self,
        own: PerRank,
        counts: Sequence[int],
        *,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        **options: Any,
    ):
        if not sum(counts):
            raise DataError("no rank collected anything", everywhere=True)
        Plan(1, global_batch_size, micro_batch_size)  # checks the sizes
        self.counts, self.passes = list(counts), own.passes
        self.steps = own.passes * -(-sum(counts) // global_batch_size)  # in an epoch
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        super().__init__(own.samples, **options)

    def cuts(self, epoch: int, world: World, start: int = 0) -> Iterator[Cut]:
        own = self.counts[world.rank]
        sizes, counts = interleave(self.counts, world.rank, self._global_batch_size)
        for number in range(start // len(sizes), self.passes):
            seed = derive_seed("order", derive_seed("own", self.seed, world.rank, number), epoch)
            order = Order(seed, own) if self.shuffle else None
            yield from in_order(order, islice(self._parts(number, sizes, counts), start % len(sizes), None))
            start = 0

    def draws(self, epoch: int, world: World, position: Position) -> int:
        number = position.batch * self.passes // self.steps
        return derive_seed("samples", derive_seed("own", self.seed, world.rank, number), epoch)

    def _parts(self, number: int, sizes: list[int], counts: list[int]) -> Iterator[tuple[Position, list[range]]]:
        """Yield the positions of each global batch of a pass in this rank's order, as micro-batches."""
        end = 0
        for step, (size, count) in enumerate(zip(sizes, counts, strict=True), number * len(sizes)):
            begin, end = end, end + count
            micro = self._micro_batch_size or max(count, 1)
            parts = [range(i, min(i + micro, end)) for i in range(begin, end, micro)]
            yield Position(step, size, step == self.steps - 1), parts


def interleave(counts: list[int], rank: int, global_batch_size: int) -> tuple[list[int], list[int]]:
    """Return the sizes of all global batches, and how many samples of each are ``rank``'s."""
    places = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / max(n, 1) for n in counts])
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mine: Tensor = owners[places.sort(stable=True).indices] == rank
    batches = mine.split(global_batch_size)
    return [len(batch) for batch in batches], [int(batch.sum()) for batch in batches]
