"""The order of an epoch, as arithmetic: which sample stands at a position is computed, and no list of samples is kept.

Positions are the cells of a grid of a columns and b rows, a * b barely above the number of samples. A round turns each
row by an amount that is a hash of the row, or each column by a hash of the column (a Feistel network that adds in place
of exclusive or; Black and Rogaway 2002). A position that ends outside of the samples goes through the network again
until it ends inside, which keeps it a bijection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import isqrt
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distloop.errors import DataError

LARGEST = 2**50  # samples in an order
CLOSE = 2**20  # one in so many: how far from uniform the pairs in an order may be
FEW = 24  # positions that are sooner looked up one by one
WINDOW, WINDOW_STEPS = 2**14, 256  # positions, or global batches, that are looked up at once

Cells = npt.NDArray[np.uint64]
What = TypeVar("What")

_MASK, _GAMMA, _FIRST, _SECOND = 2**64 - 1, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_U_GAMMA, _U_FIRST, _U_SECOND, _26, _27, _30, _31, _38 = map(np.uint64, (_GAMMA, _FIRST, _SECOND, 26, 27, 30, 31, 38))


def hashed(seed: int, number: int) -> int:
    """Return 64 random-looking bits for each number under a seed (SplitMix64; Steele, Lea and Flood 2014)."""
    x = seed + number * _GAMMA & _MASK
    x = (x ^ x >> 30) * _FIRST & _MASK
    x = (x ^ x >> 27) * _SECOND & _MASK
    return x ^ x >> 31


class Order:
    """A permutation of ``range(samples)`` that depends on the seed alone, at O(1) memory and time for any position.

    Args:
        seed: any whole number of 64 bits; see :func:`distloop.data.derive_seed`.
        samples: up to 2**50.

    Raises:
        DataError: there are more samples than that.
    """

    def __init__(self, seed: int, samples: int):
        if not 0 <= samples <= LARGEST:
            raise DataError(f"the data set has {samples} samples; an order has from 0 to {LARGEST}")
        self.samples = samples
        # Turning an odd number of cells is an even permutation, so with an odd side only half of all could be reached.
        columns = max(2, (isqrt(samples) + 1) // 2 * 2)
        self._sides = columns, max(1, -(-samples // columns))
        base = hashed(seed, 1)
        self._keys = [hashed(base, number) for number in range(1, rounds(min(self._sides)) + 1)]

    def __len__(self) -> int:
        return self.samples

    def __call__(self, positions: Tensor) -> Tensor:
        """Return the index of the sample at each position; int64, any shape."""
        return self._each(positions, list(enumerate(self._keys)), 1)

    def inverse(self, indices: Tensor) -> Tensor:
        """Return the position of each sample."""
        return self._each(indices, list(enumerate(self._keys))[::-1], -1)

    def _each(self, places: Tensor, keys: Sequence[tuple[int, int]], way: int) -> Tensor:
        given = places.reshape(-1)
        if len(given) and (int(given.min()) < 0 or int(given.max()) >= self.samples):
            raise IndexError(f"an order of {self.samples} samples has no place {given.min()} or {given.max()}")
        if len(given) <= FEW:
            few = [self._one(cell, keys, way) for cell in given.tolist()]
            return torch.tensor(few, dtype=torch.int64).view(places.shape)
        found = torch.empty_like(given)
        for start in range(0, len(given), WINDOW):  # so much fits into a processor's cache
            cells = self._many(given[start : start + WINDOW].numpy().view(np.uint64), keys, way)
            while len(outside := np.flatnonzero(cells >= self.samples)):
                cells[outside] = self._many(cells[outside], keys, way)
            found[start : start + WINDOW] = torch.from_numpy(cells.view(np.int64))
        return found.view(places.shape)

    def _one(self, cell: int, keys: Sequence[tuple[int, int]], way: int) -> int:
        """As :meth:`_many` until it ends inside, but sooner done for a few."""
        while True:
            cell_at = list(divmod(cell, self._sides[1]))
            for number, key in keys:
                turned, along = number % 2, 1 - number % 2
                side = self._sides[turned]
                amount = (hashed(key, cell_at[along]) >> 26) * side >> 38
                cell_at[turned] = (cell_at[turned] + way * amount) % side
            cell = cell_at[0] * self._sides[1] + cell_at[1]
            if cell < self.samples:
                return cell

    def _many(self, cells: Cells, keys: Sequence[tuple[int, int]], way: int) -> Cells:
        sides = [np.uint64(side) for side in self._sides]
        column = cells // sides[1]
        cell_at = [column, cells - column * sides[1]]
        for number, key in keys:
            turned, along = number % 2, 1 - number % 2
            side = sides[turned]
            moved = _amount(np.uint64(key), cell_at[along], side)
            if way < 0:
                np.subtract(side, moved, out=moved)
            moved += cell_at[turned]
            cell_at[turned] = np.minimum(moved, moved - side)  # of uint64, below zero is above everything
        found: Cells = cell_at[0] * sides[1] + cell_at[1]
        return found


def rounds(side: int) -> int:
    """Return how many rounds a grid needs whose smaller side is this.

    Two rounds more leave pairs of positions closer to uniform by a factor of the smaller side (exact for sides up to 6,
    from the matrix of transitions), so small orders need more of them.
    """
    pairs, distance = 0, 1
    while distance < CLOSE:
        pairs, distance = pairs + 1, distance * max(side, 2)
    return max(8, 2 * pairs + 4)


def _amount(key: np.uint64, along: Cells, side: np.uint64) -> Cells:
    """Return by how much each line is turned, below ``side``: what the upper 38 bits of :func:`hashed` of it say."""
    x = along * _U_GAMMA
    x += key
    x ^= x >> _30
    x *= _U_FIRST
    x ^= x >> _27
    x *= _U_SECOND
    x ^= x >> _31
    x >>= _26
    x *= side
    x >>= _38
    return x


def in_order(order: Order | None, cuts: Iterable[tuple[What, list[range]]]) -> Iterator[tuple[What, list[Tensor]]]:
    """Replace ranges of positions by the indices of the samples there (None: which are the positions).

    They are looked up for many cuts at once, and never for the whole epoch.
    """
    cuts = iter(cuts)
    while window := list(_window(cuts)):
        places = [place for _, parts in window for place in parts]
        found = _positions(places)
        if order is not None:
            found = order(found)
        indices = iter(found.split([len(place) for place in places]) if places else ())
        for what, parts in window:
            yield what, [next(indices) for _ in parts]


def _window(cuts: Iterator[tuple[What, list[range]]]) -> Iterator[tuple[What, list[range]]]:
    held = 0
    for what, parts in islice(cuts, WINDOW_STEPS):
        yield what, parts
        held += sum(map(len, parts))
        if held >= WINDOW:
            return


def _positions(places: Sequence[range]) -> Tensor:
    """Return the ranges end to end."""
    sizes = np.array([len(place) for place in places], dtype=np.int64)
    starts = np.array([place.start for place in places], dtype=np.int64)
    before = np.cumsum(sizes) - sizes
    return torch.from_numpy(np.repeat(starts - before, sizes) + np.arange(sizes.sum()))
