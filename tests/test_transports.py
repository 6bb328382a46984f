"""One contract for all transports, and what the thread transport promises beyond it."""

from __future__ import annotations

import pytest
import torch

from distloop.collectives import ALL_REDUCE
from distloop.errors import RankDiedError, RankHungError
from distloop.messages import gather_json, gather_uneven
from distloop.transports import Alone, ThreadCluster, Transport
from tests.ranks import in_processes, in_threads


def contract(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    # Messages of one channel arrive in order, whatever the order in which they are waited for.
    following, before = (rank + 1) % size, (rank - 1) % size
    if size > 1:
        sent = [transport.isend(torch.full((3,), 10.0 * rank + i), following) for i in range(2)]
        got = [torch.empty(3), torch.empty(3)]
        waits = [transport.irecv(tensor, before) for tensor in got]
        for wait in reversed(waits):
            wait.wait()
        for work in sent:
            work.wait()
        assert [float(tensor[0]) for tensor in got] == [10.0 * before, 10.0 * before + 1]
    # Two gathers under way do not mix, nor with point-to-point messages.
    first = transport.all_gather(torch.tensor([rank, 1.0], dtype=torch.float64))
    second = transport.all_gather(torch.tensor([rank, 2.0], dtype=torch.float64))
    assert second.wait().tolist() == [[r, 2.0] for r in range(size)]
    assert first.wait().tolist() == [[r, 1.0] for r in range(size)]
    tensor = torch.full((4,), float(rank))
    transport.broadcast(tensor, root=size - 1)
    assert tensor.tolist() == [size - 1.0] * 4
    for all_reduce in ALL_REDUCE.values():
        for n in (1, 5, 1000):
            tensor = torch.arange(n, dtype=torch.float64) * (rank + 1)
            all_reduce(transport, tensor)
            assert torch.equal(tensor, torch.arange(n, dtype=torch.float64) * size * (size + 1) / 2)
    assert gather_json(transport, {"rank": rank, "text": "ü" * rank}) == [
        {"rank": r, "text": "ü" * r} for r in range(size)
    ]
    parts = gather_uneven(transport, torch.full((rank, 2), rank))
    assert [p.tolist() for p in parts] == [[[r, r]] * r for r in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_contract_in_threads(size: int) -> None:
    in_threads(size, contract)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_contract_in_threads_one_at_a_time(size: int) -> None:
    ThreadCluster(size, ordered=True).run(contract)


@pytest.mark.parametrize("size", [2, 3])
def test_contract_in_gloo_processes(size: int) -> None:
    in_processes(size, contract)


def test_a_failing_thread_wakes_the_others() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 1:
            raise ValueError("rank 1 has a bug")
        transport.recv(torch.empty(1), 1)

    with pytest.raises(ValueError, match="rank 1 has a bug"):
        ThreadCluster(3).run(work)


def test_silence_is_an_error_that_names_the_rank() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 0:
            transport.recv(torch.empty(1), 1)

    with pytest.raises(RankHungError, match="rank 0 heard nothing from rank 1"):
        ThreadCluster(2, timeout=0.1).run(work)


def test_a_mismatched_message_is_refused() -> None:
    def work(transport: Transport) -> None:
        if transport.rank == 0:
            transport.send(torch.zeros(3), 1)
        else:
            transport.recv(torch.zeros(4), 0)

    with pytest.raises(RuntimeError, match=r"expected \(4,\)"):
        ThreadCluster(2).run(work)


def test_alone_there_is_nobody_to_talk_to() -> None:
    with pytest.raises(ValueError, match="no rank 1"):
        Alone().send(torch.zeros(1), 1)
    assert issubclass(RankDiedError, Exception)
