"""Samples of which each rank has its own; learners that take turns; averages that follow models."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from distloop.averages import MovingAverage
from distloop.errors import ConfigError, DataError
from distloop.ledger import _idle
from distloop.transports import Transport
from distloop.turns import Turns
from distloop.uneven import PerRank, UnevenBatches, interleave
from distloop.world import World
from tests.ranks import in_threads


def collected(transport: Transport, counts: list[int], size: int, micro: int | None, passes: int) -> list[Any]:
    """Return what a rank extracts: per global batch its position and its micro-batches (share, numbers, final)."""
    rank = transport.rank
    own = torch.arange(counts[rank]) + 1000 * rank
    samples = TensorDataset(own) if counts[rank] else None
    batches = UnevenBatches(
        PerRank(samples, passes), counts, global_batch_size=size, micro_batch_size=micro, seed=4, transport=transport
    )
    return [
        (
            minibatch.position,
            [(m.sample_share, [] if m.batch is None else m.batch[0].tolist(), m.final) for m in minibatch],
        )
        for minibatch in batches.extract(0, World(rank, transport.size, rank, transport.size))
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(1, 12), st.data())
def test_every_sample_once_per_pass_and_shares_add_up(counts: list[int], size: int, data: st.DataObject) -> None:
    micro = data.draw(st.none() | st.integers(1, size))
    passes = data.draw(st.integers(1, 2))
    by_rank = in_threads(len(counts), collected, counts, size, micro, passes)
    total = sum(counts)
    steps = -(-total // size)
    assert {len(own) for own in by_rank} == {steps * passes}, "ranks take equally many steps"
    for batches in zip(*by_rank, strict=True):
        positions = {position for position, _ in batches}
        assert len(positions) == 1, "ranks agree on what a batch is"
        (position,) = positions
        held = [micro_batch for _, micro_batches in batches for micro_batch in micro_batches]
        assert sum(len(numbers) for _, numbers, _ in held) == position.samples
        assert sum(share for share, _, _ in held) == pytest.approx(1.0)
        assert all(share == len(numbers) / position.samples for share, numbers, _ in held)
        assert all(len(numbers) <= (micro or size) for _, numbers, _ in held)
        assert [[final for *_, final in own] for _, own in batches] == [
            [i == len(own) - 1 for i in range(len(own))] for _, own in batches
        ]
    sizes = [position.samples for position, _ in by_rank[0]]
    assert sizes == [*[size] * (total // size), *([total % size] if total % size else [])] * passes
    assert [position.last for position, _ in by_rank[0]] == [False] * (steps * passes - 1) + [True]
    seen = Counter(n for own in by_rank for _, held in own for _, numbers, _ in held for n in numbers)
    assert seen == {1000 * rank + i: passes for rank, n in enumerate(counts) for i in range(n)}


def test_each_batch_takes_from_every_rank_in_proportion() -> None:
    counts = [30, 10, 0, 60]
    parts = [interleave(counts, rank, 20)[1] for rank in range(4)]
    assert parts == [[6] * 5, [2] * 5, [0] * 5, [12] * 5]


def test_passes_and_epochs_have_orders_of_their_own() -> None:
    (once,) = in_threads(1, collected, [12], 12, None, 2)
    first, second = (held[0][1] for _, held in once)
    assert sorted(first) == sorted(second) and first != second


def test_nothing_collected_by_anyone_is_said() -> None:
    with pytest.raises(DataError, match="no rank collected anything"):
        in_threads(2, collected, [0, 0], 4, None, 1)
    for passes in (0, 1.5, "2"):
        with pytest.raises(ConfigError, match="must be a whole number, at least 1"):
            PerRank(None, passes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="passes 0 must be a whole number"):
        PerRank(None, 0)


def test_idle_is_the_time_lost_to_the_busiest() -> None:
    even = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    nothing = torch.zeros(2, 1, dtype=torch.float64)
    assert _idle(even, nothing, 10.0) == 0.0
    # One of two ranks has everything: half of the ranks' time is lost.
    assert _idle(torch.tensor([[1.0], [0.0]]), nothing, 10.0) == pytest.approx(0.5)
    # Collecting for 4 of 10 s on one rank and 2 on the other loses 1 s of their mean; the steps lose nothing.
    assert _idle(even, torch.tensor([[4.0], [2.0]]), 10.0) == pytest.approx(0.1)
    # 3/4 and 1/4 of each batch: the mean is 1/2, the busiest 3/4, so a third is lost of the 6 s of steps.
    uneven = torch.tensor([[0.75], [0.25]], dtype=torch.float64)
    assert _idle(uneven, torch.tensor([[4.0], [4.0]]), 10.0) == pytest.approx(0.2)


class Named:
    def __init__(self, name: str):
        self.name = name


def turns(names: str, every: dict[str, int], batches: int) -> list[str]:
    order = Turns([Named(name) for name in names], every)  # type: ignore[list-item]
    taken = []
    for _ in range(batches):
        taken.append("".join(learner.name for learner in order))
        assert order.last.name == taken[-1][-1]
    return taken


def test_turns() -> None:
    assert turns("dg", {}, 3) == ["dg", "dg", "dg"]
    assert turns("dg", {"g": 2}, 5) == ["d", "dg", "d", "dg", "d"]
    assert turns("dg", {"d": 3}, 4) == ["g", "g", "dg", "g"]
    for every, message in [
        ({"x": 2}, "no learner 'x'"),
        ({"g": 0}, "g: 0 must be a whole number"),
        ({"g": True}, "g: True must be a whole number"),
        ([2], r"must be a mapping of learners to numbers, not \[2\]"),
        ({"d": 2, "g": 3}, "some learner must take a turn on every batch"),
    ]:
        with pytest.raises(ConfigError, match=message):
            turns("dg", every, 1)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averages_follow_and_train_nothing(decay: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = MovingAverage(model, decay)
    expected = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model[1].running_mean += 1.0
        average.update(model)
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for own, right in zip(average.average.parameters(), expected, strict=True):
        assert torch.allclose(own, right, rtol=1e-12) and not own.requires_grad
    assert torch.equal(average.average[1].running_mean, model[1].running_mean), "buffers are copied"
    assert math.isfinite(float(average.eval()(torch.zeros(1, 3).double()).sum()))
    with pytest.raises(ValueError, match="below 1"):
        MovingAverage(model, 1.0)
