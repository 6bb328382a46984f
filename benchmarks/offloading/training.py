"""Training by the loop's own lines, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distloop.cpu_adam import OnePassAdam
from distloop.learner import Learner
from distloop.optimizer import Optimizer
from distloop.schedules import Constant
from distloop.strategies import Shard, Strategy
from distloop.transforms import ClipByNorm

LR = 1e-4


class Objective:
    """A model that returns its loss."""

    def __init__(self, model: nn.Module):
        self.model = model

    def guess(self, batch: Any) -> Any:
        return self.model(batch)

    def targets(self, batch: Any) -> None: ...

    def loss(self, guesses: Any, targets: None) -> Tensor:
        return guesses


class Whole:
    """A micro-batch that is the whole step."""

    final = True

    def __init__(self, batch: Any):
        self.batch = batch

    def share(self, name: str) -> float:
        return 1.0


def learner_of(
    model: nn.Module, strategy: Strategy, *, clip: float | None, optimizer: type[Optimizer] = Optimizer
) -> Learner:
    """Return what trains ``model`` by AdamW on the host."""
    shards: Sequence[Shard] = strategy.shards
    rule = optimizer(OnePassAdam(decoupled=True), shards, dict.fromkeys(strategy.parameters, 0.01))
    transforms = [] if clip is None else [ClipByNorm(clip)]
    return Learner("model", Objective(model), strategy, rule, lr=LR, schedule=Constant(), transforms=transforms)


def train(learner: Learner, batch: Any) -> None:
    """Do one step."""
    micro_batch: Any = Whole(batch)
    loss = learner.loss(learner.guess(micro_batch), learner.targets(micro_batch))
    gradients = learner.gradients(loss, micro_batch)
    for i, collected in gradients.collect():
        learner.optimizer.apply(collected, learner.parameters[i])
        learner.broadcast(i)
    learner.take_losses()
