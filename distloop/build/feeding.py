"""From what a task collects to what the loop extracts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import TensorDataset

from distloop.build.contents import fingerprint, samples_in
from distloop.build.deterministic import leaves_of
from distloop.build.place import Place
from distloop.build.resumed_data import Regrouped, Resumed
from distloop.config import Config
from distloop.data import Batches, derive_seed
from distloop.errors import ConfigError, DataError, MismatchError
from distloop.evaluation import as_pair, totals
from distloop.loading import Loading
from distloop.messages import agree_on
from distloop.own_state import generators
from distloop.plan import Plan
from distloop.site import Site
from distloop.uneven import PerRank, UnevenBatches

Weighers = Mapping[str, Callable[[Any], float]]
KINDS = ("a data set", "samples of its own (PerRank)", "batches (extract)")


class Fed:
    """A task whose ``collect`` gives what the loop extracts from: the user's data, in global batches.

    Collecting happens under the same torch seed on every rank, whatever they drew before: a data set that is made at
    random must be the same on all of them. What ranks collect for themselves is seeded by their ``Site``.
    """

    def __init__(
        self,
        task: Any,
        config: Config,
        place: Place,
        weighers: Weighers,
        site: Site | None = None,
        *,
        in_step: bool = False,
    ):
        self._task, self._config, self._place, self._weighers = task, config, place, weighers
        self._site = site or Site(place.world, place.transport, place.device, config.train.seed)
        self._in_step = in_step  # whether ranks must have equally many micro-batches
        self._epoch: int | None = None
        self._data: Any = None
        self._size: int | None = None
        self.steps: int | None = None  # in the first epoch, if that is a data set
        self._fed: Any = None
        self._seconds = 0.0
        self._own: PerRank | None = None  # what this rank collected for itself
        self._facts: dict[str, Any] = {}  # of a data set that is the same on all ranks
        self._steady = False  # whether the data set was the same in the epoch before
        self._generators: dict[str, Any] | None = None
        self._resumed: Resumed | None = None
        self.notes: list[str] = []  # on what could not be gone on with

    def collect(self, epoch: int) -> Any:
        """Return the data of ``epoch`` in global batches; collected once, however often it is asked for."""
        if epoch != self._epoch:
            self._epoch, begun, waited = epoch, time.monotonic(), self._site.waited
            data = self._collected(epoch)
            self._seconds += time.monotonic() - begun - (self._site.waited - waited)
            self._enter(data)
        return self._fed if self._resumed is None else self._resumed.rest(self._fed, epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return what of this epoch's data could not be had again, and what tells whether the rest is the same."""
        own: dict[str, Any] | None = None
        if isinstance(self._fed, Regrouped):
            parts = self._fed.owns if self._place.world.rank == 0 else []
            own = {"passes": self._fed.passes, "kept": "regrouped", "parts": parts}
        elif hasattr(self._task, "recall"):
            own = {"passes": 1, "kept": "recalled"}
        elif self._own is not None:
            own = {"passes": self._own.passes, "kept": "nothing"}
            if self._own.samples is None or type(self._own.samples) is TensorDataset:
                own |= {"kept": "all", "tensors": list(self._own.samples.tensors) if self._own.samples else []}
        state = {"own": own, "facts": self._facts, "steady": self._steady, "steps": self.steps}
        return state | ({"generators": self._generators} if self._generators is not None else {})

    def load_states(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on from the states of all ranks of then; :meth:`begin` says where."""
        self._resumed = Resumed(states, self._config, self._options(), self._place)
        self.steps = states[0]["steps"]

    def begin(self, epoch: int, start: int) -> None:
        """Let ``epoch`` begin after its first ``start`` global batches, with the data that it had."""
        if self._resumed is None:
            return
        self._resumed.begin(epoch, start)
        # What a data set was in another epoch tells something of this one only if it was always the same.
        if (facts := self._resumed.facts) and (start or self._resumed.steady):
            self.collect(epoch)
            for name, was in facts.items():
                if (now := self._facts.get(name)) != was:
                    raise DataError(f"the data set has changed since the checkpoint: {name} was {was} and is {now}")

    def _collected(self, epoch: int) -> Any:
        resumed = self._resumed
        if resumed is not None and resumed.begins_within(epoch):
            if resumed.recalled:
                return self._task.recall(epoch)
            if (data := resumed.data(self._place.world)) is not None:
                return data
            if resumed.lost:
                self.notes.append(
                    f"what was collected for epoch {epoch} is not in the checkpoint: it is collected anew"
                )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed("collect", self._config.train.seed, epoch))
            return self._task.collect(epoch)

    def take_seconds(self) -> float:
        """Return how long this rank collected since it was asked last, without waiting for others."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def report(self) -> dict[str, float]:
        """Return what the task tells of its collecting since it was asked last, exact over all ranks."""
        own = self._task.report()
        if not isinstance(own, Mapping):
            raise ConfigError(f"report() returned a {type(own).__name__}; it must be a mapping")
        once = 1.0 / self._place.world.size  # what is no pair is added up
        pairs = {str(name): value if isinstance(value, tuple | list) else (value, once) for name, value in own.items()}
        means = totals(self._place.transport, {name: as_pair("report()", name, pair) for name, pair in pairs.items()})
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}  # nothing since the last report

    def _enter(self, data: Any) -> None:
        if isinstance(data, Regrouped):
            self._data, self._size, self._fed, self._own, self._facts = None, None, data, None, {}
            return
        own = isinstance(data, PerRank)
        self._own, self._facts = data if own else None, {}
        kind = 1 if own else 2 if hasattr(data, "extract") else 0
        size = 0
        if kind == 0 or (own and data.samples is not None):
            size = samples_in(data.samples if own else data, "PerRank(samples)" if own else "collect(epoch)", empty=own)
        facts = torch.tensor([kind, data.passes if own else 1, size])
        rows = self._place.transport.all_gather(facts).wait().tolist()
        self._compare(rows)
        if self._in_step and kind != 0:
            raise ConfigError(
                f"strategy.stage: under 3 all ranks run the model equally often, and collect({self._epoch}) returned "
                f"{KINDS[kind]}; return a data set, or use stage 1 or 2",
                everywhere=True,
            )
        if kind == 0:
            self._facts = {"number of samples": size, "contents": fingerprint(data)}
        if kind != 0 and leaves_of(self._config):
            raise ConfigError(
                f"train.deterministic: collect({self._epoch}) returned {KINDS[kind]}, which depend on the number of "
                "ranks; return a data set that is the same on every rank, or turn it off",
                everywhere=True,
            )
        self._generators = generators(self._place.device) if kind == 2 else None  # its extract may draw from them
        if kind == 0 and data is self._data and size == self._size:
            self._steady = True
            return
        self._steady = False
        self._data, self._size = (data, size) if kind == 0 else (None, None)
        if own:
            self._fed = self._uneven(data, [count for *_, count in rows])
        else:
            self._fed = self._batches(data, size) if kind == 0 else data

    def _compare(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse what ranks cannot train on together."""
        for rank, (kind, passes, _) in enumerate(rows):
            if kind != rows[0][0]:
                returned = f"{KINDS[rows[0][0]]} on rank 0 and {KINDS[kind]} on rank {rank}"
                raise MismatchError(f"ranks collect differently: collect({self._epoch}) returned {returned}")
            if passes != rows[0][1]:
                raise MismatchError(
                    f"ranks collect differently: PerRank has {rows[0][1]} passes on rank 0 and {passes} on rank {rank}"
                )

    def _uneven(self, data: PerRank, counts: list[int]) -> UnevenBatches:
        sizes = self._config.data
        return UnevenBatches(
            data,
            counts,
            global_batch_size=sizes.global_batch_size,
            micro_batch_size=sizes.micro_batch_size,
            # What a rank has just collected is in its own memory; a worker would draw from a copy of that.
            **self._options() | {"loading": replace(make_loading(self._config), workers=0)},
        )

    def _batches(self, data: Any, size: int) -> Batches:
        sizes = self._config.data
        agree_on(
            self._place.transport, self._facts, "the data set (samples of each rank's own come as distloop.PerRank)"
        )
        plan = Plan(size, sizes.global_batch_size, sizes.micro_batch_size, leaves_of(self._config))
        self.steps = plan.steps if self.steps is None else self.steps
        return Batches(data, plan, in_step=self._in_step, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "seed": self._config.train.seed,
            "shuffle": self._config.data.shuffle,
            "device": self._place.device,
            "loading": make_loading(self._config),
            "collate": getattr(self._task, "collate", None),
            "weighers": self._weighers,
            "transport": self._place.transport,
        }


def make_loading(config: Config) -> Loading:
    """Return how samples are read."""
    data = config.data
    return Loading(data.workers, data.prefetch, data.pin_memory, data.worker_timeout)
