"""Samples that are drawn at random as they are read: the same however they are read, and without a trace."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from distloop.data import Batches, Minibatch
from distloop.draws import seed_all, without_trace
from distloop.errors import DataError
from distloop.loading import Fetch, Loading, Request
from distloop.plan import Plan
from distloop.uneven import PerRank, UnevenBatches
from distloop.world import World

Sample = tuple[int, float, float, float, float]


class Augmented:
    """Draws from all three generators, and from some samples not at all."""

    def __init__(self, samples: int = 30):
        self.samples, self.read = samples, 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Sample:
        self.read += 1
        if index % 5 == 0:
            return index, 0.0, 0.0, 0.0, 0.0
        # An odd number of normals: numpy makes two at once and keeps the second, which the next sample must not get.
        return index, float(torch.rand(())), random.gauss(0.0, 1.0), np.random.rand(), np.random.randn()


class Together(Augmented):
    """Draws for a batch at once."""

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        shift = float(torch.rand(()))
        return [(index, shift, *self[index][2:]) for index in indices]


def listed(items: list[Sample]) -> list[Sample]:
    return items


def flat(minibatches: Iterator[Minibatch]) -> list[Sample]:
    return [sample for minibatch in minibatches for m in minibatch if m.batch is not None for sample in m.batch]


def read(
    data: Any = None, *, ranks: int = 1, epoch: int = 3, start: int = 0, micro: int = 4, **more: Any
) -> list[Sample]:
    """Return what all ranks read, each global batch in the order of samples."""
    batches = Batches(data or Augmented(), Plan(30, 8, micro), seed=7, collate=listed, **more)
    by_rank = [
        [flat(iter([m])) for m in batches.extract(epoch, World(rank, ranks, rank, ranks), start)]
        for rank in range(ranks)
    ]
    return [sample for parts in zip(*by_rank, strict=True) for part in parts for sample in part]


@pytest.mark.parametrize("kind", [Augmented, Together])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_no_difference(kind: type[Augmented], workers: int) -> None:
    for prefetch in (1, 3):
        assert read(kind(), loading=Loading(workers, prefetch)) == read(kind())


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_ranks_and_micro_batches_make_no_difference(ranks: int, micro: int) -> None:
    assert read(ranks=ranks, micro=micro) == read()


@pytest.mark.parametrize("kind", [Augmented, Together])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_was_left(kind: type[Augmented], workers: int) -> None:
    whole = read(kind())
    for start in range(5):
        data = kind()
        assert read(data, start=start, loading=Loading(workers)) == whole[8 * start :]
        assert workers or data.read == 30 - min(8 * start, 30), "what is passed over is not read"


def test_samples_epochs_and_seeds_draw_differently() -> None:
    drawn = [sample[1:] for epoch in range(3) for sample in read(epoch=epoch) if sample[0] % 5]
    assert len(drawn) == len(set(drawn)) == 72
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == 72
    uniform = {u for _, _, u, _ in drawn} | {u for u, *_ in drawn}
    assert len(uniform) == 144, "torch's numbers are not numpy's"


def draw() -> tuple[float, ...]:
    return float(torch.rand(())), random.gauss(0.0, 1.0), random.random(), np.random.randn(), np.random.rand()


def drawing(read_in_between: Callable[[], Any]) -> list[tuple[float, ...]]:
    """Return what training draws, with something read before every draw."""
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    drawn = []
    for _ in range(5):
        read_in_between()
        drawn.append(draw())
    return drawn


@pytest.mark.parametrize("kind", [Augmented, Together])
@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_no_trace(kind: type[Augmented], workers: int) -> None:
    batches = Batches(kind(), Plan(30, 8), collate=listed, loading=Loading(workers))
    undisturbed = drawing(lambda: None)
    minibatches = batches.extract(0, World())
    assert drawing(lambda: next(minibatches, None)) == undisturbed
    assert drawing(lambda: batches.first(4)) == undisturbed
    assert drawing(lambda: [seed_all(0, 1) for _ in "once"]) != undisturbed, "this test can fail"


class Unreadable(Augmented):
    def __getitem__(self, index: int) -> Sample:
        draw()
        raise OSError("truncated file")


def test_a_failed_reading_leaves_no_trace() -> None:
    fetch = Fetch(Unreadable())

    def fail() -> None:
        with pytest.raises(DataError, match="reading sample 4 failed: OSError: truncated file"):
            fetch(Request(torch.tensor([4])))

    assert drawing(fail) == drawing(lambda: None)


class Nested(Augmented):
    """Reads another data set in between."""

    inner = Fetch(Augmented(), listed)

    def __getitem__(self, index: int) -> Sample:
        before = np.random.randn()
        self.inner(Request(torch.tensor([1, 2, 3])))
        return index, float(torch.rand(())), random.gauss(0.0, 1.0), before, np.random.randn()


def test_readings_within_readings_leave_no_trace() -> None:
    alone, nested = Fetch(Twice(), listed), Fetch(Nested(), listed)
    request = Request(torch.tensor([4, 7]), 5)
    assert nested(request) == alone(request)
    assert drawing(lambda: nested(request)) == drawing(lambda: None)


class Twice(Augmented):
    """Draws as Nested does."""

    def __getitem__(self, index: int) -> Sample:
        before = np.random.randn()
        return index, float(torch.rand(())), random.gauss(0.0, 1.0), before, np.random.randn()


def test_a_bit_generator_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    found = np.random.get_bit_generator()
    expected = read()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        np.random.randn()  # of two, the second is kept
        state = np.random.get_state(legacy=False)
        assert read() == expected
        assert np.random.get_state(legacy=False) == state
        own = np.random.randn(), np.random.randn()
        np.random.set_state(state)
        assert own == (np.random.randn(), np.random.randn())
    finally:
        np.random.set_bit_generator(found)


def test_ranks_that_are_threads_read_one_at_a_time() -> None:
    expected, results = read(), []
    found = np.random.get_bit_generator()
    threads = [threading.Thread(target=lambda: results.append(read())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 3
    assert np.random.get_bit_generator() is found


def test_plain_tensors_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("seeded")

    monkeypatch.setattr("distloop.loading.seed_all", refuse)
    monkeypatch.setattr("distloop.loading.without_trace", refuse)
    data = torch.utils.data.TensorDataset(torch.arange(30))
    batches = Batches(data, Plan(30, 8))
    assert sum(len(m.batch[0]) for minibatch in batches.extract(0, World()) for m in minibatch) == 30
    with pytest.raises(AssertionError, match="seeded"):
        read()


@pytest.mark.parametrize("weighed", [False, True])
def test_samples_of_each_ranks_own_go_on_too(weighed: bool) -> None:
    """In passes, each of which draws for itself."""
    more: Any = {"weighers": {"model": len}} if weighed else {}
    batches = UnevenBatches(
        PerRank(Augmented(13), passes=3), [13], global_batch_size=4, micro_batch_size=3, seed=2, collate=listed, **more
    )
    whole = list(batches.extract(1, World()))
    assert len(whole) == batches.steps == 12
    samples = flat(iter(whole))
    assert sorted(s[0] for s in samples) == sorted([*range(13)] * 3)
    assert len({s for s in samples if s[0] % 5}) == 30, "ten draw, anew in each pass"
    for start in (0, 1, 3, 4, 5, 11, 12):
        tail = list(batches.extract(1, World(), start))
        assert [m.position for m in tail] == [m.position for m in whole[start:]]
        assert flat(iter(tail)) == flat(iter(whole[start:]))
        shares = [[micro.share("model") for micro in m] for m in tail]
        assert shares == [[micro.share("model") for micro in m] for m in whole[start:]]
    with pytest.raises(DataError, match="has 12 global batches; it cannot begin after 13"):
        next(batches.extract(1, World(), 13))


def test_nothing_of_what_is_passed_over_is_weighed() -> None:
    weighed: list[int] = []

    def weigh(batch: list[Sample]) -> float:
        weighed.append(len(batch))
        return float(len(batch))

    batches = Batches(Augmented(), Plan(30, 8), collate=listed, weighers={"model": weigh})
    (last,) = batches.extract(0, World(), 3)
    assert weighed == [6] and last.position == (3, 6, True) and last.micro_batches[0].share("model") == 1.0


def test_requests_are_handed_out_as_far_as_workers_read_ahead() -> None:
    """An epoch of any length is not listed for them."""

    class Endless(Augmented):
        def __len__(self) -> int:
            return 10**12

    plan = Plan(10**12, 4)
    batches = Batches(Endless(), plan, collate=listed, loading=Loading(2, 2))
    first = next(batches.extract(0, World()))
    assert (
        first.micro_batches[0].batch
        == next(Batches(Endless(), plan, collate=listed).extract(0, World())).micro_batches[0].batch
    )


def test_without_trace_is_a_scope() -> None:
    def scope() -> None:
        with without_trace():
            seed_all(1, 2)
            draw()

    assert drawing(scope) == drawing(lambda: None)
