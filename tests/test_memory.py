"""Replay memory: what it keeps, what it draws, and that it goes on from its state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distloop.errors import ConfigError, DataError
from distloop.memory import Priorities, ReplayMemory


def rows(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.arange(first, first + count)
    return numbers.float()[:, None] * torch.ones(3), numbers


@given(st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=8))
def test_it_holds_the_newest_rows(capacity: int, sizes: list[int]) -> None:
    memory, added = ReplayMemory(capacity, seed=0), 0
    for size in sizes:
        memory.add(*rows(added, size))
        added += size
    assert len(memory) == min(added, capacity)
    if added:
        observations, numbers = memory.draw(400).rows
        newest = set(range(max(0, added - capacity), added))
        assert set(numbers.tolist()) <= newest
        assert torch.equal(observations, numbers.float()[:, None].expand(-1, 3)), "fields stay together"
        if capacity <= 4:
            assert set(numbers.tolist()) == newest, "400 draws of at most 4 miss none"


def test_draws_are_uniform_and_arithmetic() -> None:
    memory = ReplayMemory(10, seed=1)
    memory.add(*rows(0, 10))
    first = memory.draw(20_000)
    counts = torch.bincount(first.rows[1], minlength=10)
    assert float(counts.min()) > 1800 and float(counts.max()) < 2200, "2000 of each, within 5 standard deviations"
    assert torch.equal(first.weights, torch.ones(20_000))
    assert not torch.equal(memory.draw(50).places, first.places[:50]), "the next draw is another one"
    again, other = ReplayMemory(10, seed=1), ReplayMemory(10, seed=2)
    for twin in (again, other):
        twin.add(*rows(0, 10))
    assert torch.equal(again.draw(20_000).places, first.places)
    assert not torch.equal(other.draw(20_000).places, first.places)


@pytest.mark.parametrize("exponent", [0.0, 0.6])
def test_it_goes_on_from_its_state(exponent: float) -> None:
    memory = ReplayMemory(8, seed=3, priority_exponent=exponent)
    memory.add(*rows(0, 11))
    drawn = memory.draw(5)
    memory.prioritise(drawn.places, torch.rand(5) + 0.1)
    state = {key: value.clone() for key, value in memory.state_dict().items()}
    again = ReplayMemory(8, seed=3, priority_exponent=exponent)
    again.load_state_dict(state)
    for one in (memory, again):
        one.add(*rows(11, 3))
    for _ in range(3):
        one, other = memory.draw(16), again.draw(16)
        assert torch.equal(one.places, other.places) and torch.equal(one.weights, other.weights)
        assert all(torch.equal(a, b) for a, b in zip(one.rows, other.rows, strict=True))


def test_priorities_are_proportional_and_corrected() -> None:
    memory = ReplayMemory(4, seed=0, priority_exponent=0.5, correction=0.4)
    memory.add(*rows(0, 3))
    memory.prioritise(torch.tensor([0, 1, 2]), torch.tensor([1.0, 4.0, 16.0]))  # to the power of 1/2: 1, 2, 4
    draw = memory.draw(70_000)
    counts = torch.bincount(draw.places, minlength=4).tolist()
    for count, expected in zip(counts, [10_000, 20_000, 40_000, 0], strict=True):
        assert abs(count - expected) <= 5 * expected**0.5
    # (N P(i)) ** -0.4 over the largest of them, which belongs to the least likely
    expected = torch.tensor([1.0, 2.0**-0.4, 4.0**-0.4])
    assert torch.allclose(draw.weights, expected[draw.places], rtol=1e-6)
    assert memory.least() == pytest.approx(3 / 7)
    memory.floor = 0.3 * 3 / 7  # another rank's memory has a rarer row
    corrected = memory.draw(100)
    assert torch.allclose(corrected.weights, 0.3**0.4 * expected[corrected.places], rtol=1e-6)
    memory.add(*rows(3, 1))
    assert float(memory._priorities.leaves[3]) == 4.0, "a new row has the largest priority so far"  # type: ignore[union-attr]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20).filter(any), st.integers(0, 10**6))
def test_the_tree_finds_what_the_running_sum_says(numbers: list[float], seed: int) -> None:
    tree = Priorities(len(numbers))
    tree.put(range(len(numbers)), numbers)
    assert tree.total == pytest.approx(sum(numbers))
    chance = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    running = torch.tensor(numbers, dtype=torch.float64).cumsum(0)
    expected = torch.searchsorted(running, chance * running[-1], right=True)
    found = tree.find(chance)
    for place, right, at in zip(found.tolist(), expected.tolist(), (chance * running[-1]).tolist(), strict=True):
        edge = min(abs(at - float(r)) for r in running)
        assert place == right or edge < 1e-9, "but for rounding at the edge of a stretch"
        assert numbers[place] > 0, "what has no weight is never found"


def test_bad_memories() -> None:
    with pytest.raises(ConfigError, match="capacity 0 is too small"):
        ReplayMemory(0, seed=0)
    with pytest.raises(ConfigError, match=r"priority exponent 1.5 must be from 0 to 1"):
        ReplayMemory(4, seed=0, priority_exponent=1.5)
    memory = ReplayMemory(4, seed=0)
    with pytest.raises(DataError, match="nothing to draw"):
        memory.draw(1)
    with pytest.raises(DataError, match="different lengths"):
        memory.add(torch.zeros(2, 3), torch.zeros(3))
    memory.add(*rows(0, 2))
    with pytest.raises(DataError, match="do not fit those it holds"):
        memory.add(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(DataError, match="does not fit a capacity of 1"):
        ReplayMemory(1, seed=0).load_state_dict(memory.state_dict())
    with pytest.raises(DataError, match="another priority exponent"):
        ReplayMemory(4, seed=0, priority_exponent=0.5).load_state_dict(memory.state_dict())
