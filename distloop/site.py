"""What a rank knows about itself, for tasks that act: its place, its transport, and seeds of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from distloop.data import derive_seed
from distloop.transports import Transport
from distloop.world import World


@dataclass
class Site:
    """Handed to ``task.join(site)`` on every rank, after the models are equal on all of them.

    What is numbered over all ranks (episodes, environments) is seeded by its number and so is the same on any number of
    ranks; what belongs to a rank is seeded by the rank.
    """

    world: World
    transport: Transport
    device: torch.device
    seed: int  # train.seed
    waited: float = 0.0  # seconds in which this rank waited for the others in :meth:`gather`

    def part(self, things: int, rank: int | None = None) -> range:
        """Return which of ``things``, numbered over all ranks, are this rank's, or ``rank``'s; possibly none."""
        rank, ranks = self.world.rank if rank is None else rank, self.world.size
        return range(things * rank // ranks, things * (rank + 1) // ranks)

    def generator(self, *labels: int | str) -> torch.Generator:
        """Return a new CPU generator whose numbers depend on ``train.seed`` and the labels alone."""
        return torch.Generator().manual_seed(self.seed_of(*labels))

    def seed_of(self, *labels: int | str) -> int:
        """Return a 63-bit seed that depends on ``train.seed`` and the labels alone."""
        return derive_seed(*labels, self.seed)

    def total(self, own: Tensor) -> Tensor:
        """Return the sum over ranks of a small CPU tensor, to the bit the same on all of them."""
        return self.gather(own).sum(0)

    def gather(self, own: Tensor) -> Tensor:
        """Return every rank's small CPU tensor, of shape (ranks, *shape); all ranks must call it."""
        begun = time.monotonic()
        rows = self.transport.all_gather(own).wait()
        self.waited += time.monotonic() - begun
        return rows
