"""All-reduces: the right sum, the same bits on all ranks, in rank order and for as many bytes as promised."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from distloop.collectives import ALL_REDUCE, NARROW, hierarchical, ring, with_wire
from distloop.collectives.tree import owner, sum_leaves
from distloop.transports import Alone, Transport, Work
from distloop.transports import hosts as hosts_module
from distloop.transports.sockets import SocketTransport
from tests.ranks import in_processes, in_threads

IN_RANK_ORDER = ["naive", "naive_pipelined", "direct", "one_shot", "shared_memory"]
SIZES = [1, 3, 64, 1000, 70_001, 300_000]


def own_values(rank: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers whose sum depends on the order in which they are added."""
    generator = torch.Generator().manual_seed(1000 * rank + n)
    return (torch.randn(n, generator=generator, dtype=torch.float64) * 10.0 ** (rank % 3)).to(dtype)


def added_in_rank_order(size: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    total = own_values(0, n, dtype)
    for rank in range(1, size):
        total = total + own_values(rank, n, dtype)
    return total


def sums(transport: Transport) -> dict[tuple[str, int], Tensor]:
    found = {}
    for n in SIZES:
        own = own_values(transport.rank, n)
        for name, all_reduce in ALL_REDUCE.items():
            tensor = own.clone()
            all_reduce(transport, tensor)
            found[name, n] = tensor
            allocated = transport.allocate(n, torch.float32, torch.device("cpu"))
            allocated.copy_(own)
            all_reduce(transport, allocated)
            assert torch.equal(allocated, tensor), f"{name} sums {n} elements otherwise where they were allocated"
        for dtype in (torch.int64, torch.bfloat16, torch.float16, torch.float64):
            counts = torch.arange(n).remainder(50).to(dtype)
            for name, all_reduce in ALL_REDUCE.items():
                tensor = counts.clone()
                all_reduce(transport, tensor)
                assert torch.equal(tensor, counts * transport.size), f"{name} of {n} {dtype}"
    return found


def assert_sums(by_rank: list[dict[tuple[str, int], Tensor]]) -> None:
    expected = {n: added_in_rank_order(len(by_rank), n) for n in SIZES}
    for (name, n), tensor in by_rank[0].items():
        for other in by_rank[1:]:
            assert torch.equal(other[name, n], tensor), f"{name}: ranks got different bits of {n} elements"
        if name in IN_RANK_ORDER:
            assert torch.equal(tensor, expected[n]), f"{name} did not add {n} elements in rank order"
        torch.testing.assert_close(tensor, expected[n], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_sums_in_threads(size: int) -> None:
    assert_sums(in_threads(size, sums))


@pytest.mark.parametrize("over", ["torch", "sockets", "shared_memory"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_in_processes(size: int, over: str) -> None:
    assert_sums(in_processes(size, sums, over=over))


def test_the_order_of_adding_shows_in_the_bits() -> None:
    """Otherwise the tests above would pass whatever the order."""
    forwards, backwards = added_in_rank_order(4, 1000), own_values(3, 1000)
    for rank in (2, 1, 0):
        backwards = backwards + own_values(rank, 1000)
    assert not torch.equal(forwards, backwards)


# -- the tree --------------------------------------------------------------------------------------------------------


def tree_sum(transport: Transport, leaves: int) -> Tensor:
    mine = [leaf for leaf in range(leaves) if owner(leaf, leaves, transport.size) == transport.rank]
    own = {leaf: own_values(leaf, 500) for leaf in mine}
    total = sum_leaves(transport, own, leaves, like=torch.empty(500))
    assert all(torch.equal(own[leaf], own_values(leaf, 500)) for leaf in mine), "leaves are left as they are"
    return total


@pytest.mark.parametrize("leaves", [1, 5, 8, 13])
def test_the_tree_gives_the_same_bits_on_any_number_of_ranks(leaves: int) -> None:
    alone = tree_sum(Alone(), leaves)
    torch.testing.assert_close(alone, added_in_rank_order(leaves, 500), rtol=1e-5, atol=1e-4)
    if leaves > 3:
        assert not torch.equal(alone, added_in_rank_order(leaves, 500)), "it is another order than one by one"
    for size in range(2, 9):
        assert all(torch.equal(total, alone) for total in in_threads(size, tree_sum, leaves)), f"{size} ranks"


def test_the_tree_is_the_one_that_is_documented() -> None:
    v = [own_values(leaf, 500) for leaf in range(8)]
    expected = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
    assert torch.equal(in_threads(3, tree_sum, 8)[0], expected)


# -- fewer bits on the wire ------------------------------------------------------------------------------------------


class Counting(Transport):
    """Counts the bytes that a rank sends, by receiver."""

    def __init__(self, transport: Transport):
        self._transport = transport
        self.rank, self.size, self.hosts = transport.rank, transport.size, transport.hosts
        self.shared, self.library = transport.shared, transport.library
        self.sent = [0] * transport.size

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        self.sent[to] += tensor.nbytes
        return self._transport.isend(tensor, to, tag)

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        return self._transport.irecv(tensor, source, tag)


def narrow_sum(transport: Transport, name: str, n: int) -> tuple[Tensor, int]:
    counting = Counting(transport)
    tensor = own_values(transport.rank, n)
    with_wire(name, torch.bfloat16)(counting, tensor)
    return tensor, sum(counting.sent)


@pytest.mark.parametrize("name", list(NARROW))
@pytest.mark.parametrize("size", [2, 3, 4])
def test_bf16_on_the_wire_halves_the_bytes_and_keeps_its_stated_error(name: str, size: int) -> None:
    n = 12_000
    results = in_threads(size, narrow_sum, name, n)
    exact = added_in_rank_order(size, n, torch.float64)
    magnitude = sum(own_values(rank, n, torch.float64).abs() for rank in range(size))
    u = 2.0**-8  # bf16 has 8 significant bits, and rounds to nearest
    bound = u * magnitude + u * (1 + u) * magnitude + 1e-6 * magnitude
    full = {"one_shot": (size - 1) * n * 4}.get(name, 2 * (size - 1) * n * 4 // size)
    for tensor, sent in results:
        assert torch.equal(tensor, results[0][0]), "all ranks have the same bits"
        error = (tensor.double() - exact).abs()
        assert (error <= bound).all()
        assert float(error.max()) > 1e-4, "it is rounded indeed"
        assert sent == full // 2


# -- costs -----------------------------------------------------------------------------------------------------------


def bytes_sent(transport: Transport, name: str, n: int) -> list[int]:
    counting = Counting(transport)
    ALL_REDUCE[name](counting, torch.ones(n))
    return counting.sent


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_algorithms_send_the_bytes_that_their_formulas_say(size: int) -> None:
    n = 24 * 1000
    whole = 4 * n
    for name, each in [
        ("ring", 2 * (size - 1) * whole // size),
        ("direct", 2 * (size - 1) * whole // size),
        ("one_shot", (size - 1) * whole),
    ]:
        for sent in in_threads(size, bytes_sent, name, n):
            assert sum(sent) == each, name
    for name in ("naive", "naive_pipelined"):
        by_rank = in_threads(size, bytes_sent, name, n)
        assert [sum(sent) for sent in by_rank] == [(size - 1) * whole] + [whole] * (size - 1), name


def test_the_ring_talks_to_its_neighbour_alone() -> None:
    for rank, sent in enumerate(in_threads(4, bytes_sent, "ring", 1_000_000)):
        assert [bool(amount) for amount in sent] == [to == (rank + 1) % 4 for to in range(4)]
    assert ring._count(torch.empty(10), 4) == 1
    assert ring._count(torch.empty(4 << 20), 4) == ring.STRIPES


def on_two_hosts(transport: Transport, name: str) -> tuple[list[int], list[int], Tensor]:
    counting = Counting(transport)
    tensor = own_values(transport.rank, 48_000)
    ALL_REDUCE[name](counting, tensor)
    return list(transport.hosts), counting.sent, tensor


def hierarchical_on(transport: Transport, layout: list[int]) -> object:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # what leads from one pretended host to the other
    true_host = hosts_module.host
    hosts_module.host = lambda: f"{true_host()} {layout[transport.rank]}"
    try:
        assert hosts_module.share(transport, 20) is None
        own = SocketTransport(transport, 20)
        result = [on_two_hosts(own, name) for name in ("hierarchical", "shared_memory")]
        for n in (1, 63, 5000, 2_000_000):  # less than a line per rank, and more than the scratch memory holds
            for make in (own.allocate(n, torch.float32, torch.device("cpu")), torch.empty(n)):
                make.fill_(transport.rank + 1)
                hierarchical.all_reduce(own, make)
                assert (make == sum(range(1, transport.size + 1))).all()
        transport.all_gather(torch.zeros(1)).wait()
        own.close_streams()
        return result
    finally:
        hosts_module.host = true_host


def test_between_hosts_each_byte_crosses_once() -> None:
    layout = [0, 0, 1, 1]
    for results in in_processes(4, hierarchical_on, layout):
        for found, sent, tensor in results:
            assert found == layout
            torch.testing.assert_close(tensor, added_in_rank_order(4, 48_000), rtol=1e-5, atol=1e-4)
            assert sum(sent) == 48_000 * 4 // 2, "half the buffer each way, as there are two ranks to send it"
            assert sum(amount > 0 for amount in sent) == 1


def test_hosts_of_unlike_size_fall_back_to_direct() -> None:
    for results in in_processes(3, hierarchical_on, [0, 0, 1]):
        for _, _, tensor in results:
            torch.testing.assert_close(tensor, added_in_rank_order(3, 48_000), rtol=1e-5, atol=1e-4)
