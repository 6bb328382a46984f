"""Where the ranks of this process's world meet: the roll call, and then a store of torch.distributed."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is there, and documented
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distloop.errors import WorldError
from distloop.master import Master
from distloop.transports.addresses import close_in_children, is_loopback, own_address, resolve, use_interface
from distloop.transports.hosts import host
from distloop.transports.introduction import Caller, introduce, who_this_is, whose
from distloop.transports.roll_call import RollCall
from distloop.world import World

Answer = TypeVar("Answer")
LOCAL = "127.0.0.1"


@dataclass
class _Meeting:
    """One store, in which each connection has names of its own."""

    store: Store | None = None
    roll_call: RollCall | None = None  # of rank 0; it answers as long as the process lives
    connections: int = 0


_meeting = _Meeting()  # a process has one world, and its address one server


def meet(world: World, timeout: float, facts: Mapping[str, Any]) -> Store:
    """Return a store that all ranks of ``world`` have, with keys of its own for each call.

    The first call is the roll call: no rank is missing or there twice, all are of one job, and know the same ``facts``.

    Raises:
        WorldError: they cannot begin.
        RankDiedError: one ended before all had come.
    """
    if _meeting.store is None:
        master = Master.from_environment(world)
        meet_first = _through_launcher if store_in_launcher() else _at_master
        _meeting.store = meet_first(world, master, timeout, facts)
        _meeting.store.set_timeout(timedelta(seconds=timeout))
    _meeting.connections += 1
    return PrefixStore(_prefix(), _meeting.store)


def _at_master(world: World, master: Master, timeout: float, facts: Mapping[str, Any]) -> Store:
    """Meet at the master's address, where rank 0 answers."""
    addresses, here = _addresses(world, master)
    own = _introduction(world, master, LOCAL if here else own_address(master.address), facts)
    if world.rank == 0:
        return _hold(own, _listen(addresses, master), timeout)
    where = [(address, port) for port in master.ports for address in addresses]
    return join(introduce(own, where, timeout, _speaker(world), everywhere=world.host_known).store, world.size, timeout)


def _through_launcher(world: World, master: Master, timeout: float, facts: Mapping[str, Any]) -> Store:
    """Meet where rank 0 says in the store that the launcher keeps, which outlives any rank."""
    store: Store = next(rendezvous("env://", world.rank, world.size, timeout=timedelta(seconds=timeout)))[0]
    key = f"distloop/roll call/{master.attempt}"
    own = _introduction(world, master, LOCAL if world.single_host else own_address(master.address), facts)
    if world.rank == 0:
        listener = close_in_children(socket.create_server((own.address, 0), family=_family(own.address)))
        store.set(key, f"{own.address} {listener.getsockname()[1]}")
        _call_roll(own, listener, "", timeout)
        return store
    try:
        address, port = store.get(key).decode().split()
    except dist.DistError as failure:
        raise WorldError(f"rank 0 of {world.size} did not come within {timeout:g} s", everywhere=True) from failure
    introduce(own, [(address, int(port))], timeout, _speaker(world), everywhere=world.host_known)
    return store


def _introduction(world: World, master: Master, address: str, facts: Mapping[str, Any]) -> Caller:
    use_interface(address)
    return who_this_is(world.rank, world.size, master.job, host(), address, facts)


def _addresses(world: World, master: Master) -> tuple[list[str], bool]:
    """Return where rank 0 may answer, and whether that is for ranks of this host alone."""
    if world.single_host and not is_loopback(master.address):
        return [LOCAL], True  # nobody else is to reach it
    found = resolve(master.address)
    if not all(is_loopback(address) for address in found):
        return [address for address in found if not is_loopback(address)], False
    several = world.host_known and world.local_size < world.size
    if several and world.rank >= world.local_size:
        raise WorldError(
            f"MASTER_ADDR={master.address!r} is {socket.gethostname()} itself, and rank 0 is on another host: set it "
            "to a name or an address of rank 0's host that the others reach",
            everywhere=True,
        )
    return found, not several


def _listen(addresses: list[str], master: Master) -> socket.socket:
    """Return rank 0's listener, at the first port that is free.

    Where the master's address is that of something before this host, or loopback for rank 0 alone, it is on all of this
    host's addresses.
    """
    taken = ""
    for port in master.ports:
        for address in addresses:
            try:
                return close_in_children(socket.create_server((address, port), family=_family(address)))
            except PermissionError as failure:
                raise WorldError(f"MASTER_PORT={port} may not be listened at: {failure.strerror}") from failure
            except OSError as failure:
                if failure.errno == errno.EADDRINUSE:
                    taken = taken or f"{address}:{port} {whose(address, port)}"
                elif failure.errno == errno.EADDRNOTAVAIL:
                    return close_in_children(socket.create_server(("", port)))
                else:
                    raise WorldError(f"rank 0 cannot listen at {address}:{port}: {failure}") from failure
    raise WorldError(taken)


def _hold(own: Caller, listener: socket.socket, timeout: float) -> Store:
    store, port = serve(own.address, own.size, timeout)
    _call_roll(own, listener, f"{own.address} {port}", timeout)
    return store


def _call_roll(own: Caller, listener: socket.socket, store: str, timeout: float) -> None:
    _meeting.roll_call = RollCall(own, listener, store, timeout, _say)
    _meeting.roll_call.hold().check()


def serve(address: str, size: int, timeout: float) -> tuple[Store, int]:
    """Return a store that this process keeps at ``address``, and its port."""
    listening = socket.create_server((address, 0), family=_family(address))
    port = listening.getsockname()[1]
    store = TCPStore(
        address,
        port,
        size,
        timeout=timedelta(seconds=timeout),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    return store, port


def join(where: str, size: int, timeout: float) -> Store:
    """Return the store that another process keeps at ``where``, its address and port with a blank between."""
    address, port = where.split()
    store: Store = TCPStore(address, int(port), size, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    return store


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _speaker(world: World) -> Callable[[str], None]:
    return _say if world.local_rank == 0 else lambda sentence: None  # the ranks of a host would all say the same


def _say(sentence: str) -> None:
    print(f"distloop: {sentence}", file=sys.stderr, flush=True)


def _prefix() -> str:
    return f"distloop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_meeting.connections}"


def has_met() -> bool:
    """Return whether this process has met other ranks."""
    return _meeting.store is not None


def another_connection() -> Store | None:
    """Return the store over a connection of its own, for a thread that must not wait behind another; None without one.

    Its keys are apart from those of other attempts and worlds.
    """
    return None if _meeting.store is None else PrefixStore(f"{_prefix()}/aside", _meeting.store.clone())  # type: ignore[attr-defined]


def post(key: str, value: str, seconds: float = 1.0) -> str | None:
    """Set a key of :func:`another_connection` unless it is set; return what it is now, None if it cannot be known."""
    found = _ask(lambda store: store.compare_set(f"{_prefix()}/aside/{key}", "", value), seconds)
    return None if found is None else found.decode()


def store_in_launcher() -> bool:
    """Return whether the launcher keeps the store; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def claim(what: str) -> bool:
    """Return whether this is the first rank to claim ``what``; alone, or cut off from the others, it always is."""
    number = _ask(lambda store: store.add(f"{_prefix()}/claim/{what}", 1), 1.0)
    return number is None or number == 1


def roll_call(rank: int, size: int, seconds: float = 1.0) -> list[int]:
    """Say that this rank is there, and a while later return those that have not said so; none if it cannot be known."""

    def missing(store: Store) -> list[int]:
        store.set(f"{_prefix()}/there/{rank}", "")
        time.sleep(seconds)
        return [other for other in range(size) if not store.check([f"{_prefix()}/there/{other}"])]

    return _ask(missing, 2 * seconds) or []


def _ask(question: Callable[[Store], Answer], seconds: float) -> Answer | None:
    """Ask the store; None if it does not answer: its server may have ended, or be a process that stands still."""
    store, answers = _meeting.store, []

    def ask(store: Store) -> None:
        with suppress(dist.DistError, RuntimeError):
            answers.append(question(store))

    if store is not None:
        asking = threading.Thread(target=ask, args=(store,), daemon=True)  # asking has no timeout of its own
        asking.start()
        asking.join(seconds)
    return answers[0] if answers else None
