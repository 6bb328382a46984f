"""Addresses: of names, of this host as others reach it, and of the network interface that leads to them."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import queue
import re
import socket
import struct
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

from distloop.errors import WorldError

LOOKUP = 8.0  # seconds that a name has to resolve; clusters may know it only when its host is up
ANYWHERE = ("192.0.2.1", 9)  # of TEST-NET-1 (RFC 5737): nothing is sent, the kernel only says which way it would go
GET_ADDRESS = 0x8915  # SIOCGIFADDR
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


def source_address(towards: str) -> str:
    """Return the address of this host from which the kernel would send to ``towards``; "" if there is no way."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, ANYWHERE[1]))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def own_address(master: str) -> str:
    """Return the address at which other hosts reach this one.

    It is that of ``GLOO_SOCKET_IFNAME``, if it is set, else of the interface that leads to ``master``. On the master's
    own host, many systems resolve its name to loopback: there the way out counts.

    Raises:
        WorldError: there is none.
    """
    if name := os.environ.get("GLOO_SOCKET_IFNAME"):
        return _of_interface(name)
    for towards in (*(resolve(master) if master else ()), ANYWHERE[0]):
        found = source_address(towards)
        if found and not is_loopback(found):
            return found
    raise WorldError(
        f"no network interface leads from {socket.gethostname()} to other hosts"
        + (f" (MASTER_ADDR={master!r} is an address of this host alone)" if master else "")
        + ", and there are several: name the interface in GLOO_SOCKET_IFNAME"
    )


def use_interface(address: str) -> None:
    """Have gloo use the interface of ``address``, unless the user has named one.

    Without a name gloo resolves the host's, which gives loopback on some hosts and any of the interfaces on others.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface_of(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_of(address: str) -> str:
    """Return the name of the interface that has ``address``; "" if none is found."""
    if is_loopback(address):
        return LOOPBACK
    return next((name for name, own in with_addresses().items() if address in own), "")


def with_addresses(proc: Path = PROC) -> dict[str, list[str]]:
    """Return the interfaces that have addresses, with them."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                found.setdefault(name, []).append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):
        for line in (proc / "net" / "if_inet6").read_text().splitlines():
            digits, _, _, _, _, name = line.split()
            found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found


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


def _of_interface(name: str) -> str:
    known = with_addresses()
    if found := known.get(name):
        return found[0]
    raise WorldError(
        f"GLOO_SOCKET_IFNAME={name!r} is no interface with an address here (there are: {', '.join(sorted(known))})"
    )
