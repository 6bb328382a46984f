"""Which sample is in which global batch on which rank, as arithmetic; and how it gets there.

Global batch k of an epoch is ``order[k*G : (k+1)*G]``, where ``order`` depends on the seed and the epoch alone, and is
computed where it is needed (see :mod:`distloop.order`). Rank r of N takes a contiguous N-th of it. The last batch is
smaller where G does not divide the number of samples: nothing is repeated, padded in or dropped, and a rank may get
nothing.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import tee
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distloop.errors import DataError
from distloop.leaves import by_leaf
from distloop.loading import Fetch, Loading, Request, ToDevice, loader_batches
from distloop.order import Order, in_order
from distloop.plan import Plan
from distloop.transports import Alone, Rows, Transport
from distloop.world import World

Weigh = Callable[[Any], float]


@lru_cache(maxsize=256, typed=True)
def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts, and nearby parts give unrelated seeds."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(slots=True)
class MicroBatch:
    """What one rank runs at once: the user's ``batch`` (None: it has nothing to run), and its place in the step."""

    batch: Any
    sample_share: float  # its samples over those of the global batch
    final: bool  # no other micro-batch of this rank follows in this step
    shares: dict[str, float] | None = None  # by learner, where a sample is not what the loss is a mean over

    def share(self, learner: str) -> float:
        """Return its part of the global batch's weight. Over all micro-batches of all ranks, these add up to 1."""
        return self.sample_share if self.shares is None else self.shares.get(learner, self.sample_share)


class Position(NamedTuple):
    """Which global batch of an epoch, how many samples it has over all ranks, and whether it is the last."""

    batch: int
    samples: int
    last: bool


@dataclass(slots=True)
class Minibatch:
    """A rank's share of one global batch, as micro-batches; at least one, if need be a null one."""

    position: Position
    micro_batches: list[MicroBatch]

    def __post_init__(self) -> None:
        if not self.micro_batches:
            raise DataError(
                "a minibatch has at least one micro-batch; a rank without samples has MicroBatch(None, 0.0, True)"
            )

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)


Cut = tuple[Position, list[Tensor]]  # a global batch, and the indices of this rank's micro-batches of it


class Dataset(Protocol):
    """What a task collects for an epoch."""

    def extract(self, epoch: int, world: World) -> Iterator[Minibatch]:
        """Yield this rank's share of each global batch; every rank yields equally many."""


class Assembly(ABC):
    """Global batches, read, moved and weighed as ``cuts`` says.

    What a data set draws at random is seeded by (seed, epoch, sample): see :mod:`distloop.draws`.

    Args:
        samples: anything with ``__len__`` and ``__getitem__``; with ``__getitems__`` whole batches are fetched at once.
        shuffle: whether each epoch has an order of its own; else samples come as they are.
        weighers: by learner, what a batch weighs, where that is not its number of samples. The global weight is then
            agreed on by one small all-gather, launched one global batch ahead so that nobody waits for it.
    """

    steps: int  # global batches in an epoch
    leaves = 0  # parts that each global batch has whatever the number of ranks

    def __init__(
        self,
        samples: Any,
        *,
        seed: int = 0,
        shuffle: bool = True,
        device: torch.device | None = None,
        loading: Loading | None = None,
        collate: Callable[[Sequence[Any]], Any] | None = None,
        weighers: Mapping[str, Weigh] | None = None,
        transport: Transport | None = None,
    ):
        self.seed, self.shuffle = seed, shuffle
        self._loading = loading or Loading()
        self._fetch = Fetch(samples, collate)
        self._to_device = ToDevice(device or torch.device("cpu"), pin=self._loading.pin_memory)
        self._weighers = dict(weighers or {})
        self._transport = transport or Alone()

    def extract(self, epoch: int, world: World, start: int = 0) -> Iterator[Minibatch]:
        """Yield this rank's share of each global batch of ``epoch``; the first ``start`` are passed over unread.

        Raises:
            DataError: an epoch has fewer than ``start``; or a sample cannot be read.
        """
        if not 0 <= start <= self.steps:
            raise DataError(f"epoch {epoch} has {self.steps} global batches; it cannot begin after {start} of them")
        if not self._weighers:
            yield from map(self._moved, self._assemble(epoch, world, start))
            return
        ahead: tuple[Minibatch, Rows] | None = None
        for minibatch in self._assemble(epoch, world, start):
            rows = self._weigh(minibatch)  # while it is still on the host
            following = self._moved(minibatch), rows
            if ahead is not None:
                yield self._agreed(*ahead)
            ahead = following
        if ahead is not None:
            yield self._agreed(*ahead)

    @abstractmethod
    def cuts(self, epoch: int, world: World, start: int = 0) -> Iterator[Cut]:
        """Yield this rank's part of each global batch from ``start`` on: indices of micro-batches, or of leaves."""

    def draws(self, epoch: int, world: World, position: Position) -> int:
        """Return what seeds the samples of a global batch, together with their indices."""
        return derive_seed("samples", self.seed, epoch)

    def _assemble(self, epoch: int, world: World, start: int) -> Iterator[Minibatch]:
        # The reader runs ahead of the steps, so that it can read for several of them at once.
        ahead, cuts = tee(self.cuts(epoch, world, start))
        wanted = (
            Request(indices, self.draws(epoch, world, position))
            for position, parts in ahead
            for indices in parts
            if len(indices)
        )
        batches = self._read(wanted)
        for position, parts in cuts:
            samples = position.samples
            held = [MicroBatch(next(batches) if len(part) else None, len(part) / samples, False) for part in parts]
            held += [MicroBatch(None, 0.0, False) for _ in range(self.least(position, world) - len(parts))]
            held[-1].final = True
            yield Minibatch(position, held)

    def least(self, position: Position, world: World) -> int:
        """Return how many micro-batches each rank has of a global batch at least; what it lacks is without samples."""
        return 1

    def _read(self, requests: Iterator[Request]) -> Iterator[Any]:
        if self._loading.workers == 0:
            # A leaf is read by itself: where a tensor begins in memory may show in the bits of what is computed of it.
            return map(self._fetch, requests) if self.leaves else self._fetch.all(requests)
        return loader_batches(self._fetch, requests, loading=self._loading)

    def _moved(self, minibatch: Minibatch) -> Minibatch:
        """Start moving the batches to where the model is."""
        for micro_batch in minibatch:
            micro_batch.batch = self._to_device(micro_batch.batch)
        return minibatch

    def _weigh(self, minibatch: Minibatch) -> Rows:
        """Note what each micro-batch weighs, and start summing that over ranks."""
        for micro_batch in minibatch:
            micro_batch.shares = {name: self._weight(name, micro_batch) for name in self._weighers}
        own = [[m.shares[name] for name in self._weighers] for m in minibatch if m.shares is not None]
        rows = by_leaf(torch.tensor(own, dtype=torch.float64), self.leaves, self._transport)
        return self._transport.all_gather(rows)

    def _weight(self, name: str, micro_batch: MicroBatch) -> float:
        if micro_batch.batch is None:
            return 0.0
        weight = float(self._weighers[name](micro_batch.batch))
        if not 0.0 <= weight < float("inf"):
            raise DataError(f"objective {name!r}: weight(batch) returned {weight}; a weight is finite and not negative")
        return weight

    def _agreed(self, minibatch: Minibatch, rows: Rows) -> Minibatch:
        """Turn weights into shares of the global batch's weight."""
        totals = dict(zip(self._weighers, rows.wait().sum(0).sum(0).tolist(), strict=True))
        for micro_batch in minibatch:
            weights = micro_batch.shares or {}
            micro_batch.shares = {name: w / totals[name] if totals[name] else 0.0 for name, w in weights.items()}
        return minibatch


class Batches(Assembly):
    """A map-style data set, the same on every rank, in the global batches of a plan.

    Args:
        samples, options: see :class:`Assembly`.
        plan: how it is cut.
        in_step: whether all ranks have equally many micro-batches, if need be without samples.

    Raises:
        DataError: it is empty.
    """

    def __init__(self, samples: Any, plan: Plan, *, in_step: bool = False, **options: Any):
        if plan.samples == 0:
            raise DataError("the data set is empty: there is nothing to train on")
        super().__init__(samples, **options)
        self.plan, self.in_step, self.steps, self.leaves = plan, in_step, plan.steps, plan.leaves

    def first(self, samples: int) -> Any:
        """Return a batch of at most so many samples, the first ones."""
        wanted = Request(torch.arange(min(samples, self.plan.samples)), derive_seed("samples", self.seed, 0))
        return self._to_device(self._fetch(wanted))

    def cuts(self, epoch: int, world: World, start: int = 0) -> Iterator[Cut]:
        order = Order(derive_seed("order", self.seed, epoch), self.plan.samples) if self.shuffle else None
        return in_order(order, self._parts(world, start))

    def _parts(self, world: World, start: int) -> Iterator[tuple[Position, list[range]]]:
        plan = self.plan
        for step in range(start, plan.steps):
            parts = plan.micro_batches(step, world.rank, world.size)
            yield Position(step, len(plan.batch(step)), step == plan.steps - 1), parts

    def least(self, position: Position, world: World) -> int:
        if not self.in_step:
            return 1
        return max(len(self.plan.micro_batches(position.batch, rank, world.size)) for rank in range(world.size))
