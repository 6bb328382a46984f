"""The rest of an epoch that was begun before: the same global batches, whichever ranks they were collected on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from distloop.build.place import Place
from distloop.config import Config
from distloop.data import Assembly, Cut, Minibatch
from distloop.loading import Loading
from distloop.own_state import generators, set_generators
from distloop.uneven import PerRank, UnevenBatches
from distloop.world import World


class Resumed:
    """What a checkpoint says of the data of its epoch, and where in it to go on.

    Args:
        states: of all ranks of then.
        config: of the run.
        options: see :class:`distloop.data.Assembly`.
        place: of this rank.
    """

    def __init__(self, states: Sequence[Mapping[str, Any]], config: Config, options: Mapping[str, Any], place: Place):
        self._states, self._config, self._options, self._place = states, config, dict(options), place
        first = states[0]
        self.facts: dict[str, Any] = first["facts"]
        self.steady: bool = first["steady"]
        self._kept = None if first["own"] is None else first["own"]["kept"]
        self._following, self._start = 0, 0

    def begin(self, epoch: int, start: int) -> None:
        """Say with which global batch of which epoch to go on."""
        self._following, self._start = epoch, start

    def begins_within(self, epoch: int) -> bool:
        """Return whether a part of ``epoch`` was done before."""
        return epoch == self._following and self._start > 0

    @property
    def recalled(self) -> bool:
        """Whether the task itself can say again what it had collected."""
        return self._kept == "recalled"

    @property
    def lost(self) -> bool:
        """Whether what ranks had collected for themselves is not known any more."""
        return self._kept == "nothing"

    def data(self, world: World) -> PerRank | Regrouped | None:
        """Return what ranks had collected for themselves: this rank's, or all of it if there are other ranks now."""
        if self._kept == "regrouped":
            return Regrouped(self._states[0]["own"]["parts"], self._config, self._options)
        if self._kept != "all":
            return None
        if len(self._states) == world.size:
            own = self._states[world.rank]["own"]
            return PerRank(TensorDataset(*own["tensors"]) if own["tensors"] else None, own["passes"])
        return Regrouped([state["own"] for state in self._states], self._config, self._options)

    def rest(self, dataset: Any, epoch: int) -> Any:
        """Return what is left of ``dataset`` in ``epoch``."""
        if not self.begins_within(epoch) or self.lost:
            return dataset
        rank, same = self._place.world.rank, len(self._states) == self._place.world.size
        return _Rest(dataset, self._start, self._states[rank].get("generators") if same else None, self._place.device)


class _Rest:
    """A data set without its first global batches.

    A user's own ``extract`` goes through them again, with the generators as they were at first where that is known.
    """

    def __init__(self, dataset: Any, start: int, drawn: Mapping[str, Any] | None, device: torch.device):
        self._dataset, self._start, self._drawn, self._device = dataset, start, drawn, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def extract(self, epoch: int, world: World) -> Iterator[Minibatch]:
        if isinstance(self._dataset, Assembly):
            return self._dataset.extract(epoch, world, self._start)
        now = generators(self._device)
        if self._drawn is not None:
            set_generators(self._drawn, self._device)
        minibatches: Iterator[Minibatch] = iter(self._dataset.extract(epoch, world))
        for _ in islice(minibatches, self._start):
            pass
        set_generators(now, self._device)
        return minibatches


class Regrouped(Assembly):
    """What other ranks had each collected for itself, in the very global batches that it would have been in.

    Args:
        owns: by rank of then, passes and tensors.
        config: of the run.
        options: see :class:`distloop.data.Assembly`.
    """

    def __init__(self, owns: Sequence[Mapping[str, Any]], config: Config, options: dict[str, Any]):
        tensors = [own["tensors"] for own in owns]
        counts = [len(own[0]) if own else 0 for own in tensors]
        held = [torch.cat(columns) for columns in zip(*(own for own in tensors if own), strict=True)]
        options = options | {"loading": Loading(), "weighers": options["weighers"]}
        sizes = config.data
        passes = owns[0]["passes"]
        self._then = UnevenBatches(
            PerRank(TensorDataset(*held), passes), counts, global_batch_size=sizes.global_batch_size, **options
        )
        self.owns, self.counts, self.passes, self.steps = list(owns), counts, passes, self._then.steps
        self._micro_batch_size = sizes.micro_batch_size
        super().__init__(TensorDataset(*held), **options)

    def cuts(self, epoch: int, world: World, start: int = 0) -> Iterator[Cut]:
        ranks = len(self.counts)
        offsets = [sum(self.counts[:rank]) for rank in range(ranks)]
        every = [self._then.cuts(epoch, World(rank, ranks, rank, ranks), start) for rank in range(ranks)]
        for cuts in zip(*every, strict=True):
            pieces = [piece + offset for offset, (_, parts) in zip(offsets, cuts, strict=True) for piece in parts]
            batch: Tensor = torch.cat(pieces)
            n = len(batch)
            part = batch[n * world.rank // world.size : n * (world.rank + 1) // world.size]
            yield cuts[0][0], list(part.split(self._micro_batch_size or max(len(part), 1))) if len(part) else []
