"""The universal training loop. Every kind of learning, every strategy and every precision runs through these lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distloop.data import Dataset, Position
from distloop.learner import Learner
from distloop.world import World


class Collects(Protocol):
    """What the loop needs of a task."""

    def collect(self, epoch: int) -> Dataset:
        """Return the data of an epoch: from disk, or by acting in an environment."""


@dataclass(slots=True)
class Update:
    """One learner's turn. ``losses`` are this rank's (share of the global batch, loss) pairs.

    The loss of the global batch is the sum over all pairs of all ranks of share times loss.
    """

    epoch: int
    position: Position  # of the global batch in the epoch
    learner: Learner
    losses: Sequence[tuple[float, Tensor]]


def train(task: Collects, learners: Sequence[Learner], epochs: Iterable[int], world: World) -> Iterator[Update]:
    """Train; yield after each learner's turn. Logging, evaluating and stopping happen in the caller's ``for``."""
    for epoch in epochs:
        dataset = task.collect(epoch)  # from disk, or by acting in an environment
        for minibatch in dataset.extract(epoch, world):  # this rank's share of one global batch, as micro-batches
            for learner in learners:  # most tasks have one; a GAN has two, which take turns
                for micro_batch in minibatch:
                    guesses = learner.guess(micro_batch)
                    targets = learner.targets(micro_batch)
                    loss = learner.loss(guesses, targets)
                    gradients = learner.gradients(loss, micro_batch)
                for i, collected in gradients.collect():  # only what this rank is responsible for
                    learner.optimizer.apply(collected, learner.parameters[i])
                    learner.broadcast(i)
                yield Update(epoch, minibatch.position, learner, learner.take_losses())
