"""Where the ranks of this process's world meet: the roll call, and then a store of torch.distributed."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
from distloop.transports.addresses import close_in_children, family, is_loopback, own_address, use_interface
from distloop.transports.hosts import host
from distloop.transports.introduction import HINT, NOTICE, Caller, introduce, who_this_is
from distloop.transports.listening import EVERYWHERE, LOCAL, NAME_IT, addresses_of_master, listen
from distloop.transports.roll_call import RollCall
from distloop.world import World

Answer = TypeVar("Answer")


@dataclass
class _Meeting:
    """One store, in which each connection has names of its own."""

    store: Store | None = None
    roll_call: RollCall | None = None  # of rank 0; it answers as long as the process lives
    connections: int = 0
    generation: str = ""  # which start of these ranks it is, where the store has seen others


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
    addresses, here = addresses_of_master(world, master)
    local = all(map(is_loopback, addresses))
    own = _introduction(world, master, LOCAL if here else _own_address(master, local=local), facts)
    if world.rank == 0:
        # A name that is loopback here alone, as on many systems the host's own is, leads the others elsewhere.
        return _hold(own, listen([EVERYWHERE] if local and not here else addresses, master), timeout)
    where = [(address, port) for port in master.ports for address in addresses]
    hint = HINT
    if local and not here:
        hint = f"MASTER_ADDR={master.address!r} is {socket.gethostname()} itself; if rank 0 is elsewhere, {NAME_IT}"
        if master.other_host:  # hosts can be one machine, where somebody tries things: leave rank 0 a while to come
            timeout = min(timeout, NOTICE)
    verdict = introduce(
        own,
        lambda: where,
        timeout,
        _speaker(world),
        sure=len(master.ports) == 1,
        everywhere=world.host_known,
        hint=hint,
    )
    return join(verdict.store, world.size, timeout)


def _own_address(master: Master, *, local: bool) -> str:
    try:
        return own_address(master.address)
    except WorldError:
        if local and "GLOO_SOCKET_IFNAME" not in os.environ:
            return LOCAL  # a host without a network; if there are others, the roll call finds out
        raise


def _through_launcher(world: World, master: Master, timeout: float, facts: Mapping[str, Any]) -> Store:
    """Meet where rank 0 says in the store that the launcher keeps, which outlives any rank.

    It also outlives ranks that were started again because a host has come or gone, without counting as a restart: what
    an earlier rank 0 has said there counts as long as somebody answers at it.
    """
    store: Store = next(rendezvous("env://", world.rank, world.size, timeout=timedelta(seconds=timeout)))[0]
    key = f"distloop/roll call/{master.attempt}"
    own = _introduction(world, master, LOCAL if world.single_host else own_address(master.address), facts)
    if world.rank == 0:
        listener = close_in_children(socket.create_server((own.address, 0), family=family(own.address)))
        where = f"{own.address} {listener.getsockname()[1]}"
        _meeting.generation = f"{where} {secrets.token_hex(8)}"
        _call_roll(own, [listener], _meeting.generation, timeout, lambda: store.set(key, where))
        return store

    def said() -> list[tuple[str, int]]:
        try:
            address, port = store.get(key).decode().split()
        except dist.DistError as failure:
            sentence = f"rank 0 of {world.size} did not come within {timeout:g} s"
            raise WorldError(sentence, everywhere=True) from failure
        return [(address, int(port))]

    verdict = introduce(own, said, timeout, _speaker(world), sure=False, everywhere=world.host_known)
    _meeting.generation = verdict.store
    return store


def _introduction(world: World, master: Master, address: str, facts: Mapping[str, Any]) -> Caller:
    use_interface(address)
    return who_this_is(world.rank, world.size, master.job, host(), address, facts)


def _hold(own: Caller, listeners: Sequence[socket.socket], timeout: float) -> Store:
    store, port = serve(own.address, own.size, timeout)
    _call_roll(own, listeners, f"{own.address} {port}", timeout)
    return store


def _call_roll(
    own: Caller, listeners: Sequence[socket.socket], told: str, timeout: float, begin: Callable[[], None] | None = None
) -> None:
    """Let all ranks come, and tell them where they meet next; ``begin`` is called once they would be answered."""
    _meeting.roll_call = roll_call = RollCall(own, listeners, told, timeout, _say)
    try:
        if begin is not None:
            begin()
        roll_call.hold().check()
    except BaseException:
        roll_call.close()  # the port is free again, for another attempt in this process
        raise


def serve(address: str, size: int, timeout: float) -> tuple[Store, int]:
    """Return a store that this process keeps at ``address``, and its port."""
    listening = socket.create_server((address, 0), family=family(address))
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


def _speaker(world: World) -> Callable[[str], None]:
    return _say if world.local_rank == 0 else lambda sentence: None  # the ranks of a host would all say the same


def _say(sentence: str) -> None:
    print(f"distloop: {sentence}", file=sys.stderr, flush=True)


def _prefix() -> str:
    return f"distloop/{_meeting.generation}/{_meeting.connections}"


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
