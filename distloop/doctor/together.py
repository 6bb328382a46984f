"""What ranks can only find together: that they meet, are the same, add up right, and how far they are apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distloop import collectives
from distloop.build.device import own_device, visible_gpus
from distloop.build.identity import OWN, software
from distloop.doctor.findings import Context, Finding, failed, in_words, ok, warning
from distloop.errors import DistloopError, WorldError
from distloop.messages import gather_json
from distloop.report import versions
from distloop.transports import Transport
from distloop.transports.differences import first_difference

PATIENCE = 15.0  # seconds that ranks wait for each other while they try things
LOOKING = 180.0  # and for one of another host that still looks at that
LENGTHS = (1003, 300_007)  # elements: no multiple of anything
Ways = dict[str, Transport | str]
Attempt = Callable[[Transport, int, torch.device], str]  # returns what is wrong


def meet(context: Context) -> Transport:
    """Bring the ranks together as a run does; the one place here that knows how."""
    from distloop.transports.join import join, meets_by_mpi

    config, world = context.config.world, context.world
    found, _ = join(
        world,
        "mpi" if meets_by_mpi(world, config.transport, config.backend) else "torch",
        backend="gloo" if device_of(context).type == "cpu" else "auto",
        device=device_of(context),
        timeout=LOOKING,
        share_memory=config.shared_memory,
    )
    return found


def device_of(context: Context) -> torch.device:
    """Return where tensors that this rank sends would be."""
    wanted = context.config.world
    if wanted.backend == "gloo":
        return torch.device("cpu")
    device = own_device(context.world, visible_gpus(wanted.device))
    if device.type != "cpu":
        torch.cuda.set_device(device)
    return device


def ways(below: Transport, context: Context) -> Ways:
    """Return the transports that these ranks can have, by name, or why not; every rank calls it."""
    from distloop.transports.queues import QueueTransport
    from distloop.transports.sockets import SocketTransport

    met = "mpi" if type(below).__name__.startswith("Mpi") else "torch"
    found: Ways = {met: below}
    if device_of(context).type != "cpu":
        return found
    try:
        found["sockets"] = SocketTransport(below, PATIENCE)
    except WorldError as failure:
        found["sockets"] = str(failure)
    if below.shared is not None and len(below.shared.ranks) == below.size:
        try:
            found["shared_memory"] = QueueTransport(below, PATIENCE)
        except WorldError as failure:
            found["shared_memory"] = str(failure)
    return found


def same(below: Transport, context: Context) -> Finding:
    """Compare versions, code and configuration of all ranks."""
    rows = gather_json(below, identity(context))
    if told := first_difference(rows):
        return failed("same everywhere", told, "install the same, and start all ranks with the same settings")
    return ok("same everywhere", f"{len(rows[0])} versions and settings of {below.size} ranks")


def identity(context: Context) -> dict[str, Any]:
    """Return what must be the same on all ranks."""
    own = software(nccl=True) | {
        name: versions.package(name)() for name in ("numpy", "deepspeed", "mpi4py", "pydantic")
    }
    settings: dict[str, Any] = context.config.model_dump(mode="json")
    told = {f"{section}.{key}": value for section, keys in settings.items() for key, value in keys.items()}
    return own | {dotted: value for dotted, value in told.items() if dotted not in OWN}


def sums(below: Transport, name: str, way: Transport, device: torch.device) -> Iterator[Finding]:
    """Try every collective over one transport, and compare what comes of it with what is right."""
    tried: dict[str, Attempt] = {"broadcast": _broadcast, "all-gather": _all_gather}
    algorithms = collectives.ALL_REDUCE if device.type == "cpu" else {"library": collectives.ALL_REDUCE["library"]}
    tried |= {f"all-reduce {algorithm}": _all_reduce(function) for algorithm, function in algorithms.items()}
    wrong = []
    for what, attempt in tried.items():
        problem = ""
        for length in LENGTHS:
            try:
                problem = problem or attempt(way, length, device)
            except DistloopError:
                raise
            except Exception as failure:
                problem = in_words(failure)
        said = gather_json(below, problem)
        wrong += [f"{what} on rank {rank}: {text}" for rank, text in enumerate(said) if text][:1]
    check = f"sums over {name}"
    if wrong:
        advice = "do not train over it: set world.transport or strategy.name to another, and report this"
        yield failed(check, "; ".join(wrong), advice)
    else:
        yield ok(check, f"{len(tried)} collectives are right on {below.size} ranks")


def _all_reduce(function: collectives.AllReduce) -> Attempt:
    def attempt(way: Transport, length: int, device: torch.device) -> str:
        tensor = way.allocate(length, torch.float32, device)
        tensor.copy_(_numbers(length, way.rank))
        function(way, tensor)
        return _compare(tensor, sum((_numbers(length, rank) for rank in range(way.size)), torch.zeros(length)))

    return attempt


def _broadcast(way: Transport, length: int, device: torch.device) -> str:
    tensor = _numbers(length, way.rank).to(device)
    way.broadcast(tensor, root=way.size - 1)
    return _compare(tensor, _numbers(length, way.size - 1))


def _all_gather(way: Transport, length: int, device: torch.device) -> str:
    rows = way.all_gather(_numbers(length, way.rank)).wait()
    return next((said for rank in range(way.size) if (said := _compare(rows[rank], _numbers(length, rank)))), "")


def _numbers(length: int, rank: int) -> Tensor:
    return (torch.arange(length) % 251 + 10.0 * rank).float()  # their sums are exact


def _compare(found: Tensor, right: Tensor) -> str:
    """Return where two tensors differ first, in words; nothing if they do not."""
    found = found.cpu()
    if torch.equal(found, right):
        return ""
    where = int((found != right).nonzero()[0])
    return f"element {where} of {len(right)} is {found[where]:g} and not {right[where]:g}"


def clocks(below: Transport) -> Finding:
    """Compare clocks with rank 0's: ask it, and take the answer for that of halfway between question and answer.

    Of several questions the one that was answered soonest counts: the error is at most half of its time (Cristian 1989,
    Probabilistic clock synchronization).
    """
    found = (0.0, 0.0)
    for rank in range(1, below.size):
        if below.rank in (0, rank):
            found = _ask(below, rank, found)
    rows = below.all_gather(torch.tensor(found, dtype=torch.float64)).wait().tolist()
    rank = max(range(below.size), key=lambda rank: abs(rows[rank][0]))
    skew, error = rows[rank]
    told = f"rank {rank} is {1e3 * skew:+.2f} ms from rank 0 (within {1e3 * error:.2f} ms), all others less"
    if abs(skew) - error > 1.0:
        return warning("clocks", told, "let the hosts keep time (chrony, ntpd): logs of ranks cannot be compared")
    return ok("clocks", told if below.size > 2 else told.removesuffix(", all others less"))


def _ask(way: Transport, rank: int, found: tuple[float, float], rounds: int = 10) -> tuple[float, float]:
    best, skew = float("inf"), 0.0
    message = torch.zeros(1, dtype=torch.float64)
    for _ in range(rounds):
        if way.rank == 0:
            way.recv(message, rank)
            message[0] = time.time()
            way.send(message, rank)
            continue
        begun = time.perf_counter()
        own = time.time()
        way.send(message, 0)
        way.recv(message, 0)
        took = time.perf_counter() - begun
        if took < best:
            best, skew = took, own + took / 2 - float(message[0])
    return found if way.rank == 0 else (skew, best / 2)
