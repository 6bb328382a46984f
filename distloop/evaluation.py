"""Metrics over a data set, exact on any number of ranks: every sample counts once, sums and counts are added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distloop.data import Batches, Loading, Plan
from distloop.errors import ConfigError
from distloop.messages import gather_uneven
from distloop.transports import Alone, Transport
from distloop.world import World

Sums = Mapping[str, tuple[Tensor | float, Tensor | float]]


class Evaluates(Protocol):
    """What evaluation needs of a task; ``metrics``, if any, are torchmetrics objects that ``evaluate`` updates."""

    def evaluate(self, batch: Any) -> Sums:
        """Return (sum, count) by metric; the metric is the total sum over the total count."""


class Evaluation:
    """Evaluates a task on a data set.

    Args:
        samples: a map-style data set of ``size`` samples.
        batch_size: samples that one rank evaluates at once.
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
    ):
        self._task, self._models = task, models
        # A rank without a sample would have no metric to add to; so few samples every rank evaluates itself.
        self._everyone = size < world.size
        self._world, self._transport = (World(), Alone()) if self._everyone else (world, transport)
        self._batches = Batches(
            samples,
            Plan(size, size, min(batch_size, size)),
            shuffle=False,
            device=device,
            loading=loading,
            collate=collate,
        )
        self._precision = precision

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return every metric of the whole data set, the same on every rank."""
        modes = [(model, model.training) for model in self._models]
        for model in self._models:
            model.eval()
        sums: dict[str, Tensor] = {}
        for minibatch in self._batches.extract(0, self._world):
            for micro_batch in minibatch:
                with self._precision():
                    for name, pair in self._task.evaluate(micro_batch.batch).items():
                        amount = _pair(name, pair)
                        sums[name] = sums[name] + amount if name in sums else amount
        for model, training in modes:
            model.train(training)
        return self._totals(sums) | self._stateful()

    def _totals(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        if not sums:
            return {}
        own = torch.stack([pair.cpu() for pair in sums.values()])
        totals = self._transport.all_gather(own).wait().sum(0).tolist()
        return {
            name: total / count if count else float("nan") for name, (total, count) in zip(sums, totals, strict=True)
        }

    def _stateful(self) -> dict[str, float]:
        """Return the values of torchmetrics objects, whose states are gathered through this transport."""
        values = {}
        for name, metric in getattr(self._task, "metrics", {}).items():
            if hasattr(metric, "compute"):
                metric.dist_sync_fn = lambda state, group=None: gather_uneven(self._transport, state)
                metric.distributed_available_fn = lambda: self._transport.size > 1
                values[name] = float(metric.compute())
                metric.reset()
        return values


def _pair(name: str, pair: Any) -> Tensor:
    try:
        total, count = pair
        values = [
            t.detach().double() if isinstance(t, Tensor) else torch.tensor(float(t)).double() for t in (total, count)
        ]
        device = next((t.device for t in (total, count) if isinstance(t, Tensor)), None)
        return torch.stack([v.to(device) for v in values])
    except (TypeError, ValueError, RuntimeError) as failure:
        raise ConfigError(
            f"evaluate(batch): metric {name!r} must be a pair (sum, count) of numbers; got {pair!r}"
        ) from failure
