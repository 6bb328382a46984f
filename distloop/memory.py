"""Replay memory: a ring buffer of tensors (Lin 1992), sampled by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distloop.data import derive_seed
from distloop.errors import ConfigError, DataError

Numbers = np.ndarray[Any, np.dtype[np.float64]]


class Draw(NamedTuple):
    """Samples of a memory."""

    rows: tuple[Tensor, ...]  # one tensor per field, of shape (samples, *shape of the field)
    places: Tensor  # (samples,), where they are in the memory
    weights: Tensor  # (samples,), importance-sampling weights in (0, 1]; all 1 if drawn uniformly


class ReplayMemory:
    """The newest ``capacity`` rows that were added.

    A draw depends on the memory's seed, on how many samples were drawn before, and on what it holds, on nothing else:
    with its :meth:`state_dict` restored it goes on as if nothing had happened.

    Args:
        capacity: most rows that are kept.
        seed: of the draws; give each rank's memory one of its own.
        priority_exponent: 0 draws uniformly; above, row i is drawn with probability p_i ** exponent / sum, where p_i is
            the priority that :meth:`prioritise` set, and that of a new row the largest so far (Schaul et al. 2016,
            section 3.3, "proportional").
        correction: exponent beta of the importance-sampling weights (N P(i)) ** -beta, divided by their largest
            (section 3.4): the largest in this memory, unless ``floor`` is set.

    Attributes:
        floor: the least N P(i), from which the largest weight follows. Where ranks have a memory each, set it to the
            least of all ranks' :meth:`least`, or their samples would be weighed by different measures.
    """

    def __init__(self, capacity: int, seed: int, *, priority_exponent: float = 0.0, correction: float = 0.4):
        if capacity < 1:
            raise ConfigError(f"replay memory: capacity {capacity} is too small; it must be at least 1")
        for name, value in (("priority exponent", priority_exponent), ("correction", correction)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"replay memory: {name} {value} must be from 0 to 1")
        self.capacity, self.seed = capacity, seed
        self.exponent, self.correction = priority_exponent, correction
        self.added = 0  # rows, ever
        self.draws = 0  # samples, ever
        self._fields: list[Tensor] = []
        self._priorities = Priorities(capacity) if priority_exponent else None
        self._largest = 1.0
        self.floor: float | None = None

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *fields: Tensor) -> None:
        """Add rows: one tensor per field, all of shape (rows, *shape of the field). The oldest rows make room.

        Raises:
            DataError: fields differ in their numbers of rows, or from those of earlier rows in shape or dtype.
        """
        rows = len(fields[0])
        if any(len(field) != rows for field in fields):
            raise DataError(f"replay memory: fields of different lengths, {[len(field) for field in fields]}")
        if not self._fields:
            self._fields = [torch.empty((self.capacity, *f.shape[1:]), dtype=f.dtype) for f in fields]
        kinds = [[(tuple(f.shape[1:]), f.dtype) for f in group] for group in (fields, self._fields)]
        if kinds[0] != kinds[1]:
            raise DataError(f"replay memory: rows {kinds[0]} do not fit those it holds, {kinds[1]}")
        kept = min(rows, self.capacity)
        places = torch.arange(self.added + rows - kept, self.added + rows) % self.capacity
        for own, new in zip(self._fields, fields, strict=True):
            own[places] = new[rows - kept :].detach().cpu()
        if self._priorities is not None:
            self._priorities.put(places, np.full(kept, self._largest))
        self.added += rows

    def draw(self, samples: int) -> Draw:
        """Return ``samples`` rows, with replacement.

        Raises:
            DataError: the memory is empty.
        """
        if not self.added:
            raise DataError("replay memory: nothing was added yet, so there is nothing to draw")
        generator = torch.Generator().manual_seed(derive_seed("replay", self.seed, self.draws))
        chance = torch.rand(samples, generator=generator, dtype=torch.float64)
        self.draws += samples
        size = len(self)
        if self._priorities is None:
            places, weights = (chance * size).long(), torch.ones(samples)
        else:
            places = torch.from_numpy(self._priorities.find(chance)).clamp_(max=size - 1)
            weights = self._weights(places)
        return Draw(tuple(field[places] for field in self._fields), places, weights)

    def prioritise(self, places: Tensor, priorities: Tensor) -> None:
        """Set the priorities of rows, for instance to the size of their temporal-difference errors, plus a little."""
        if self._priorities is not None:
            raised = priorities.detach().double().cpu().clamp(min=1e-12) ** self.exponent
            self._largest = max(self._largest, float(raised.max()))
            self._priorities.put(places.cpu(), raised)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that decides what is drawn from now on, as tensors by name."""
        state = {f"field_{i}": field[: len(self)].clone() for i, field in enumerate(self._fields)}
        state["counters"] = torch.tensor([self.added, self.draws])
        if self._priorities is not None:
            state["priorities"] = torch.tensor(self._priorities.leaves[: len(self)])
            state["largest_priority"] = torch.tensor([self._largest], dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            DataError: it is the state of a memory of another capacity, or of another kind.
        """
        added, draws = state["counters"].tolist()
        fields = [state[f"field_{i}"] for i in range(sum(key.startswith("field_") for key in state))]
        rows = len(fields[0]) if fields else 0
        if rows != min(added, self.capacity):
            raise DataError(f"replay memory: a state of {rows} rows does not fit a capacity of {self.capacity}")
        if ("priorities" in state) != (self._priorities is not None):
            raise DataError("replay memory: the state is of a memory with another priority exponent")
        self.added, self.draws = added, draws
        self._fields = [torch.empty((self.capacity, *f.shape[1:]), dtype=f.dtype) for f in fields]
        for own, saved in zip(self._fields, fields, strict=True):
            own[:rows] = saved
        if self._priorities is not None:
            self._priorities = Priorities(self.capacity)
            self._priorities.put(torch.arange(rows), state["priorities"])
            self._largest = float(state["largest_priority"])

    def take_from(self, states: Sequence[Mapping[str, Tensor]], mine: Tensor) -> None:
        """Go on from the states of several memories, of which this one gets a share, the oldest rows first.

        Args:
            states: as :meth:`state_dict` returned them.
            mine: of as many rows in a row, of all memories and by age, which ones are this memory's; again and again.
        """
        parts = [[_by_age(state, key) for key in _fields(state)] for state in states if _fields(state)]
        draws = sum(int(state["counters"][1]) for state in states)
        self.added, self.draws, self._fields = 0, draws, []
        if not parts:
            return
        # By age as far as that can be told: a memory's j-th row of n stands at (j + 1/2) / n.
        age = torch.cat([(torch.arange(len(own[0]), dtype=torch.float64) + 0.5) / len(own[0]) for own in parts])
        chosen = age.sort(stable=True).indices
        chosen = chosen[mine[torch.arange(len(chosen)) % len(mine)]][-self.capacity :]
        if not len(chosen):
            return
        self.add(*(torch.cat(columns)[chosen] for columns in zip(*parts, strict=True)))
        if self._priorities is not None:
            known = torch.cat([_by_age(state, "priorities") for state in states if _fields(state)])
            self._priorities.put(torch.arange(len(chosen)), known[chosen])
            self._largest = max(float(state["largest_priority"]) for state in states)

    def least(self) -> float:
        """Return the least of len(memory) P(i) over all rows; infinite if there is none."""
        if self._priorities is None:
            return 1.0 if len(self) else math.inf
        own = self._priorities.leaves[: len(self)]
        return float(own.min()) / self._priorities.total * len(self) if len(self) else math.inf

    def _weights(self, places: Tensor) -> Tensor:
        assert self._priorities is not None
        expected = len(self) * torch.from_numpy(self._priorities.leaves[places.numpy()]) / self._priorities.total
        floor = self.floor if self.floor is not None else self.least()
        return ((floor / expected) ** self.correction).clamp(max=1.0).float()


def _fields(state: Mapping[str, Tensor]) -> list[str]:
    return sorted((key for key in state if key.startswith("field_")), key=lambda key: int(key.removeprefix("field_")))


def _by_age(state: Mapping[str, Tensor], key: str) -> Tensor:
    """Return rows of a state from the oldest to the newest; a full memory goes round."""
    rows = state[key]
    return rows.roll(-int(state["counters"][0]) % len(rows), 0)


class Priorities:
    """Numbers of which one is found by its share of their sum, in logarithmic time: a tree of partial sums."""

    def __init__(self, capacity: int):
        self._first = 1 << max(0, capacity - 1).bit_length()  # where the leaves begin; node i has children 2i and 2i+1
        self._sums = np.zeros(2 * self._first)

    @property
    def leaves(self) -> Numbers:
        """The numbers themselves."""
        return self._sums[self._first :]

    @property
    def total(self) -> float:
        """Their sum."""
        return float(self._sums[1])

    def put(self, places: Any, numbers: Any) -> None:
        """Set the numbers at ``places``; of several for one place the last counts."""
        nodes = np.asarray(places, dtype=np.int64) + self._first
        self._sums[nodes] = np.asarray(numbers, dtype=np.float64)
        while len(nodes) and nodes[0] > 1:
            nodes = np.unique(nodes >> 1)
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]

    def find(self, chance: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return for each of ``chance`` in [0, 1) the place whose stretch of the running sum it falls into."""
        left_over = np.asarray(chance, dtype=np.float64) * self.total
        nodes = np.ones(len(left_over), dtype=np.int64)
        while nodes[0] < self._first:
            left = self._sums[2 * nodes]
            # Rounding may leave a little over where the right half is empty.
            right = (left_over >= left) & (self._sums[2 * nodes + 1] > 0)
            left_over = left_over - np.where(right, left, 0.0)
            nodes = 2 * nodes + right
        return nodes - self._first
