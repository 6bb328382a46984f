"""The arithmetic of who gets which sample, and the ways of reading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from distloop.data import Batches, derive_seed
from distloop.errors import ConfigError, DataError
from distloop.loading import Fetch, Loading, Request, ToDevice
from distloop.plan import Plan
from distloop.world import World
from tests.parity import permutation


@given(st.integers(1, 200), st.integers(1, 64), st.none() | st.integers(1, 64), st.integers(1, 9))
def test_every_sample_is_in_exactly_one_micro_batch(n: int, whole: int, micro: int | None, ranks: int) -> None:
    plan = Plan(n, whole, micro if micro is None else min(micro, whole))
    seen: Counter[int] = Counter()
    for step in range(plan.steps):
        shares = [plan.part(step, rank, ranks) for rank in range(ranks)]
        assert sum(map(len, shares)) == len(plan.batch(step))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1, "ranks get equally many, to within one sample"
        for rank in range(ranks):
            cuts = plan.micro_batches(step, rank, ranks)
            assert len(cuts) <= plan.accumulation(ranks)
            assert all(0 < len(cut) <= (plan.micro_batch_size or whole) for cut in cuts)
            seen.update(i for cut in cuts for i in cut)
    assert seen == Counter(range(n))


def test_accumulation_is_derived() -> None:
    assert Plan(1000, 64, 8).accumulation(4) == 2
    assert Plan(1000, 64, 8).accumulation(3) == 3
    assert Plan(1000, 64).accumulation(3) == 1
    assert Plan(10, 64, 4).accumulation(2) == 2, "of the samples that there are"


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch_size: 0"):
        Plan(10, 0)
    with pytest.raises(ConfigError, match="micro_batch_size: 9 must be from 1 to"):
        Plan(10, 8, 9)
    with pytest.raises(DataError, match="empty"):
        Batches([], Plan(0, 8))


def test_seeds_depend_on_all_their_parts() -> None:
    assert derive_seed("a", 1, 23) != derive_seed("a", 12, 3)
    assert derive_seed("a", 1) != derive_seed("a", True)


class Items(Dataset[Any]):
    """Map-style, one at a time."""

    def __init__(self, n: int = 20, bad: int | None = None):
        self.n, self.bad = n, bad

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        if index == self.bad:
            raise OSError("truncated file")
        return index, torch.tensor([float(index)])


class Many(Items):
    """Fetches lists of samples, as torch's DataLoader wants them."""

    calls = 0

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
        type(self).calls += 1
        return [self[i] for i in indices]


class Finished(Items):
    """Returns the batch itself."""

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return torch.tensor(indices), torch.tensor(indices, dtype=torch.float32)[:, None]


TENSORS = TensorDataset(torch.arange(20), torch.arange(20.0)[:, None])


@pytest.mark.parametrize(
    "samples", [TENSORS, Items(), Many(), Finished()], ids=["tensors", "items", "many", "finished"]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_all_ways_of_reading_give_the_same_batches(samples: Any, workers: int) -> None:
    batches = Batches(samples, Plan(20, 6, 2), seed=5, loading=Loading(workers=workers))
    read = [m.batch for minibatch in batches.extract(3, World(1, 2, 1, 2)) for m in minibatch]
    order = permutation(5, 3, 20)
    expected = [order[3:5], order[5:6], order[9:11], order[11:12], order[15:17], order[17:18], order[19:20]]
    assert [batch[0].tolist() for batch in read] == [e.tolist() for e in expected]
    assert [batch[1][:, 0].tolist() for batch in read] == [e.tolist() for e in expected]


class Augmented(TensorDataset):
    """A subclass with a __getitem__ of its own, which must not be passed over."""

    def __getitem__(self, index: int) -> Any:
        number, value = super().__getitem__(index)
        return number, value + 100.0


def test_a_subclass_of_tensor_dataset_is_read_by_its_own_method() -> None:
    (batch,) = (m.batch for b in Batches(Augmented(*TENSORS.tensors), Plan(20, 20)).extract(0, World()) for m in b)
    assert float(batch[1].min()) == 100.0


def test_batched_fetching_is_used_where_it_is_offered() -> None:
    Many.calls = 0
    list(Batches(Many(), Plan(20, 10)).extract(0, World()))
    assert Many.calls == 2


def test_large_tensors_are_read_batch_by_batch_and_small_ones_in_blocks() -> None:
    big = TensorDataset(torch.arange(8 * 2**20, dtype=torch.uint8).view(8, -1))
    parts = list(Fetch(big).all(map(Request, torch.arange(8).split(1))))
    assert [p[0].untyped_storage().nbytes() for p in parts] == [2 * 2**20] * 8
    small = list(Fetch(TENSORS).all(map(Request, torch.arange(20).split(3))))
    assert len({p[0].untyped_storage().data_ptr() for p in small}) == 1
    assert [p[0].tolist() for p in small] == [e.tolist() for e in torch.arange(20).split(3)]


def test_a_collate_of_the_users_own_is_used() -> None:
    fetch = Fetch(TENSORS, collate=lambda items: [int(number) for number, _ in items])
    assert fetch(Request(torch.tensor([4, 2]))) == [4, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_is_named(workers: int) -> None:
    batches = Batches(Items(bad=13), Plan(20, 4), loading=Loading(workers=workers))
    with pytest.raises(DataError, match="reading sample 13 failed: OSError: truncated file"):
        list(batches.extract(0, World()))


class Dies(Items):
    def __getitem__(self, index: int) -> Any:
        import os
        import signal

        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_worker_is_an_error_that_names_the_samples() -> None:
    batches = Batches(Dies(), Plan(20, 5), shuffle=False, loading=Loading(workers=1))
    with pytest.raises(DataError, match=r"a data worker failed at or after samples .*0, 1, 2, 3, 4"):
        list(batches.extract(0, World()))


def test_weights_must_be_numbers_that_make_sense() -> None:
    batches = Batches(TENSORS, Plan(20, 5), weighers={"model": lambda batch: float("nan")})
    with pytest.raises(DataError, match=r"'model': weight\(batch\) returned nan"):
        list(batches.extract(0, World()))


def test_shares_add_up_to_one() -> None:
    batches = Batches(TENSORS, Plan(20, 6, 2), weighers={"model": lambda batch: float(batch[0].sum())})
    for minibatch in batches.extract(0, World()):
        assert sum(m.share("model") for m in minibatch) == pytest.approx(1.0, rel=1e-15)
        assert sum(m.share("another") for m in minibatch) == pytest.approx(1.0, rel=1e-15)


def test_nested_batches_are_moved_whole() -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", "x y")
    place = ToDevice(torch.device("meta"), pin=False)
    moved = place({"a": [torch.zeros(2)], "b": Pair(torch.zeros(1), "text"), "c": (torch.zeros(3),)})
    assert moved["a"][0].is_meta and moved["b"].x.is_meta and moved["c"][0].is_meta
    assert moved["b"].y == "text"
