"""Messages over TCP connections of our own, one between any two ranks."""

from __future__ import annotations

import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Sequence

import torch

from distloop.errors import RankDiedError, WorldError
from distloop.transports.addresses import close_in_children, family, own_address
from distloop.transports.base import Transport
from distloop.transports.streams import StreamTransport

HELLO = 2.0  # seconds that a caller has to say who it is
TOKEN = 16  # bytes of the secret that a connection begins with, so that no stranger is taken for a rank
# What the kernel takes off us beyond what is on the wire: with megabytes of it, who is sent to first would not matter.
MOST_UNSENT = 128 * 1024  # bytes
UNSENT = 25 if sys.platform == "linux" else None  # TCP_NOTSENT_LOWAT, which Python's socket has no name for
_RDHUP = getattr(select, "POLLRDHUP", 0)


class SocketStream:
    """One connection; see :class:`distloop.transports.streams.Stream`."""

    def __init__(self, connection: socket.socket, peer: int):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if UNSENT is not None:
            connection.setsockopt(socket.IPPROTO_TCP, UNSENT, MOST_UNSENT)
        self.connection, self.peer = close_in_children(connection), peer

    def write(self, parts: Sequence[memoryview]) -> int:
        try:
            return self.connection.sendmsg(parts)
        except BlockingIOError:
            return 0
        except OSError as failure:
            raise self.lost(failure) from failure

    def read(self, parts: Sequence[memoryview]) -> int:
        try:
            n = self.connection.recvmsg_into(parts)[0]
        except BlockingIOError:
            return 0
        except OSError as failure:
            raise self.lost(failure) from failure
        if not n:
            raise self.lost("it closed the connection")
        return n

    def lost(self, reason: object) -> RankDiedError:
        return RankDiedError(f"rank {self.peer} has ended, or cannot be reached ({reason})")


class SocketTransport(StreamTransport):
    """A mesh of TCP connections between ranks that have met over another transport, ``below``."""

    def __init__(self, below: Transport, timeout: float):
        self.shared = below.shared
        if self.shared is not None:
            self.shared.meanwhile = self.pump
        self._connections = {peer: SocketStream(c, peer) for peer, c in connect_all(below, timeout).items()}
        super().__init__(below, self._connections, timeout)
        self._poll = select.poll()
        self._watched: dict[int, int] = {}
        self._by_handle = {stream.connection.fileno(): stream for stream in self._connections.values()}
        for handle in self._by_handle:
            self._poll.register(handle, _RDHUP)
            self._watched[handle] = _RDHUP

    def idle(self, seconds: float) -> None:
        to_write, to_read = self.waits_to()
        for peer, stream in self._connections.items():
            handle = stream.connection.fileno()
            wanted = _RDHUP | (select.POLLOUT if peer in to_write else 0) | (select.POLLIN if peer in to_read else 0)
            if self._watched[handle] != wanted:
                self._watched[handle] = wanted
                self._poll.modify(handle, wanted)
        for handle, event in self._poll.poll(seconds * 1000):
            # A rank closes only after all have said that they are done; one that ends before has failed. What it sent
            # before may still be read, and reading finds the end by itself.
            if event & (_RDHUP | select.POLLHUP | select.POLLERR) and not event & (select.POLLIN | select.POLLOUT):
                raise self._by_handle[handle].lost("it closed the connection")

    def close_streams(self) -> None:
        for stream in self._connections.values():
            stream.connection.close()


def connect_all(below: Transport, timeout: float) -> dict[int, socket.socket]:
    """Connect every two ranks: the lower one listens. Listeners are on loopback where all ranks share a host.

    Raises:
        WorldError: on all ranks, if one could not be reached.
    """
    local = len(set(below.hosts)) == 1 and bool(below.hosts)
    address = "127.0.0.1" if local else own_address(os.environ.get("MASTER_ADDR", ""))
    with socket.socket(family(address)) as listener:
        listener.bind((address, 0))
        listener.listen(below.size + 128)  # strangers must not fill the queue
        told = _tell(below, address, listener.getsockname()[1], secrets.token_bytes(TOKEN))
        token = told[0][2]
        connections: dict[int, socket.socket] = {}
        failure = ""
        deadline = time.monotonic() + timeout / 2  # the other half is for telling the others
        try:
            for peer in range(below.rank):
                connections[peer] = _call(told[peer][0], told[peer][1], token, below.rank, _left(deadline))
            _answer(listener, connections, below, token, deadline)
        except OSError as error:
            missing = [str(p) for p in below.peers() if p not in connections]
            failure = f"rank {below.rank} at {address} could not connect to rank {', '.join(sorted(missing))}: {error}"
    succeeded = below.all_gather(torch.tensor([not failure])).wait()[:, 0]
    if not succeeded.all():
        for connection in connections.values():
            connection.close()
        rank = int((~succeeded).nonzero()[0])
        raise WorldError(
            failure or f"rank {rank} could not connect to all others; use world.transport torch if only gloo may pass"
        )
    return connections


def _tell(below: Transport, address: str, port: int, token: bytes) -> list[tuple[str, int, bytes]]:
    """Return every rank's address, port and token."""
    text = address.encode()
    own = list(text.ljust(64, b"\0")) + list(port.to_bytes(4, "little")) + list(token)
    rows = below.all_gather(torch.tensor(own, dtype=torch.uint8)).wait()
    raw = [bytes(row.tolist()) for row in rows]
    return [(r[:64].rstrip(b"\0").decode(), int.from_bytes(r[64:68], "little"), r[68:]) for r in raw]


def _call(address: str, port: int, token: bytes, rank: int, timeout: float) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=timeout)
    connection.sendall(token + rank.to_bytes(4, "little"))
    return connection


def _answer(
    listener: socket.socket, connections: dict[int, socket.socket], below: Transport, token: bytes, deadline: float
) -> None:
    """Accept a connection from every higher rank; hang up on whoever does not know the token."""
    while len(connections) < below.size - 1:
        listener.settimeout(_left(deadline))
        connection, _ = listener.accept()
        hello = _hello(connection, min(deadline, time.monotonic() + HELLO))
        caller = int.from_bytes(hello[TOKEN:], "little")
        known = secrets.compare_digest(hello[:TOKEN], token) and below.rank < caller < below.size
        if known and len(hello) == TOKEN + 4 and caller not in connections:
            connections[caller] = connection
        else:
            connection.close()


def _hello(connection: socket.socket, deadline: float) -> bytes:
    """Return what a caller says of itself; nothing if it takes its time, however many bytes it lets trickle."""
    hello = b""
    try:
        while len(hello) < TOKEN + 4:
            connection.settimeout(_left(deadline))
            more = connection.recv(TOKEN + 4 - len(hello))
            if not more:
                break
            hello += more
    except OSError:
        return b""
    return hello


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
