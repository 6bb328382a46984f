"""Addresses: of names, of this host as others reach it, and of the network interface that leads to them."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import queue
import re
import socket
import sys
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distloop.errors import WorldError

LOOKUP = 8.0  # seconds that a name has to resolve; clusters may know it only when its host is up
# For documentation (RFC 5737, 3849): nothing is sent, the kernel only says which way it would go.
ANYWHERE = ("192.0.2.1", "2001:db8::1")
DISCARD = 9  # a port
INTERFACE = "GLOO_SOCKET_IFNAME"
LISTENING = "0A"  # in /proc/net/tcp
PROC = Path("/proc")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def resolve(name: str, seconds: float = LOOKUP) -> list[str]:
    """Return the addresses of a host, IPv4 first: gloo and most clusters speak that.

    Raises:
        WorldError: the name does not resolve in time.
    """
    try:
        return look_up(name, seconds)
    except OSError as failure:
        raise WorldError(
            f"MASTER_ADDR={name!r} does not resolve on {socket.gethostname()}: {failure.strerror or failure}; give a "
            "name or an address of rank 0's host that this one knows",
            everywhere=True,
        ) from None


def look_up(name: str, seconds: float) -> list[str]:
    """Return the addresses of a host; ask again until so many seconds are over.

    Raises:
        OSError: the name does not resolve in time.
    """
    answers: queue.Queue[list[str] | OSError] = queue.Queue()
    deadline = time.monotonic() + seconds

    def ask() -> None:
        while True:
            try:
                found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                return answers.put(sorted({str(where[0]) for *_, where in found}, key=lambda one: (":" in one, one)))
            except UnicodeError as failure:
                return answers.put(OSError(str(failure)))
            except OSError as failure:
                if time.monotonic() + 0.5 > deadline:
                    return answers.put(failure)
                time.sleep(0.5)

    threading.Thread(target=ask, daemon=True).start()  # a resolver without servers has a patience of its own
    try:
        answer = answers.get(timeout=seconds + 1)
    except queue.Empty:
        answer = OSError(f"no answer within {seconds:g} s")
    if isinstance(answer, OSError):
        raise answer
    return answer


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.split("%", maxsplit=1)[0]).is_loopback
    except ValueError:
        return False


def family(address: str) -> socket.AddressFamily:
    """Return whether an address is of IPv4 or of IPv6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def source_address(towards: str) -> str:
    """Return the address of this host from which the kernel would send to ``towards``; "" if there is no way."""
    with socket.socket(family(towards), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, DISCARD))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def own_address(master: str) -> str:
    """Return the address at which other hosts reach this one.

    It is that of ``GLOO_SOCKET_IFNAME``, if the user has set it, else of the interface that leads to ``master``. On the
    master's own host, many systems resolve its name to loopback: there the way out counts.

    Raises:
        WorldError: there is none.
    """
    if names := _chosen_by_user():
        return _of_interface(names)
    there = resolve(master) if master else []
    for towards in (*there, *ANYWHERE):
        found = source_address(towards)
        if found and not is_loopback(found):
            return found
    why = ""
    if master and all(is_loopback(address) for address in there):
        why = f" (MASTER_ADDR={master!r} is an address of this host alone)"
    elif master:
        why = f" (there is no route to MASTER_ADDR={master!r}, {', '.join(there)})"
    raise WorldError(
        f"no network interface leads from {socket.gethostname()} to other hosts{why}, and there are several: name the "
        "interface in GLOO_SOCKET_IFNAME"
    )


def use_interface(address: str) -> None:
    """Have gloo use the interface of ``address``, unless the user has named one.

    Without a name gloo resolves the host's, which gives loopback on some hosts and any of the interfaces on others.
    """
    if not _chosen_by_user() and (name := interface_of(address)):
        os.environ[INTERFACE] = _own.interface = name


@dataclass
class _Own:
    interface: str = ""  # that we have told gloo; it says nothing about which of its addresses others reach


_own = _Own()


def _chosen_by_user() -> str:
    """Return the interfaces that the user has named for gloo, with commas between; "" without any."""
    names = os.environ.get(INTERFACE, "")
    return "" if names == _own.interface else names


def interface_of(address: str) -> str:
    """Return the name of the interface that has ``address``; "" if none is found."""
    if is_loopback(address):
        return LOOPBACK
    return next((name for name, own in with_addresses().items() if address in own), "")


class _Entry(ctypes.Structure):
    """The head of a ``struct ifaddrs``, which is alike on Linux, macOS and the BSDs."""

    _fields_ = (
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
    )


def with_addresses() -> dict[str, list[str]]:
    """Return the interfaces that have addresses, with all of them, in the order in which gloo sees them.

    An IPv4 address may have a label (eth0:1): it counts as an interface of its own, for gloo too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.freeifaddrs.argtypes = (ctypes.c_void_p,)
    first = ctypes.c_void_p()
    if libc.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), "the system does not tell its addresses")
    found: dict[str, list[str]] = {}
    try:
        at = first.value
        while at:
            entry = _Entry.from_address(at)
            if address := _read_address(entry.address):
                found.setdefault(os.fsdecode(entry.name), []).append(address)
            at = entry.next
    finally:
        libc.freeifaddrs(first)
    return found


def _read_address(at: int | None) -> str:
    """Return what a ``struct sockaddr`` says, if that is an address of the internet."""
    if not at:
        return ""
    head = ctypes.string_at(at, 2)
    kind = int.from_bytes(head, sys.byteorder) if sys.platform == "linux" else head[1]
    if kind == socket.AF_INET:
        return socket.inet_ntop(kind, ctypes.string_at(at + 4, 4))
    if kind == socket.AF_INET6:
        return socket.inet_ntop(kind, ctypes.string_at(at + 8, 16))
    return ""


def listener(number: int, proc: Path = PROC) -> str | None:
    """Return in words who listens at a port of this host; None if nobody does."""
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == number:
                    sockets.add(f"socket:[{fields[9]}]")
    if not sockets:
        return None
    for link in proc.glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(link.readlink()) in sockets:
                process = link.parent.parent
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {process.name} ({re.sub(r'(?<=.{60}).+', '...', words) or 'no name'})"
    return "a process of another user, or outside this container"


_OPEN: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(connection: socket.socket) -> socket.socket:
    """Return ``connection``; a forked process closes its copy.

    A loader's worker that outlives its rank would keep that seemingly alive.
    """
    _OPEN.add(connection)
    return connection


def _forget() -> None:
    for connection in list(_OPEN):
        connection.close()


os.register_at_fork(after_in_child=_forget)


def _of_interface(names: str) -> str:
    known = with_addresses()
    for name in names.split(","):
        if name not in known:
            raise WorldError(
                f"GLOO_SOCKET_IFNAME={name!r} is no interface with an address here (there are: "
                f"{', '.join(sorted(known))})"
            )
    return known[names.partition(",")[0]][0]
