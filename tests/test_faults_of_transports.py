"""Transports under strain: odd tensors, races, strangers, what they leave behind, and what they do without."""

from __future__ import annotations

import gc
import os
import random
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distloop.collectives import ALL_REDUCE
from distloop.errors import ConfigError, MismatchError, RankHungError, WorldError
from distloop.strategies import Options, make
from distloop.strategies.lane import Lane
from distloop.transports import Transport
from distloop.transports import sockets as sockets_module
from distloop.transports.shared_memory import SCRATCH, SLOT, SharedMemory
from tests.ranks import in_processes, run_command

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32]


def shared_by(transport: Transport) -> SharedMemory:
    assert isinstance(transport.shared, SharedMemory)
    return transport.shared


# Odd tensors


def odd_tensors(transport: Transport) -> None:
    rank, size = transport.rank, transport.size
    for name, all_reduce in ALL_REDUCE.items():
        for dtype in DTYPES:
            for numel in (0, 3, 129):
                for own in (torch.zeros(numel, dtype=dtype), transport.allocate(numel, dtype, torch.device("cpu"))):
                    tensor = own.add_(torch.arange(numel).to(dtype) * (rank + 1))
                    all_reduce(transport, tensor)
                    expected = torch.arange(numel).to(dtype) * (size * (size + 1) // 2)
                    assert torch.allclose(tensor.double(), expected.double(), rtol=0.02), (name, dtype, numel)
    matrix = torch.zeros(4, 3)
    if transport.shared is not None:
        with pytest.raises(RuntimeError, match="view"):
            transport.shared.all_reduce(matrix.t())
    truth = torch.tensor([rank == 0, True])
    transport.broadcast(truth)
    assert truth.tolist() == [True, True]


@pytest.mark.parametrize(("size", "over"), [(2, "shared_memory"), (3, "sockets"), (3, "torch")])
def test_all_dtypes_and_sizes_are_summed(size: int, over: str) -> None:
    in_processes(size, odd_tensors, over=over)


def scattered(transport: Transport) -> None:
    """Send what lies in memory with gaps: refused, rather than received into a copy that nobody sees."""
    peer = 1 - transport.rank
    with pytest.raises(RuntimeError, match="view"):
        transport.irecv(torch.zeros(4, 3).t(), peer)
    pipe = [torch.full((100,), float(transport.rank)) for _ in range(3)]
    works = [transport.isend(tensor, peer) for tensor in pipe]
    for _ in pipe:
        transport.recv(torch.empty(100), peer)
    for work in works:
        work.wait()


@pytest.mark.parametrize("over", ["sockets", "shared_memory"])
def test_tensors_with_gaps_are_refused(over: str) -> None:
    in_processes(2, scattered, over=over)


def trickle(transport: Transport) -> None:
    """Empty messages whose headers arrive in pieces, because the stream is full or slow."""
    from distloop.transports.streams import StreamTransport

    assert isinstance(transport, StreamTransport)
    peer = 1 - transport.rank
    stream: Any = transport._streams[peer]
    read = stream.read

    class OneByOne:
        write = staticmethod(stream.write)

        @staticmethod
        def read(parts: Any) -> int:
            return int(read([parts[0][:1]]))

    transport._streams = {peer: OneByOne()}
    transport._sent[peer] = transport._posted[peer] = 70_000  # whose bytes differ
    works = [transport.isend(torch.full((n,), 7.0), peer) for n in (0, 2, 0)]
    for n in (0, 2, 0):
        into = torch.zeros(n)
        transport.recv(into, peer)
        assert into.tolist() == [7.0] * n
    for work in works:
        work.wait()


@pytest.mark.parametrize("over", ["sockets", "shared_memory"])
def test_a_header_may_arrive_byte_by_byte(over: str) -> None:
    in_processes(2, trickle, over=over)


def unlike(transport: Transport) -> str:
    peer = 1 - transport.rank
    tensor = torch.zeros(5 + 3 * transport.rank)
    work = transport.isend(tensor, peer)
    try:
        transport.recv(tensor.clone(), peer)
    except MismatchError as failure:
        work.wait()
        return str(failure)
    return ""


@pytest.mark.parametrize("over", ["sockets", "shared_memory"])
def test_messages_of_other_sizes_are_refused_with_both_sides(over: str) -> None:
    said = in_processes(2, unlike, over=over)
    assert "expected message 0 of 20 bytes from rank 1, which sent message 0 of 32 bytes" in said[0]
    assert "expected message 0 of 32 bytes from rank 0, which sent message 0 of 20 bytes" in said[1]


# Races


def quick_rounds(transport: Transport, rounds: int) -> None:
    """Sums through slots, in place and through the scratch memory, in any order, with ranks that dawdle."""
    rank, size, shared = transport.rank, transport.size, shared_by(transport)
    common, own = random.Random(3), random.Random(rank)
    sizes = [1, 17, 1000, SLOT // 4, SLOT // 4 + 1, SCRATCH // 4 + 5]
    for n in range(rounds):
        numel, kind, dtype = common.choice(sizes), common.choice("pprsh"), common.choice([torch.float32, torch.int64])
        flat = shared.allocate(numel, dtype) if kind in "rs" else torch.empty(numel, dtype=dtype)
        flat.copy_(torch.arange(numel) % 64 + rank * n % 11)
        if own.random() < 0.3:
            time.sleep(own.random() * 0.002)
        if kind == "h":
            for piece in shared.pieces(flat):
                shared.reduce_scatter(piece)
                if own.random() < 0.3:
                    time.sleep(own.random() * 0.001)
                shared.all_gather(piece)
        else:
            shared.all_reduce(flat)
        expected = torch.arange(numel) % 64 * size + sum(r * n % 11 for r in range(size))
        assert torch.equal(flat.long(), expected), f"round {n}: {numel} {dtype} {kind}"
        flat.fill_(-1000)  # at once: nobody may still read it


@pytest.mark.parametrize("size", [2, 4])
def test_sums_in_shared_memory_do_not_race(size: int) -> None:
    in_processes(size, quick_rounds, 200, over="shared_memory")


def freed(transport: Transport) -> None:
    """Memory is freed on one rank while another still uses its own, and addresses come again."""
    shared, own = shared_by(transport), random.Random(transport.rank)
    kept: list[Tensor] = []
    for n in range(40):
        flat = shared.allocate(SLOT // 4 + 16 * (n % 3 + 1), torch.float32)
        flat += transport.rank + n
        shared.all_reduce(flat)
        assert flat.eq(sum(range(transport.size)) + n * transport.size).all()
        kept.append(flat)
        del flat
        while kept and own.random() < 0.6:
            kept.pop(own.randrange(len(kept)))
    assert all(len(set(tensor.tolist())) == 1 for tensor in kept)
    assert len(shared._buffers) == len(kept)


def test_memory_may_be_freed_at_any_time() -> None:
    in_processes(3, freed, over="shared_memory")


class Once(torch.autograd.Function):
    """Adds to a parameter's gradient in a backward of its own, inside backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: nn.Linear) -> Tensor:
        ctx.inner, ctx.shape = inner, x.shape
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            ctx.inner(torch.ones(1, 4)).sum().backward()
        return grads[0], None


def twice(transport: Transport) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parameters = dict(model.named_parameters())
    strategy = make("direct", parameters, transport, Options(bucket_mb=5e-5))
    last: Any = model[1]
    x = torch.ones(2, 4)
    loss = last(Once.apply(model[0](x), last)).sum()
    try:
        strategy.backward(loss, 1.0, final=True)
    except ConfigError as failure:
        return str(failure)
    finally:
        strategy.close()
    return ""


def test_a_bucket_that_grows_after_it_has_left_is_an_error() -> None:
    for said in in_processes(2, twice, over="sockets"):
        assert "grew after the bucket had left" in said


def learners(transport: Transport) -> None:
    """Two learners and four strategies take turns on one transport; every step's sums are right."""
    rank, size = transport.rank, transport.size
    torch.manual_seed(1)
    own = random.Random(rank)
    models = [nn.Sequential(nn.Linear(8, 33), nn.Linear(33, 8)) for _ in range(4)]
    names = ["naive", "ring", "direct", "auto"]
    options = Options(bucket_mb=2e-4)
    strategies = [
        make(name, dict(model.named_parameters()), transport, options)
        for name, model in zip(names, models, strict=True)
    ]
    for step in range(15):
        for model, strategy in zip(models, strategies, strict=True):
            weights = [torch.full((8,), float(r + step)) for r in range(size)]
            if own.random() < 0.3:
                time.sleep(own.random() * 0.003)
            loss = (model(torch.ones(8)) * weights[rank]).sum()
            strategy.backward(loss, 1.0, final=True)
            got = {}
            for i, gradients in strategy.collect():
                for segment, gradient in zip(strategy.shards[i], gradients, strict=True):
                    got[segment.name] = gradient.clone()
            strategy.settle()
            total = (model(torch.ones(8)) * sum(weights)).sum()
            expected = torch.autograd.grad(total, list(model.parameters()))
            for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
                torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)
    for strategy in strategies:
        strategy.close()


@pytest.mark.parametrize("over", ["sockets", "shared_memory"])
def test_learners_share_a_transport(over: str) -> None:
    in_processes(3, learners, over=over)


# Other buckets, other orders


def other_buckets(transport: Transport) -> str:
    model = nn.Linear(40, 40)
    before = shared_by(transport)._round
    with pytest.raises(MismatchError) as caught:
        make("direct", dict(model.named_parameters()), transport, Options(bucket_mb=1e-4 * (1 + 99 * transport.rank)))
    assert shared_by(transport)._round == before and not shared_by(transport)._buffers
    return str(caught.value)


def test_other_bucket_sizes_are_named_on_all_ranks() -> None:
    for said in in_processes(3, other_buckets, over="shared_memory"):
        assert '"40 float32 by direct", "1600 float32 by direct"' in said and '"1640 float32 by direct"' in said


# Silence and closing


def late(transport: Transport) -> str:
    shared = shared_by(transport)
    shared.timeout = 0.3
    if transport.rank == 1:
        time.sleep(1)
        shared.barrier()
        return ""
    with pytest.raises(RankHungError) as caught:
        shared.barrier()
    return str(caught.value)


def test_a_barrier_names_who_is_late() -> None:
    said = in_processes(3, late, over="shared_memory")
    assert said[0] == "rank 0 waited 0.3 s in shared memory; not heard from: rank 1"


def test_a_lane_ends_soon_although_its_thread_waits_for_others() -> None:
    gone = threading.Event()
    lane = Lane(lambda _: gone.wait(20) and None, threaded=True)
    lane.start()
    lane.ready(1)
    time.sleep(0.05)
    begun = time.monotonic()
    lane.close()
    assert time.monotonic() - begun < 5
    gone.set()


def open_files() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found[entry.name] = str(entry.readlink())
    return found


def again(transport: Transport, over: str = "auto") -> tuple[Transport, list[str]]:
    """Join the other ranks again, after leaving them."""
    from distloop.transports.join import join
    from distloop.world import World

    return join(World(transport.rank, transport.size, transport.rank, transport.size, "test"), over, timeout=10)


def leave(transport: Transport) -> None:
    transport.close()
    transport.close = lambda **_: None  # type: ignore[method-assign]  # the test's frame closes it once more


def use(transport: Transport) -> None:
    """Sum in every way, as a strategy does too, and close."""
    size = transport.size
    for numel in (10, 100_000):
        flat = transport.allocate(numel, torch.float32, torch.device("cpu"))
        for name in ("shared_memory", "direct", "library"):
            ALL_REDUCE[name](transport, flat.fill_(1.0))
            assert flat.eq(size).all(), name
    strategy = make("direct", dict(nn.Linear(9, 9).named_parameters()), transport, Options(bucket_mb=5e-5))
    strategy.backward(torch.stack([p.sum() for p in strategy.parameters.values()]).sum(), 1.0, final=True)
    assert all(g.eq(size).all() for _, gradients in strategy.collect() for g in gradients)
    strategy.settle()
    strategy.close()
    transport.close()


def comings_and_goings(transport: Transport, over: str) -> list[tuple[int, int, int]]:
    """Connect, sum and leave again and again; return how many files, threads and mappings there are each time."""
    leave(transport)
    found = []
    gc.freeze()  # what was there before need not be looked through
    for _ in range(20):
        other, notes = again(transport, over)
        assert not notes
        use(other)
        del other
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("memfd:distloop")
        found.append((len(open_files()), len(list(Path("/proc/self/task").iterdir())), maps))
        names = [thread.name for thread in threading.enumerate()]
        assert "collecting gradients" not in names, names
    return found


def in_shm() -> set[Path]:
    """Return what has a name in shared memory, but for what Open MPI keeps there for jobs of others."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sm_segment")}


@pytest.mark.alone
@pytest.mark.parametrize("over", ["sockets", "shared_memory"])
def test_nothing_is_left_behind(over: str) -> None:
    before = in_shm()
    for found in in_processes(2, comings_and_goings, over, over=over):
        assert len({files for files, _, _ in found[2:]}) == 1, found
        assert len({threads for _, threads, _ in found[2:]}) == 1, found
        assert found[-1][2] <= found[1][2], found
    assert in_shm() <= before


def many_buckets(transport: Transport) -> int:
    before = len(open_files())
    kept = [transport.allocate(10, torch.float32, torch.device("cpu")) for _ in range(100)]
    assert len(shared_by(transport)._buffers) == len(kept)
    return len(open_files()) - before


def test_memory_costs_no_file_descriptors() -> None:
    assert in_processes(2, many_buckets, over="shared_memory") == [0, 0]


# Strangers


def strangers(transport: Transport) -> dict[str, Any]:
    """Connect to rank 0's listener before the ranks do: without a word, with a wrong token, and hanging up."""
    tell, found, seen = sockets_module._tell, {}, {}  # type: ignore[var-annotated]

    def telling(*arguments: Any) -> Any:
        told = tell(*arguments)
        found["addresses"] = [address for address, _, _ in told]
        if transport.rank == 0:
            calls = [socket.create_connection(told[0][:2], timeout=5) for _ in range(3)]
            calls[1].sendall(b"x" * sockets_module.TOKEN + (1).to_bytes(4, "little"))
            calls[2].close()
            seen["calls"] = calls[:2]
        return told

    sockets_module._tell = telling
    leave(transport)
    begun = time.monotonic()
    other, _ = again(transport, "sockets")
    found["seconds"] = time.monotonic() - begun
    for call in seen.get("calls", []):
        with suppress(ConnectionResetError):
            assert call.recv(1) == b"", "a stranger has been listened to"
        call.close()
    use(other)
    return found


def test_strangers_are_hung_up_on() -> None:
    found = in_processes(2, strangers, over="sockets")
    assert found[0]["addresses"] == ["127.0.0.1"] * 2, "all ranks share a host"
    assert found[0]["seconds"] < 2 * sockets_module.HELLO + 2


# Doing without


def refusing(transport: Transport, sizes: str) -> dict[str, Any]:
    """Let rank 1 alone find no memory: for anything, for queues, or for buckets."""
    fallocate, refused = os.posix_fallocate, transport.rank == 1

    def reserve(handle: int, offset: int, size: int) -> None:
        if refused and (sizes == "all" or (sizes == "queues" and 10**6 < size < 2 * 10**6)):
            raise OSError(28, "No space left on device")
        fallocate(handle, offset, size)

    os.posix_fallocate = reserve
    leave(transport)
    other, notes = again(transport)
    if sizes == "buckets":
        sizes = "all"
        flat = other.allocate(300_000, torch.float32, torch.device("cpu"))
        assert not shared_by(other)._buffers
        flat += other.rank
        shared_by(other).all_reduce(flat)
        assert flat.eq(1).all()
    files = len(open_files())
    kind = type(other).__name__
    use(other)
    return {"notes": notes, "kind": kind, "files": files}


@pytest.mark.parametrize(
    ("sizes", "kind", "said"),
    [("all", "SocketTransport", "4.5 MiB"), ("queues", "SocketTransport", "1 MiB"), ("buckets", "QueueTransport", "")],
)
def test_where_one_rank_has_no_memory_all_do_without(sizes: str, kind: str, said: str) -> None:
    for found in in_processes(2, refusing, sizes, over="torch"):
        assert found["kind"] == kind
        expected = f"ranks of one host do not share memory: no {said} of memory to share could be had"
        assert found["notes"] == ([expected] if said else [])


def asked_for(transport: Transport) -> str:
    os.environ["CC"], os.environ["XDG_CACHE_HOME"] = "/nonexistent", "/nonexistent"
    from distloop import native

    native.load.cache_clear()
    leave(transport)
    with pytest.raises(WorldError) as caught:
        again(transport, "shared_memory")
    torch.distributed.destroy_process_group()
    return str(caught.value)


def test_shared_memory_that_was_asked_for_by_name_is_not_replaced() -> None:
    for said in in_processes(2, asked_for, over="torch"):
        assert said.startswith("world.transport: shared_memory cannot be had: there is no C compiler (/nonexistent)")


def test_without_a_compiler_ranks_train_over_sockets(tmp_path: Path) -> None:
    settings = ("--strategy.name", "auto", "--log.tensorboard", "false", "--log.picture", "false")
    task = "tests.user_tasks:Fine"
    cache = str(tmp_path / "cache")
    ends = run_command("train", task, *settings, folder=tmp_path, ranks=2, CC="/nonexistent", XDG_CACHE_HOME=cache)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert ends[0].out.count("ranks of one host do not share memory: there is no C compiler (/nonexistent) here") == 1
    assert "all epochs done" in ends[0].out


def test_a_cache_that_others_may_write_to_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distloop import native

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache() == tmp_path / "distloop"
    (tmp_path / "distloop").chmod(0o777)
    assert native.cache() != tmp_path / "distloop"


def test_a_compiler_may_have_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distloop import native

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -DNOTHING")
    assert native.load.__wrapped__("shared_memory").dl_barrier is not None
