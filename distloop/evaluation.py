"""Metrics over a data set, exact on any number of ranks: every sample counts once, sums and counts are added."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distloop.collectives.tree import own_leaves
from distloop.data import Batches
from distloop.errors import ConfigError
from distloop.leaf_state import seed_generators
from distloop.loading import Loading
from distloop.messages import gather_json, gather_uneven
from distloop.plan import Plan
from distloop.transports import Alone, Transport
from distloop.world import World

LOOKED_AT = 8  # samples, to know the metrics' names and to find mistakes before the training

Sums = Mapping[str, tuple[Tensor | float, Tensor | float]]


class Evaluates(Protocol):
    """What evaluation needs of a task. Two more attributes are optional.

    - ``metrics``: torchmetrics objects by name, which ``evaluate`` updates;
    - ``summarise(metrics)``: turns the means of the whole data set into the metrics to report. What is not a mean over
      samples (a coverage, a distance between curves) is made here out of means.
    """

    def evaluate(self, batch: Any) -> Sums:
        """Return (sum, count) by metric; the metric is the total sum over the total count."""


class Evaluation:
    """Evaluates a task on a data set.

    Args:
        samples: a map-style data set of ``size`` samples.
        batch_size: samples that one rank evaluates at once.
        leaves: parts that the data set is cut into, so that the bits do not depend on the number of ranks; 0: by ranks.
        seed: of what evaluating draws, where there are leaves.
    """

    def __init__(
        self,
        task: Evaluates,
        samples: Any,
        size: int,
        *,
        batch_size: int,
        models: Sequence[nn.Module],
        world: World,
        transport: Transport,
        device: torch.device,
        collate: Any = None,
        loading: Loading | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        leaves: int = 0,
        seed: int = 0,
    ):
        self._task, self._models, self._device, self._seed = task, models, device, seed
        # torchmetrics of a rank without a sample cannot be gathered; so few samples every rank evaluates itself. And
        # what they add up over ranks does not have the same bits on any number of them.
        alone = size < world.size or (leaves > 0 and bool(self._objects()))
        self._world, self._transport = (World(), Alone()) if alone else (world, transport)
        # Who evaluates what, one after the other: this rank of all, or the leaves that this rank has.
        self._parts = [self._world]
        if leaves:
            own = own_leaves(self._world.rank, leaves, self._world.size)
            self._parts = [World(leaf, leaves, leaf, leaves) for leaf in own]
        self._leaves = leaves
        self._everyone = transport
        self._batches = Batches(
            samples,
            Plan(size, size, min(batch_size, size)),
            shuffle=False,
            device=device,
            loading=loading,
            collate=collate,
        )
        self._precision = precision

    def __call__(self) -> dict[str, float]:
        """Return every metric of the whole data set, to the bit the same on every rank."""
        parts: list[dict[str, Tensor]] = []
        with evaluating(self._models):
            for part in self._parts:
                parts.append({})
                if self._leaves:
                    seed_generators(self._device, "evaluate", self._seed, part.rank)
                for minibatch in self._batches.extract(0, part):
                    for micro_batch in minibatch:
                        self._add(micro_batch.batch, parts[-1])
            values = self._summary(totals(self._transport, *parts) | self._stateful())
        # What follows from them (patience, the best) must be decided alike: rank 0's floats count.
        agreed: dict[str, float] = gather_json(self._everyone, values)[0]
        return agreed

    def names(self) -> list[str]:
        """Return the metrics' names, as a few samples show them."""
        sums: dict[str, Tensor] = {}
        with evaluating(self._models):
            self._add(self._batches.first(LOOKED_AT), sums)
            if hasattr(self._task, "summarise"):
                return list(self._summary(totals(Alone(), sums) | self._stateful()))
        for metric in self._objects().values():
            metric.reset()
        return [*sums, *self._objects()]

    def _add(self, batch: Any, sums: dict[str, Tensor]) -> None:
        with self._precision():
            for name, pair in self._task.evaluate(batch).items():
                amount = as_pair("evaluate(batch)", name, pair)
                sums[name] = sums[name] + amount if name in sums else amount

    def _summary(self, means: dict[str, float]) -> dict[str, float]:
        summarise = getattr(self._task, "summarise", None)
        if summarise is None:
            return means
        summary = summarise(means)
        if not isinstance(summary, Mapping):
            raise ConfigError(f"summarise(metrics) returned a {type(summary).__name__}; it must be a mapping")
        for name, value in summary.items():
            number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
            if not isinstance(name, str) or not number:
                raise ConfigError(f"summarise(metrics): metric {name!r} must be a number, not a {type(value).__name__}")
        return {name: float(value) for name, value in summary.items()}

    def _objects(self) -> dict[str, Any]:
        """Return the task's torchmetrics objects."""
        return {n: m for n, m in getattr(self._task, "metrics", {}).items() if hasattr(m, "compute")}

    def _stateful(self) -> dict[str, float]:
        """Return the values of torchmetrics objects, whose states are gathered through this transport."""
        values = {}
        for name, metric in self._objects().items():
            metric.dist_sync_fn = lambda state, group=None: gather_uneven(self._transport, state)
            metric.distributed_available_fn = lambda: self._transport.size > 1
            value = metric.compute()
            parts = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            for key, part in parts.items():
                if isinstance(part, Tensor) and part.numel() != 1:
                    raise ConfigError(
                        f"metric {key!r} has {part.numel()} values; it must be one number (average over them)"
                    )
                values[key] = float(part)
            metric.reset()
        return values


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put all modules into evaluation mode, without gradients, and each back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def totals(transport: Transport, *parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return each figure's sum over its count, both added over all parts of all ranks, in order.

    A part may have nothing of a figure.
    """
    by_rank = gather_json(transport, [{name: pair.tolist() for name, pair in sums.items()} for sums in parts])
    every = [sums for own in by_rank for sums in own]
    names = list(dict.fromkeys(name for sums in every for name in sums))
    added = {name: [sum(sums.get(name, (0.0, 0.0))[i] for sums in every) for i in (0, 1)] for name in names}
    return {name: total / count if count else math.nan for name, (total, count) in added.items()}


def as_pair(where: str, name: str, pair: Any) -> Tensor:
    """Return (sum, count) as a tensor of shape (2,) in double precision, on the device where the sum is.

    Raises:
        ConfigError: it is not a pair of numbers; ``where`` says whose answer it is.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ConfigError(f"{where}: metric {name!r} must be a pair (sum, count), not a {type(pair).__name__}")
    for part in pair:
        if isinstance(part, Tensor) and part.numel() != 1:
            raise ConfigError(f"{where}: metric {name!r} must be two numbers, not of shape {tuple(part.shape)}")
        if not isinstance(part, Tensor | int | float):
            raise ConfigError(f"{where}: metric {name!r} must be two numbers, not a {type(part).__name__}")
    device = next((part.device for part in pair if isinstance(part, Tensor)), None)
    return torch.stack(
        [torch.as_tensor(part, dtype=torch.float64, device=device).detach().reshape(()) for part in pair]
    )
