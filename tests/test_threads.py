"""Ranks that are threads: one at a time in an order that never changes; delayed, killed, silent; gone at the end."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from distloop.errors import RankDiedError, RankHungError
from distloop.transports import ThreadCluster, Transport
from tests.test_transports import contract

HOUR = 3600.0  # a timeout that a test would not survive


def send(transport: Transport, value: float, to: int, tag: int = 0) -> None:
    transport.send(torch.tensor([value]), to, tag)


def receive(transport: Transport, source: int, tag: int = 0) -> float:
    box = torch.empty(1)
    transport.recv(box, source, tag)
    return float(box)


def test_the_baton_goes_round_and_not_to_whom_a_message_came_first() -> None:
    seen: list[str] = []

    def work(transport: Transport) -> None:
        rank = transport.rank
        seen.append(f"{rank} begins")
        if rank == 0:
            receive(transport, 2)
            for to in (2, 1):  # rank 2's message is there first, and yet it is rank 1's turn
                send(transport, 0.0, to)
            seen.append("0 goes on, with messages sent")
            send(transport, 0.0, 0)
            receive(transport, 0)  # it is there: no hand-over
        else:
            if rank == 2:
                send(transport, 0.0, 0)
            seen.append(f"{rank} waits")
            receive(transport, 0)
        seen.append(f"{rank} ends")

    for _ in range(20):
        seen.clear()
        ThreadCluster(3, HOUR, ordered=True).run(work)
        assert seen == [
            "0 begins",
            *("1 begins", "1 waits"),
            *("2 begins", "2 waits"),
            *("0 goes on, with messages sent", "0 ends"),
            "1 ends",
            "2 ends",
        ]


def program(seed: int, size: int, messages: int) -> list[tuple[int, int, int]]:
    """Return source, destination and tag of messages that can be sent and received in this order."""
    dice = random.Random(seed)
    return [(dice.randrange(size), dice.randrange(size), dice.randrange(2)) for _ in range(messages)]


@pytest.mark.parametrize("seed", range(5))
def test_any_program_runs_the_same_way_twice_and_hears_the_same_out_of_order(seed: int) -> None:
    size, steps = 5, program(seed, 5, 120)
    seen: list[tuple[int, int]] = []

    def work(transport: Transport) -> list[float]:
        heard = []
        for i, (source, to, tag) in enumerate(steps):
            if transport.rank == source:
                seen.append((transport.rank, i))
                send(transport, float(i), to, tag)
            if transport.rank == to:
                heard.append(receive(transport, source, tag))
                seen.append((transport.rank, i))
        return heard

    first = ThreadCluster(size, HOUR, ordered=True).run(work)
    assert first == [[float(i) for i, (_, to, _) in enumerate(steps) if to == rank] for rank in range(size)]
    order = seen.copy()
    seen.clear()
    assert ThreadCluster(size, HOUR, ordered=True).run(work) == first and seen == order
    dice = random.Random(seed)
    assert ThreadCluster(size, 20, delay=lambda *_: dice.random() / 500).run(work) == first


def draws() -> list[float]:
    return [float(torch.rand(())), random.random(), float(np.random.rand())]


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def test_every_rank_draws_its_own_numbers() -> None:
    def work(transport: Transport) -> list[list[float]]:
        before = draws()
        transport.all_gather(torch.zeros(1)).wait()
        seed_everything(transport.rank)
        drawn = []
        for _ in range(3):
            transport.all_gather(torch.zeros(1)).wait()
            drawn.append(draws())
        return [before, *drawn]

    def alone(rank: int) -> list[list[float]]:
        seed_everything(99)
        before = draws()
        seed_everything(rank)
        return [before, *(draws() for _ in range(3))]

    expected = [alone(rank) for rank in range(3)]
    assert expected[1][1] != expected[2][1]
    seed_everything(99)
    assert ThreadCluster(3, HOUR, ordered=True).run(work) == expected
    after = draws()
    alone(0)
    assert after == draws(), "the process goes on as rank 0"


def test_a_deadlock_is_found_at_once_and_says_who_waits_for_whom() -> None:
    def work(transport: Transport) -> None:
        receive(transport, (transport.rank + 1) % 3, tag=transport.rank)

    cluster = ThreadCluster(3, HOUR, ordered=True)
    everyone = "rank 0 waits for rank 1 (tag 0), rank 1 waits for rank 2 (tag 1), rank 2 waits for rank 0 (tag 2)"
    with pytest.raises(RankHungError) as caught:
        cluster.run(work)
    assert str(caught.value) == f"deadlock: {everyone}"
    assert caught.value.exit_code == 11
    assert {rank: type(error) for rank, error in cluster.errors.items()} == dict.fromkeys(range(3), RankHungError)


def test_to_wait_for_a_rank_that_has_ended_is_a_deadlock() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 0:
            receive(transport, 1, tag=7)

    with pytest.raises(RankHungError, match=r"^deadlock: rank 0 waits for rank 1 \(tag 7, which has ended\)$"):
        ThreadCluster(2, HOUR, ordered=True).run(work)


ROUNDS = 4


def rounds(transport: Transport) -> float:
    """Gather, reduce to rank 0, and send back."""
    total = torch.zeros(1)
    for _ in range(ROUNDS):
        total += transport.all_gather(torch.ones(1)).wait().sum(0)
        if transport.rank == 0:
            for peer in transport.peers():
                receive(transport, peer)
        else:
            send(transport, 1.0, 0)
        transport.broadcast(total)
    return float(total)


PER_ROUND = 3  # messages of rank 1 of three: two of the gather, one to rank 0


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("messages", range(ROUNDS * PER_ROUND))
def test_a_rank_may_die_at_any_message(messages: int, ordered: bool) -> None:
    cluster = ThreadCluster(3, HOUR, ordered=ordered, failures={1: messages})
    with pytest.raises(RankDiedError, match=f"^rank 1 died after {messages} messages"):
        cluster.run(rounds)
    assert next(iter(cluster.errors)) == 1
    if messages < ROUNDS * PER_ROUND - 1:
        assert set(cluster.errors) == {0, 1, 2}
    for rank, error in cluster.errors.items():
        if rank != 1:
            assert isinstance(error, RankDiedError)
            assert f"rank {rank} stopped waiting for rank" in str(error) and "rank 1 failed" in str(error)
    assert ThreadCluster(3, HOUR, ordered=ordered, failures={1: 1000}).run(rounds) == [3.0 * ROUNDS] * 3


@pytest.mark.parametrize("messages", [0, 1, 2, 3])
def test_the_others_find_out_that_a_rank_is_silent(messages: int) -> None:
    cluster = ThreadCluster(3, 0.2, silent={1: messages})
    with pytest.raises(RankHungError, match=r"rank \d (heard nothing from|waits for) rank 1 \(tag [01]\)") as caught:
        cluster.run(rounds)
    assert "for 0.2 s" in str(caught.value)
    with pytest.raises(RankHungError, match=r"^deadlock: .*rank \d waits for rank 1 \(tag [01]\)"):
        ThreadCluster(3, HOUR, ordered=True, silent={1: messages}).run(rounds)


def test_who_waits_for_a_silent_ranks_victim_is_told_so() -> None:
    def work(transport: Transport) -> None:
        if transport.rank != 1:
            receive(transport, 0 if transport.rank == 2 else 1)

    with pytest.raises(RankHungError) as caught:
        ThreadCluster(3, 0.2).run(work)
    for part in (
        "from rank 1 (tag 0" if "rank 0 heard" in str(caught.value) else "rank 0 waits for rank 1 (tag 0",
        "; ",
    ):
        assert part in str(caught.value)


def test_the_contract_holds_with_delays() -> None:
    seen: set[tuple[int, int, int, int]] = set()

    def delay(source: int, to: int, tag: int, size: int) -> float:
        seen.add((source, to, tag, size))
        return ((source * 7 + to * 3 + size) % 5) / 2000

    ThreadCluster(3, 20, delay=delay).run(contract)
    assert (0, 1, 0, 12) in seen and (2, 0, 1, 16) in seen
    assert {source for source, *_ in seen} == {0, 1, 2}
    seen.clear()
    ThreadCluster(3, HOUR, ordered=True, delay=delay).run(contract)
    assert not seen, "time has no part in order"


def test_a_message_comes_after_its_delay_and_does_not_overtake() -> None:
    delays = iter([0.2, 0.0])

    def work(transport: Transport) -> tuple[list[float], float]:
        if transport.rank == 1:
            begun = time.monotonic()
            send(transport, 1.0, 0)
            send(transport, 2.0, 0)
            return [], begun
        boxes = [torch.empty(1), torch.empty(1)]
        works = [transport.irecv(box, 1) for box in boxes]
        works[1].wait()
        there = time.monotonic()
        works[0].wait()
        return [float(box) for box in boxes], there

    (heard, there), (_, begun) = ThreadCluster(2, 20, delay=lambda *_: next(delays)).run(work)
    assert heard == [1.0, 2.0]
    assert there - begun >= 0.2
    with pytest.raises(RankHungError, match="heard nothing from rank 1"):
        ThreadCluster(2, 0.1, delay=lambda *_: 5.0).run(work)


@pytest.mark.parametrize("ordered", [True, False])
def test_messages_are_copies(ordered: bool) -> None:
    def work(transport: Transport) -> float:
        if transport.rank == 0:
            tensor = torch.ones(3)[::2].requires_grad_()
            transport.isend(tensor, 1)
            with torch.no_grad():
                tensor.zero_()
            send(transport, 0.0, 1, tag=1)
            return 0.0
        receive(transport, 0, tag=1)
        box = torch.empty(2)
        transport.recv(box, 0)
        return float(box.sum())

    assert ThreadCluster(2, 20, ordered=ordered).run(work)[1] == 2.0


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("fails", [None, 0, 2])
def test_no_thread_is_left_and_the_first_failure_is_raised(ordered: bool, fails: int | None) -> None:
    before = set(threading.enumerate())
    names: list[str] = []

    def work(transport: Transport) -> int:
        names.append(threading.current_thread().name)
        assert transport.overlaps is not ordered
        if transport.rank == fails:
            raise ValueError(f"rank {fails} has a bug")
        transport.all_gather(torch.zeros(1)).wait()
        return transport.rank

    cluster = ThreadCluster(3, HOUR, ordered=ordered)
    if fails is None:
        assert cluster.run(work) == [0, 1, 2] and cluster.errors == {}
    else:
        with pytest.raises(ValueError, match=f"rank {fails} has a bug"):
            cluster.run(work)
        told = f"rank {fails} failed with ValueError: rank {fails} has a bug"
        others = {rank: str(error) for rank, error in cluster.errors.items() if rank != fails}
        assert set(others) == {0, 1, 2} - {fails} and all(text.endswith(told) for text in others.values())
    assert set(threading.enumerate()) == before
    first = threading.current_thread().name if ordered else "rank 0"
    assert sorted(names) == sorted([first, "rank 1", "rank 2"])


def test_an_interrupt_reaches_rank_0_while_another_rank_runs() -> None:
    cluster = ThreadCluster(2, HOUR, ordered=True)

    def work(transport: Transport) -> Any:
        if transport.rank == 0:
            return receive(transport, 1)
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 20
        while 0 not in cluster.errors and time.monotonic() < deadline:
            time.sleep(0.001)
        return receive(transport, 0)

    with pytest.raises(KeyboardInterrupt):
        cluster.run(work)
    assert "rank 0 failed with KeyboardInterrupt" in str(cluster.errors[1])
