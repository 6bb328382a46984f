"""Addresses: of names, of this host as others reach it, and of the network interface that leads to them."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import queue
import socket
import struct
import sys
import threading
import time
import weakref
from pathlib import Path

from distloop.errors import WorldError

LOOKUP = 8.0  # seconds that a name has to resolve; clusters may know it only when its host is up
ANYWHERE = ("192.0.2.1", 9)  # of TEST-NET-1 (RFC 5737): nothing is sent, the kernel only says which way it would go
GET_ADDRESS = 0x8915  # SIOCGIFADDR
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def resolve(name: str, seconds: float = LOOKUP) -> list[str]:
    """Return the addresses of a host, IPv4 first: gloo and most clusters speak that.

    Raises:
        WorldError: the name does not resolve in time.
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
        raise WorldError(
            f"MASTER_ADDR={name!r} does not resolve on {socket.gethostname()}: {answer.strerror or answer}; give a "
            "name or an address of rank 0's host that this one knows",
            everywhere=True,
        )
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
    if ":" in address:
        return _of_ipv6(address)
    return next((name for name in interfaces() if ipv4_of(name) == address), "")


def interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def ipv4_of(interface: str) -> str:
    """Return the first IPv4 address of an interface; "" if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


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


def _of_ipv6(address: str) -> str:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return ""
    wanted = ipaddress.IPv6Address(address.split("%", maxsplit=1)[0]).packed.hex()
    return next((line.split()[-1] for line in lines if line.split()[0] == wanted), "")


def _of_interface(name: str) -> str:
    if found := ipv4_of(name):
        return found
    raise WorldError(
        f"GLOO_SOCKET_IFNAME={name!r} is no interface with an IPv4 address here (there are: {', '.join(interfaces())})"
    )
