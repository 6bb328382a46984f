"""From what a task collects to what the loop extracts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from distloop.build.contents import fingerprint, samples_in
from distloop.build.place import Place
from distloop.config import Config
from distloop.data import Batches, Plan, derive_seed
from distloop.errors import ConfigError
from distloop.evaluation import as_pair, totals
from distloop.loading import Loading
from distloop.messages import agree_on
from distloop.uneven import PerRank, UnevenBatches

Weighers = Mapping[str, Callable[[Any], float]]


class Fed:
    """A task whose ``collect`` gives what the loop extracts from: the user's data, in global batches.

    Collecting happens under the same torch seed on every rank, whatever they drew before: a data set that is made at
    random must be the same on all of them. What ranks collect for themselves is seeded by their ``Site``.
    """

    def __init__(self, task: Any, config: Config, place: Place, weighers: Weighers):
        self._task, self._config, self._place, self._weighers = task, config, place, weighers
        self._epoch: int | None = None
        self._data: Any = None
        self._size: int | None = None
        self._fed: Any = None
        self._kind: str | None = None
        self._seconds = 0.0

    def collect(self, epoch: int) -> Any:
        """Return the data of ``epoch`` in global batches; collected once, however often it is asked for."""
        if epoch != self._epoch:
            self._epoch, begun = epoch, time.monotonic()
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed("collect", self._config.train.seed, epoch))
                data = self._task.collect(epoch)
            self._seconds += time.monotonic() - begun
            self._enter(data)
        return self._fed

    def take_seconds(self) -> float:
        """Return how long this rank collected since it was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def report(self) -> dict[str, float]:
        """Return what the task tells of its collecting since it was asked last, as means over all ranks."""
        own = self._task.report() if hasattr(self._task, "report") else {}
        if not isinstance(own, Mapping):
            raise ConfigError(f"report() returned a {type(own).__name__}; it must be a mapping of pairs (sum, count)")
        sums = {name: as_pair("report()", name, pair) for name, pair in own.items()}
        means = totals(self._place.transport, sums)
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}  # nothing since the last report

    def _enter(self, data: Any) -> None:
        own = isinstance(data, PerRank)
        kind = "samples of its own" if own else "batches" if hasattr(data, "extract") else "a data set"
        if self._kind is None:
            self._kind = kind
            agree_on(self._place.transport, {"kind": kind}, "what they collect")
        elif kind != self._kind:
            raise ConfigError(
                f"collect({self._epoch}) returned {kind}, and before it {self._kind}; it must stay one kind"
            )
        if hasattr(data, "extract"):
            self._fed = data
        elif own:
            if data.samples is not None:
                samples_in(data.samples, "PerRank(samples)", empty=True)
            sizes = self._config.data
            self._fed = UnevenBatches(
                data,
                global_batch_size=sizes.global_batch_size,
                micro_batch_size=sizes.micro_batch_size,
                # What a rank has just collected is in its own memory; a worker would draw from a copy of that.
                **self._options() | {"loading": replace(make_loading(self._config), workers=0)},
            )
        else:
            size = samples_in(data, "collect(epoch)")
            if data is not self._data or size != self._size:
                self._data, self._size, self._fed = data, size, self._batches(data, size)

    def _batches(self, data: Any, size: int) -> Batches:
        sizes = self._config.data
        facts = {"number of samples": size, "contents": fingerprint(data)}
        agree_on(self._place.transport, facts, "the data set")
        return Batches(data, Plan(size, sizes.global_batch_size, sizes.micro_batch_size), **self._options())

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
