"""What a task is: objectives, data to learn from, and a way to tell how well it went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distloop.errors import ConfigError
from distloop.objective import Objective

LossFunction = Callable[[Any, Any], Tensor]


class Task(Protocol):
    """What the runtime needs.

    Optional attributes, used where they exist:

    - ``validation``: a map-style data set, with ``evaluate(batch) -> {metric: (sum, count)}``;
    - ``metrics``: torchmetrics objects by name, which ``evaluate`` updates;
    - ``summarise(metrics) -> metrics``: makes those to report of the means over all validation samples;
    - ``pictures() -> {name: draw(figure)}``: drawn on rank 0 after each evaluation, without a trace in the training;
    - ``collate``: joins a list of samples to a batch (default: torch's);
    - ``turns``: by learner, on every how many batches it takes its turn (default: on each);
    - ``join(site)``: called on every rank with its :class:`distloop.site.Site` before anything is collected;
    - ``report() -> {figure: (sum, count)}``: what was collected since it was asked last; sums and counts are added up
      over ranks, and so is a number that is no pair.
    """

    objectives: Mapping[str, Objective]

    def collect(self, epoch: int) -> Any:
        """Return the data of an epoch.

        A map-style data set (``__len__``, ``__getitem__``) that is the same on all ranks, a
        :class:`distloop.uneven.PerRank` of what this rank collected for itself, or anything with ``extract``.
        """


class SupervisedObjective:
    """A model whose guesses are compared with given targets: batches are pairs ``(inputs, targets)``."""

    def __init__(self, model: nn.Module, loss: LossFunction, weight: Callable[[Any], float] | None = None):
        self.model, self._loss = model, loss
        if weight is not None:
            self.weight = weight

    def guess(self, batch: Any) -> Any:
        return self.model(batch[0])

    def targets(self, batch: Any) -> Any:
        return batch[1]

    def loss(self, guesses: Any, targets: Any) -> Tensor:
        return self._loss(guesses, targets)


class Supervised:
    """The common case: a model, a data set of ``(input, target)`` pairs, and a loss.

    Args:
        model: maps inputs to guesses.
        loss: ``loss(guesses, targets)``, a mean over the samples of a batch (or over what ``weight`` counts).
        train: map-style data set of pairs. A ``TensorDataset`` is read a whole batch at a time.
        validation: the same, to evaluate on; the loss and all metrics are reported.
        metrics: by name, ``metric(guesses, targets) -> (sum, count)``, or a torchmetrics object.
        weight: ``weight(batch)``, what ``loss`` is a mean over, if that is not the number of samples.
        evaluation_loss: the loss to report, where the trained one is not it (label smoothing).
        collate: joins a list of pairs to a batch (default: torch's).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        train: Any,
        validation: Any = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        weight: Callable[[Any], float] | None = None,
        evaluation_loss: LossFunction | None = None,
        collate: Callable[[Sequence[Any]], Any] | None = None,
        name: str = "model",
    ):
        if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
            raise ConfigError(
                "loss has parameters of its own to train: make them part of the model, or write an objective"
            )
        self.objectives: Mapping[str, Objective] = {name: SupervisedObjective(model, loss, weight)}
        self.train, self.validation, self.collate = train, validation, collate
        self.metrics = dict(metrics or {})
        self._model, self._loss, self._weight = model, evaluation_loss or loss, weight

    def collect(self, epoch: int) -> Any:
        return self.train

    def evaluate(self, batch: Any) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Return (sum, count) of the loss and of each metric, on a batch of pairs."""
        inputs, targets = batch[0], batch[1]
        guesses = self._model(inputs)
        count = float(len(targets)) if self._weight is None else self._weight(batch)
        sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        for name, metric in self.metrics.items():
            if hasattr(metric, "compute"):
                metric.update(guesses, targets)
            else:
                sums[name] = metric(guesses, targets)
        # A batch that weighs nothing (no valid token) has no mean to multiply.
        total = self._loss(guesses, targets) * count if count else 0.0
        return {"loss": (total, count)} | sums


def accuracy(guesses: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Return (number of right guesses, number of guesses); ``guesses`` are class scores of shape (samples, classes)."""
    return (guesses.argmax(-1) == targets).sum(), float(targets.numel())


def split(samples: int, validation: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the indices of a fixed random split into training and validation samples."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
    return order[validation:], order[:validation]
