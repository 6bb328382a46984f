"""Global batches out of samples of which each rank has its own, and however many: 0, 1, 7 and 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distloop.data import Assembly, Cut, Plan, Position, derive_seed, permutation
from distloop.errors import ConfigError, DataError
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
        if self.passes < 1:
            raise ConfigError(f"PerRank: passes {self.passes} is too small; it must be at least 1")

    def __len__(self) -> int:
        return 0 if self.samples is None else len(self.samples)


class UnevenBatches(Assembly):
    """Every rank's own samples in global batches: each sample once per pass, and the weights known before any backward.

    All samples of all ranks are put in one order, in which rank r's j-th sample of n stands at (j + 1/2) / n, so that
    each global batch takes from every rank in proportion. One small all-gather of the numbers of samples per epoch
    settles it.
    """

    def __init__(self, own: PerRank, *, global_batch_size: int, micro_batch_size: int | None = None, **options: Any):
        self._own, self._passes = len(own), own.passes
        Plan(1, global_batch_size, micro_batch_size)  # checks the sizes
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        super().__init__(own.samples, **options)

    def cuts(self, epoch: int, world: World) -> Iterator[Cut]:
        """Yield this rank's part of each global batch.

        Raises:
            DataError: no rank has a sample (found by all).
        """
        counts = self._transport.all_gather(torch.tensor([self._own], dtype=torch.int64)).wait()[:, 0].tolist()
        sizes, parts = shares(counts, world.rank, self._global_batch_size)
        if not sizes:
            raise DataError(f"no rank collected anything in epoch {epoch + 1}", everywhere=True)
        for number in range(self._passes):
            order = torch.arange(self._own)
            if self.shuffle:
                order = permutation(derive_seed("own", self.seed, world.rank, number), epoch, self._own)
            for step, (size, part) in enumerate(zip(sizes, order.split(parts), strict=True)):
                last = number == self._passes - 1 and step == len(sizes) - 1
                pieces = part.split(self._micro_batch_size or max(len(part), 1)) if len(part) else ()
                yield Position(number * len(sizes) + step, size, last), list(pieces)


def shares(counts: list[int], rank: int, global_batch_size: int) -> tuple[list[int], list[int]]:
    """Return the sizes of all global batches, and how many samples of each are ``rank``'s."""
    total = sum(counts)
    places = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / max(n, 1) for n in counts])
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    mine: Tensor = owners[places.sort(stable=True).indices] == rank
    batches = mine.split(global_batch_size) if total else ()
    return [len(batch) for batch in batches], [int(batch.sum()) for batch in batches]
