"""Training by the loop's own lines, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distloop.cpu_adam import OnePassAdam
from distloop.learner import Learner
from distloop.optimizer import Adam, Optimizer
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
    """A micro-batch that is all that this rank has of a step."""

    final = True

    def __init__(self, batch: Any, share: float):
        self.batch, self._share = batch, share

    def share(self, name: str) -> float:
        return self._share


def learner_of(
    model: nn.Module, strategy: Strategy, *, clip: float | None, optimizer: type[Optimizer] = Optimizer
) -> Learner:
    """Return what trains ``model`` by AdamW, in one pass where the strategy has its shards on the host."""
    shards: Sequence[Shard] = strategy.shards
    adamw = OnePassAdam(decoupled=True) if strategy.on_host else Adam(decoupled=True)
    rule = optimizer(adamw, shards, dict.fromkeys(strategy.parameters, 0.01))
    transforms = [] if clip is None else [ClipByNorm(clip)]
    return Learner("model", Objective(model), strategy, rule, lr=LR, schedule=Constant(), transforms=transforms)


def train(learner: Learner, batch: Any, share: float = 1.0) -> None:
    """Do one step; ``share``: of this rank in the global batch."""
    micro_batch: Any = Whole(batch, share)
    loss = learner.loss(learner.guess(micro_batch), learner.targets(micro_batch))
    gradients = learner.gradients(loss, micro_batch)
    for i, collected in gradients.collect():
        learner.optimizer.apply(collected, learner.parameters[i])
        learner.broadcast(i)
    learner.take_losses()
