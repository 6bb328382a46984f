"""The order of an epoch is a permutation, and looks like one that was drawn."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from distloop import order as orders
from distloop.data import Batches, derive_seed
from distloop.errors import DataError
from distloop.order import LARGEST, Order, hashed, in_order
from distloop.plan import Plan
from distloop.world import World


def whole(seed: int, samples: int) -> Tensor:
    return Order(seed, samples)(torch.arange(samples))


def surprise(counts: Tensor) -> float:
    """Return by how many standard deviations the chi-square of counts that should be equal is off."""
    freedom, expected = counts.numel() - 1, float(counts.double().mean())
    assert expected >= 5, "too few for the chi-square distribution"
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Wilson and Hilferty (1931): the cube root is nearly normal, also for few degrees of freedom.
    return ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("samples", [*range(0, 301), 1009, 2**14 + 1, 99_999, 10**6 + 3])
def test_it_is_a_bijection(samples: int) -> None:
    positions = torch.arange(samples)
    order = Order(7 * samples + 1, samples)
    indices = order(positions)
    assert torch.equal(indices.sort().values, positions)
    assert torch.equal(order.inverse(indices), positions)


@pytest.mark.parametrize("samples", [10**9, 10**12, 10**15, LARGEST])
def test_large_ones_are_reached_anywhere(samples: int) -> None:
    order = Order(3, samples)
    positions = torch.randint(0, samples, (4096,)).unique()
    indices = order(positions)
    assert int(indices.min()) >= 0 and int(indices.max()) < samples
    assert len(indices.unique()) == len(positions)
    assert torch.equal(order.inverse(indices), positions)
    ends = torch.tensor([[0], [samples - 1]])
    assert torch.equal(order.inverse(order(ends)), ends), "of any shape"


def test_orders_are_what_they_always_were() -> None:
    """A run that goes on after an update must go through its epoch in the same order."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # SplitMix64 from 1234567
    assert [hashed(1234567, number) for number in (1, 2, 3)] == published
    assert whole(0, 10).tolist() == [0, 1, 2, 8, 7, 4, 5, 3, 9, 6]
    own = [5, 11, 14, 0, 13, 10, 3, 15, 7, 8, 9, 18, 17, 20, 19, 1, 12, 2, 6, 16, 4]
    assert whole(derive_seed("order", 1, 2), 21).tolist() == own
    assert Order(2**63 - 1, 10**6)(torch.tensor([0, 1, 999_999])).tolist() == [300897, 964207, 885801]
    far = [690134200320, 471050838111, 214814592549]
    assert Order(1, 10**12)(torch.tensor([0, 1, 10**12 - 1])).tolist() == far


@pytest.mark.parametrize("samples", [25, 60, 1000, 10**6, 10**12])
def test_one_by_one_is_the_same_as_many(samples: int) -> None:
    order = Order(9, samples)
    positions = torch.randint(0, samples, (64,))
    for way in (order, order.inverse):
        assert torch.equal(way(positions), torch.cat([way(p) for p in positions.split(1)]))


def test_what_is_no_position_is_refused() -> None:
    for place in (-1, 5):
        with pytest.raises(IndexError, match=f"an order of 5 samples has no place .*{place}"):
            Order(0, 5)(torch.tensor([0, place]))
    with pytest.raises(DataError, match="an order has from 0 to"):
        Order(0, LARGEST + 1)


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_small_orders_are_all_equally_likely(samples: int) -> None:
    kinds = math.factorial(samples)
    draws = 20 * max(kinds, 10)
    seen = Counter(tuple(whole(seed, samples).tolist()) for seed in range(draws))
    counts = torch.tensor([*seen.values(), *[0] * (kinds - len(seen))])
    assert len(seen) == kinds and surprise(counts) < 4.0


@pytest.mark.parametrize("samples", [9, 15, 16, 25])
def test_both_parities_occur(samples: int) -> None:
    odd = sum(int(torch.linalg.det(torch.eye(samples)[whole(seed, samples)]) < 0) for seed in range(200))
    assert surprise(torch.tensor([odd, 200 - odd])) < 4.0


def of_pairs(samples: int, seeds: int) -> dict[str, float]:
    """Return the surprises of where samples go, and of where one goes given where its neighbour went."""
    drawn = torch.stack([whole(derive_seed("pairs", seed), samples) for seed in range(seeds)])
    place = drawn + torch.arange(samples) * samples
    apart = {f"{d} apart": (drawn[:, d:] - drawn[:, :-d]) % samples for d in (1, 2, math.isqrt(samples))}
    found = {"places": surprise(place.flatten().bincount(minlength=samples**2))}
    return found | {name: surprise(x.flatten().bincount(minlength=samples)[1:]) for name, x in apart.items()}


def of_one_order(samples: int) -> dict[str, float]:
    """Return the surprises of one long order, seen as a series."""
    x = whole(derive_seed("one", samples), samples).double() / samples - 0.5
    # Of a random permutation, the correlation at a lag has deviation 1 / sqrt(n), and the number of monotone runs
    # the mean (2n - 1) / 3 and the variance (16n - 29) / 90.
    found = {f"lag {d}": float((x[d:] * x[:-d]).mean()) * 12 * math.sqrt(samples) for d in (1, 2, 3, 1000)}
    rising = x[1:] > x[:-1]
    runs = 1 + int((rising[1:] != rising[:-1]).sum())
    found["runs"] = (runs - (2 * samples - 1) / 3) / math.sqrt((16 * samples - 29) / 90)
    cells = ((x + 0.5) * 16).long()
    for d in (1, 1000):  # which sixteenth follows which
        found[f"cells {d} apart"] = surprise((cells[d:] * 16 + cells[:-d]).bincount(minlength=256))
    parts = (torch.arange(samples) * 64 // samples) * 16 + cells
    # Sixty-fourths of the order have a mixture of all samples, as even as drawing without replacement makes it.
    counts = parts.bincount(minlength=1024).double()
    expected = samples / 1024
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = 63 * 15
    found["mixture"] = (chi_square - freedom) / math.sqrt(2 * freedom)
    return found


CHECKS: list[Callable[[], dict[str, float]]] = [
    lambda: of_pairs(12, 1500),
    lambda: of_pairs(31, 1200),
    lambda: of_pairs(100, 2000),
    lambda: of_one_order(10_000),
    lambda: of_one_order(300_001),
]


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_orders_look_drawn(number: int) -> None:
    found = CHECKS[number]()
    assert all(abs(deviations) < 4.0 for deviations in found.values()), found


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_too_few_rounds_are_seen(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "rounds", lambda side: 2)
    found = CHECKS[number]()
    assert max(map(abs, found.values())) > 8.0, found


def test_epochs_and_neighbouring_seeds_are_unrelated() -> None:
    n = 10_000
    by_epoch = [whole(derive_seed("order", 0, epoch), n) for epoch in range(8)]
    by_number = [whole(number, n) for number in range(8)]
    for drawn in (by_epoch, by_number):
        for i, one in enumerate(drawn):
            for other in drawn[:i]:
                correlation = float(torch.corrcoef(torch.stack([one, other]).double())[0, 1]) * math.sqrt(n)
                assert abs(correlation) < 4.5
                assert int((one == other).sum()) < 10, "one in place is to be expected"


@pytest.mark.alone
def test_a_trillion_samples_cost_nothing() -> None:
    """Their first and their last batches are there at once, in an order or as they come."""
    samples, world = 10**12, World(1, 2, 1, 2)

    class Numbers:
        def __len__(self) -> int:
            return samples

        def __getitems__(self, indices: list[int]) -> Tensor:
            return torch.tensor(indices)

    for shuffle in (True, False):
        batches = Batches(Numbers(), Plan(samples, 32, 8), seed=1, shuffle=shuffle)
        for start in (0, batches.steps - 1):
            tracemalloc.start()
            begun = time.perf_counter()
            first = next(batches.extract(0, world, start))
            took, (_, peak) = time.perf_counter() - begun, tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert took < 1.0 and peak < 2**23
            expected = torch.arange(start * 32 + 16, start * 32 + 32)
            if shuffle:
                expected = Order(derive_seed("order", 1, 0), samples)(expected)
            assert torch.equal(torch.cat([m.batch for m in first]), expected)
    positions = torch.randint(0, samples, (2**16,))
    order, begun = Order(1, samples), time.perf_counter()
    order(positions)
    assert (time.perf_counter() - begun) / len(positions) < 5e-6


@pytest.mark.parametrize("sizes", [[0] * 700 + [3], [40_000, 1, 0, 2**14, 5], [7] * 600, []])
def test_windows_leave_nothing_out(sizes: list[int]) -> None:
    ends = np.cumsum([0, *sizes])
    cuts = [
        (k, [range(a, a + (b - a) // 3), range(a + (b - a) // 3, b)])
        for k, (a, b) in enumerate(pairwise(ends.tolist()))
    ]
    order = Order(5, int(ends[-1]))
    for chosen in (order, None):
        found = list(in_order(chosen, iter(cuts)))
        assert [k for k, _ in found] == list(range(len(sizes)))
        for (_, parts), (_, ranges) in zip(found, cuts, strict=True):
            for part, positions in zip(parts, ranges, strict=True):
                expected = torch.arange(positions.start, positions.stop)
                assert torch.equal(part, expected if chosen is None else order(expected))


def test_no_more_is_looked_up_than_a_window() -> None:
    taken = 0

    def endless() -> Iterator[tuple[int, list[range]]]:
        nonlocal taken
        while True:
            yield taken, [range(taken, taken + 1)]
            taken += 1

    next(in_order(Order(0, 10**9), endless()))
    assert taken <= orders.WINDOW_STEPS
