"""The parity test must be able to fail: classic bugs, planted one at a time, are seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distloop.collectives import AllReduce
from distloop.data import Batches, Minibatch
from distloop.learner import Learner
from distloop.optimizer import Optimizer, OptimizerShard
from distloop.strategies import Options, Parameters, Strategy, make
from distloop.strategies.all_reduce import BucketedAllReduce
from distloop.strategies.buckets import Capacity
from distloop.strategies.ddp import DDP
from distloop.transforms import ClipByNorm, Collected, Stream, Total
from distloop.transports import Transport
from distloop.turns import Turns
from distloop.uneven import UnevenBatches
from distloop.world import World
from tests.parity import Case, Outcome, difference, tolerance, trained_by_distloop, trained_plainly
from tests.ranks import in_processes, in_threads


def by(all_reduce: AllReduce, parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    """Return the bucketed strategy with an all-reduce of one's own."""
    capacity = Capacity(options.bucket_bytes(parameters))
    return BucketedAllReduce(parameters, transport, options, lambda _: ("planted", all_reduce), capacity)


def off(case: Case, outcomes: list[Outcome]) -> float:
    return max(difference(outcome, trained_plainly(case)) for outcome in outcomes)


def mean_for_sum(name: str, parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    def all_reduce(transport: Transport, tensor: Tensor) -> None:
        from distloop.collectives import naive

        naive.all_reduce(transport, tensor)
        tensor.div_(transport.size)

    return by(all_reduce, parameters, transport, options)


def last_rank_forgotten(name: str, parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    def all_reduce(transport: Transport, tensor: Tensor) -> None:
        from distloop.collectives import naive

        if transport.rank == transport.size - 1:
            tensor.zero_()
        naive.all_reduce(transport, tensor)

    return by(all_reduce, parameters, transport, options)


class LocalNorm(ClipByNorm):
    """Clips each shard by its own norm."""

    def __call__(self, stream: Stream, total: Total) -> Stream:
        for one in stream:
            yield from super().__call__(iter([one]), total)


class ForgetsTheDivision(Optimizer):
    """Applies gradients as they are, with the loss scale and the clipping still pending."""

    def apply(self, collected: Collected, shard: OptimizerShard) -> None:
        super().apply(Collected(collected.gradients), shard)


def weighed_by_rank(minibatches: Iterator[Minibatch], ranks: int) -> Iterator[Minibatch]:
    for minibatch in minibatches:
        for m in minibatch:
            m.sample_share = m.sample_share and 1.0 / ranks / len(minibatch.micro_batches)
        yield minibatch


class MeanOfMeans(Batches):
    """Weighs each rank's samples equally, whatever the tail's size."""

    def extract(self, epoch: int, world: World) -> Iterator[Minibatch]:
        return weighed_by_rank(super().extract(epoch, world), world.size)


class SamplesForTokens(Batches):
    """Takes a sample for what the loss is a mean over."""

    def __init__(self, *arguments: Any, weighers: Any = None, **rest: Any):
        super().__init__(*arguments, **rest)


class MeanOfRanks(UnevenBatches):
    """Weighs ranks equally, whatever they collected."""

    def extract(self, epoch: int, world: World) -> Iterator[Minibatch]:
        return weighed_by_rank(super().extract(epoch, world), world.size)


class EveryTurn(Turns):
    """Lets everyone learn on every batch."""

    def __init__(self, learners: Any, every: Any = None):
        super().__init__(learners)


class FollowsWithSamples(Learner):
    """Tells the objective of an update only where its rank had samples in it."""

    def collected(self) -> Iterator[Any]:
        busy = any(share for share, _ in self.losses)
        self._updated = getattr(self.objective, "updated", None) if busy else None
        return super().collected()


class DropsTail(Batches):
    """Leaves the smaller last batch out."""

    def extract(self, epoch: int, world: World) -> Iterator[Minibatch]:
        for minibatch in super().extract(epoch, world):
            if minibatch.position.samples == self.plan.global_batch_size:
                yield minibatch


CASE = Case(samples=23, global_batch_size=8, micro_batch_size=2, clip_norm=0.1)


@pytest.mark.parametrize(
    ("case", "plant"),
    [
        (replace(CASE, clip_norm=None), {"make": mean_for_sum}),
        (CASE, {"make": last_rank_forgotten}),
        (CASE, {"clip": LocalNorm}),
        (replace(CASE, dtype=torch.float32), {"optimizer": ForgetsTheDivision}),
        (CASE, {"batches": MeanOfMeans}),
        (replace(CASE, task="tokens"), {"batches": SamplesForTokens}),
        (replace(CASE, task="actor_critic", counts=(1, 7, 0)), {"uneven": MeanOfRanks}),
        (replace(CASE, task="gan", samples=2, global_batch_size=2, epochs=4), {"learner": FollowsWithSamples}),
    ],
    ids=[
        "mean for sum",
        "a rank forgotten",
        "local norm",
        "no division",
        "wrong tail weight",
        "samples for tokens",
        "mean of ranks",
        "average of ranks with samples",
    ],
)
def test_a_planted_bug_is_seen(case: Case, plant: dict[str, Any]) -> None:
    assert off(case, in_threads(3, trained_by_distloop, case)) <= tolerance(case)
    assert off(case, in_threads(3, trained_by_distloop, case, plant)) > 1e-3


def test_a_turn_too_many_is_seen() -> None:
    case = replace(CASE, task="gan", every=2)
    with pytest.raises(AssertionError, match=r"\(12, 9\)"):
        off(case, in_threads(2, trained_by_distloop, case, {"turns": EveryTurn}))


def test_a_dropped_tail_is_seen() -> None:
    with pytest.raises(AssertionError):
        off(CASE, in_threads(2, trained_by_distloop, CASE, {"batches": DropsTail}))


def test_momentum_hides_no_missing_broadcast() -> None:
    """Replicas that begin apart stay apart: that parameters are broadcast shows in the result."""

    def unbroadcast(name: str, parameters: Parameters, transport: Transport, options: Options) -> Strategy:
        strategy = make(name, parameters, transport, options)
        if transport.rank == 1:
            with torch.no_grad():
                next(iter(parameters.values())).add_(0.1)
        return strategy

    assert off(CASE, in_threads(2, trained_by_distloop, CASE, {"make": unbroadcast})) > 1e-3


class IgnoresFinal(DDP):
    """Never starts sending. (Always sending is a waste, but exact: averaging leaves what is already averaged alone.)"""

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        super().backward(loss, weight, final=False)


def trained_ignoring_final(transport: Transport, case: Case) -> Outcome:
    return trained_by_distloop(transport, case, {"make": lambda name, p, t, o: IgnoresFinal(p, t, o)})


def test_ddp_that_ignores_final_is_seen() -> None:
    case = replace(CASE, strategy="ddp", clip_norm=None)
    assert off(case, in_processes(2, trained_ignoring_final, case)) > 1e-3
