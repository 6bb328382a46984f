"""Names, interfaces and ports: how other hosts reach this one."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distloop.doctor.findings import Context, Finding, failed, ok, warning

DEFAULT_PORT = 29500  # torchrun's
GET_ADDRESS = 0x8915  # SIOCGIFADDR
LISTENING = "0A"  # in /proc/net/tcp
PROC = Path("/proc")


def host_name(context: Context) -> Iterator[Finding]:
    """Resolve this host's name, and the master's."""
    yield _own_name(context)
    if master := os.environ.get("MASTER_ADDR"):
        yield _master(context, master)


def _own_name(context: Context) -> Finding:
    name = socket.gethostname()
    try:
        found = addresses(name)
    except OSError as failure:
        told, advice = f"{name!r} does not resolve ({failure})", f"add a line '<its address> {name}' to /etc/hosts"
        return (failed if context.several_hosts else warning)("host name", told, advice)
    told = f"{name} is {', '.join(found)}"
    if context.several_hosts and all(ipaddress.ip_address(address).is_loopback for address in found):
        advice = f"mend the line of {name} in /etc/hosts, or name the interface in GLOO_SOCKET_IFNAME"
        return warning("host name", f"{told}: of this host alone", advice)
    return ok("host name", told)


def _master(context: Context, master: str) -> Finding:
    try:
        found = addresses(master)
    except OSError as failure:
        advice = "give MASTER_ADDR (torchrun --master-addr, --rdzv-endpoint) a name that all hosts know, or an address"
        return failed("master", f"MASTER_ADDR={master!r} does not resolve ({failure})", advice)
    told = f"MASTER_ADDR={master} is {', '.join(found)}"
    if context.several_hosts and all(ipaddress.ip_address(address).is_loopback for address in found):
        return failed("master", f"{told}: each host would look for it on itself", "give it an address others reach")
    return ok("master", told)


def interfaces(context: Context) -> Finding:
    """List the interfaces with their addresses, and say which leads to the master."""
    found = with_addresses()
    listed = ", ".join(f"{name} {' '.join(own)}" for name, own in found.items())
    asked = os.environ.get("GLOO_SOCKET_IFNAME")
    if asked and asked not in found:
        advice = f"unset it, or set it to one of {', '.join(found)}"
        return failed("interfaces", f"GLOO_SOCKET_IFNAME={asked!r} is no interface with an address here", advice)
    master = os.environ.get("MASTER_ADDR")
    if not master:
        return ok("interfaces", listed)
    try:
        own = route_to(master)
    except OSError as failure:
        return failed("interfaces", f"{listed}; no route to MASTER_ADDR={master} ({failure})", "mend the network")
    name = next((name for name, own_ones in found.items() if own in own_ones), "unknown")
    return ok("interfaces", f"{listed}; to {master} by {name} ({own})")


def port(context: Context) -> Finding:
    """Say whether the master's port is free, or whose it is."""
    given = os.environ.get("MASTER_PORT")
    number = int(given) if given and given.isdecimal() else DEFAULT_PORT
    taken = listener(number)
    if context.world.size == 1 or not given:
        if taken is None:
            return ok("port", f"{number} is free")
        return warning("port", f"{number}, torchrun's default, is taken by {taken}", "start torchrun with --standalone")
    if context.world.rank != 0:
        return ok("port", f"{number} is rank 0's host's")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return ok("port", f"{number} is kept by the launcher" + (f" ({taken})" if taken else ""))
    if taken is None:
        return ok("port", f"{number} is free")
    return failed("port", f"MASTER_PORT={number} is taken by {taken}", "choose another port, or end who has it")


def addresses(name: str) -> list[str]:
    """Return the addresses that a name resolves to."""
    found = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(where[0]).partition("%")[0] for *_, where in found))


def route_to(master: str) -> str:
    """Return this host's address on the way to another; nothing is sent."""
    family, _, _, _, where = socket.getaddrinfo(master.strip("[]"), 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


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
