"""The arithmetic of an epoch: how its samples are cut into global batches, ranks' parts, micro-batches and leaves."""

from __future__ import annotations

from dataclasses import dataclass

from distloop.collectives.tree import own_leaves
from distloop.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """The arithmetic of one epoch.

    Args:
        samples: number of samples N in the data set.
        global_batch_size: samples in a global batch, over all ranks.
        micro_batch_size: most samples that one rank runs at once (None: its whole share).
        leaves: parts that each global batch has whatever the number of ranks, each a micro-batch even if it is empty;
            0 where ranks cut batches.
    """

    samples: int
    global_batch_size: int
    micro_batch_size: int | None = None
    leaves: int = 0

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"data.global_batch_size: {self.global_batch_size} is too small; it must be at least 1")
        micro = self.micro_batch_size
        if micro is not None and not 1 <= micro <= self.global_batch_size:
            raise ConfigError(
                f"data.micro_batch_size: {micro} must be from 1 to data.global_batch_size ({self.global_batch_size})"
            )

    @property
    def steps(self) -> int:
        """Number of global batches in an epoch."""
        return -(-self.samples // self.global_batch_size)

    def batch(self, step: int) -> range:
        """Return the positions, in the epoch's order, of global batch ``step``."""
        start = step * self.global_batch_size
        return range(start, min(start + self.global_batch_size, self.samples))

    def part(self, step: int, rank: int, ranks: int) -> range:
        """Return the positions of global batch ``step`` that ``rank`` of ``ranks`` takes; possibly none."""
        batch = self.batch(step)
        n = len(batch)
        return batch[n * rank // ranks : n * (rank + 1) // ranks]

    def micro_batches(self, step: int, rank: int, ranks: int) -> list[range]:
        """Return the rank's part cut into micro-batches, none of them empty unless it is a leaf."""
        if self.leaves:
            own = own_leaves(rank, self.leaves, ranks)
            return [self.part(step, leaf, self.leaves) for leaf in own]
        part = self.part(step, rank, ranks)
        size = self.micro_batch_size or max(len(part), 1)
        return [part[i : i + size] for i in range(0, len(part), size)]

    def accumulation(self, ranks: int) -> int:
        """Return the most micro-batches that a rank accumulates in one step."""
        if self.leaves:
            return -(-self.leaves // ranks)
        largest = -(-min(self.global_batch_size, self.samples) // ranks)
        return -(-largest // (self.micro_batch_size or largest))
