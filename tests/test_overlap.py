"""Sending while backward runs: what leaves when, in which order, and what happens when something goes wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distloop.collectives import ALL_REDUCE
from distloop.errors import ConfigError, RankDiedError, RankHungError
from distloop.strategies import Options, make
from distloop.strategies.all_reduce import BucketedAllReduce
from distloop.strategies.buckets import Capacity, fill
from distloop.strategies.lane import Lane
from distloop.transports import ThreadCluster, Transport
from tests.ranks import in_threads

# -- the lane --------------------------------------------------------------------------------------------------------


def lane_of(order: list[int], work: Callable[[int], None] = lambda number: None) -> Lane:
    def send(number: int) -> None:
        work(number)
        order.append(number)

    return Lane(send, threaded=True)


def test_buckets_are_sent_in_order_and_beside_the_caller() -> None:
    order: list[int] = []
    threads: set[str] = set()
    lane = lane_of(order, lambda number: threads.add(threading.current_thread().name))
    for _ in range(50):
        order.clear()
        lane.start()
        for count in (1, 3, 4):
            lane.ready(count)
        time.sleep(1e-3)  # as if backward went on
        lane.ready(5, soon_awaited=True)
        for number in range(5):
            lane.wait(number)
            assert order[: number + 1] == list(range(number + 1))
        assert order == list(range(5))
    lane.close()
    assert "collecting gradients" in threads


def test_what_is_awaited_is_not_left_to_a_thread_that_sleeps() -> None:
    order: list[int] = []
    lane = lane_of(order)
    lane.start()
    lane.ready(1, soon_awaited=True)
    lane.wait(0)
    assert lane._thread is None, "no thread was needed"


def test_a_failure_reaches_whoever_waits() -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise RankDiedError("rank 7 has ended")

    lane = lane_of([], fail)
    lane.start()
    lane.ready(3)
    for number in (1, 2, 2):
        with pytest.raises(RankDiedError, match="rank 7"):
            lane.wait(number)
    lane.close()


def test_the_thread_is_gone_after_close() -> None:
    before = threading.active_count()
    lane = lane_of([])
    lane.start()
    lane.ready(1)
    lane.wait(0)
    assert threading.active_count() == before + 1
    lane.close()
    assert threading.active_count() == before


# -- buckets ---------------------------------------------------------------------------------------------------------


def parameters_of(*sizes: int) -> dict[str, nn.Parameter]:
    return {f"p{i}": nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)}


def dealt(capacity: Capacity, *sizes: int) -> list[list[int]]:
    """Return the numbers of elements in each bucket."""
    return [[p.numel() for p in bucket.values()] for bucket in fill(parameters_of(*sizes), capacity)]


def test_buckets_hold_what_they_may() -> None:
    assert dealt(Capacity(400), 50, 50, 50, 50) == [[50, 50], [50, 50]]
    assert dealt(Capacity(400), 10, 200, 50, 50) == [[50, 50], [200], [10]], "a larger parameter has one of its own"
    tapered = dealt(Capacity(1600, least=400), *[100] * 20)
    assert [len(bucket) for bucket in tapered] == [1, 4, 3, 3, 2, *[1] * 7], "a quarter of what is left at most"
    assert dealt(Capacity(400, least=100), 10, 10) == [[10, 10]]
    every = fill(parameters_of(3, 1, 4, 1, 5, 9, 2, 6), Capacity(20, least=8))
    assert [name for bucket in every for name in bucket] == [f"p{i}" for i in range(7, -1, -1)]


def test_buckets_are_of_one_dtype() -> None:
    mixed = parameters_of(4, 4) | {"half": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))}
    assert [list(bucket) for bucket in fill(mixed, Capacity(1 << 20))] == [["half"], ["p1", "p0"]]


# -- the strategy ----------------------------------------------------------------------------------------------------


class Slow(torch.autograd.Function):
    """Hands a tensor through, and notes when its gradient comes by; backward then takes a while."""

    @staticmethod
    def forward(ctx, x: Tensor, note: Callable[[], None]) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.note = note
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def, override]
        ctx.note()
        time.sleep(0.05)
        return gradient, None


def watched(
    transport: Transport, events: list[str], plant: Callable[[Transport, Tensor], None] | None = None
) -> tuple[dict[str, nn.Parameter], BucketedAllReduce]:
    """Return three parameters in a bucket each, and a strategy that notes what it sends."""
    parameters = {f"layer{i}": nn.Parameter(torch.full((10 + i,), 0.5)) for i in range(3)}

    def all_reduce(to: Transport, tensor: Tensor) -> None:
        events.append(f"send {len(tensor) - 10}")
        (plant or ALL_REDUCE["direct"])(to, tensor)

    choose = lambda flat: ("direct", all_reduce)  # noqa: E731
    return parameters, BucketedAllReduce(parameters, transport, Options(), choose, Capacity(1))


def loss_of(parameters: dict[str, nn.Parameter], events: list[str]) -> Tensor:
    x = torch.ones(())
    for i, p in enumerate(parameters.values()):
        x = Slow.apply(x * p.sum(), lambda i=i: events.append(f"backward {i}"))
    return x


def overlapped(transport: Transport) -> list[str]:
    events: list[str] = []
    parameters, strategy = watched(transport, events)
    strategy.backward(loss_of(parameters, events), 0.5, final=False)
    events.append("next micro-batch")
    strategy.backward(loss_of(parameters, events), 0.5, final=True)
    events.append("collect")
    for i, gradients in strategy.collect():
        assert torch.isfinite(gradients[0]).all()
        events.append(f"apply {2 - i}")
    strategy.settle()
    assert all(not p.grad.any() for p in parameters.values())
    strategy.close()
    return events


@pytest.mark.alone
def test_a_bucket_leaves_while_backward_goes_on() -> None:
    for events in in_threads(2, overlapped):
        before, after = events[: events.index("next micro-batch")], events[events.index("next micro-batch") :]
        assert not [event for event in before if event.startswith("send")], "only the final backward sends"
        assert [e for e in after if e.startswith("send")] == ["send 2", "send 1", "send 0"]
        assert after.index("send 2") < after.index("backward 0"), "the first is on the wire before the last is computed"
        assert after.index("send 1") < after.index("collect")
        assert [e for e in after if e.startswith("apply")] == ["apply 2", "apply 1", "apply 0"]


def in_another_order(transport: Transport) -> list[str]:
    """Complete the gradients in the other order: buckets must still leave in theirs."""
    events: list[str] = []
    parameters, strategy = watched(transport, events)
    backwards = dict(reversed(parameters.items())) if transport.rank else parameters
    strategy.backward(loss_of(backwards, events), 1.0, final=True)
    expected = torch.autograd.grad(loss_of(backwards, []), list(parameters.values()))
    for i, gradients in strategy.collect():
        torch.testing.assert_close(gradients[0], transport.size * expected[2 - i])
    strategy.settle()
    strategy.close()
    return [event for event in events if event.startswith("send")]


def test_buckets_leave_in_one_order_on_all_ranks() -> None:
    assert in_threads(3, in_another_order) == [["send 2", "send 1", "send 0"]] * 3


def missed(transport: Transport) -> dict[str, list[float]]:
    """One rank's loss does not reach the middle parameter, nobody's the first."""
    parameters, strategy = watched(transport, [])
    reached = [p for name, p in parameters.items() if name == "layer2" or (name == "layer1" and transport.rank == 1)]
    strategy.backward(torch.stack([p.sum() for p in reached]).sum(), 1.0, final=True)
    found = {strategy.shards[i][0].name: g[0].tolist() for i, g in strategy.collect()}
    strategy.settle()
    strategy.close()
    return found


def test_what_no_loss_reaches_is_sent_as_zeros() -> None:
    for found in in_threads(3, missed):
        assert found == {"layer2": [3.0] * 12, "layer1": [1.0] * 11, "layer0": [0.0] * 10}


def replaced(transport: Transport) -> list[str]:
    events: list[str] = []
    parameters, strategy = watched(transport, events)
    parameters["layer0"].grad = torch.zeros(10)  # the one that is sent last
    with pytest.raises(ConfigError, match="'layer0' no longer lies in its bucket"):
        strategy.backward(loss_of(parameters, events), 1.0, final=True)
    return events


def test_a_gradient_that_was_replaced_is_named_before_anything_is_sent() -> None:
    assert in_threads(2, replaced) == [[], []]


def interrupted(transport: Transport) -> list[Tensor]:
    """An overflow ends the stream of gradients early: the ranks still send all, and go on alike."""
    parameters, strategy = watched(transport, [])
    for step in range(2):
        strategy.backward(loss_of(parameters, []), 1.0, final=True)
        stream = strategy.collect()
        next(stream)
        if step == 0:
            del stream
            strategy.settle()
            assert all(not p.grad.any() for p in parameters.values())
    rest = [gradients[0].clone() for _, gradients in stream]
    strategy.settle()
    strategy.close()
    return rest


def test_an_overflow_leaves_nothing_behind() -> None:
    first, second = in_threads(2, interrupted)
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", [RankDiedError, RankHungError])
def test_a_failure_names_step_bucket_and_algorithm(kind: type[Exception]) -> None:
    def fail(transport: Transport, tensor: Tensor) -> None:
        if len(tensor) == 11:
            raise kind("rank 1 said nothing")

    def work(transport: Transport) -> None:
        parameters, strategy = watched(transport, [], fail)
        strategy.backward(loss_of(parameters, []), 1.0, final=True)
        try:
            list(strategy.collect())
        finally:
            strategy.close()

    with pytest.raises(kind, match=r"step 1, bucket 2 of 3 \(direct, 44 bytes\): rank 1 said nothing"):
        ThreadCluster(2).run(work)


def differing(transport: Transport) -> None:
    parameters = {f"p{i}": nn.Parameter(torch.zeros(30)) for i in range(3)}
    make("ring", parameters, transport, Options(bucket_mb=1e-4 if transport.rank else 1.0))


def test_ranks_with_other_buckets_stop_before_they_send() -> None:
    from distloop.errors import MismatchError

    with pytest.raises(MismatchError, match=r"ranks differ in how gradients are collected: buckets is .*90 float32"):
        ThreadCluster(2).run(differing)
