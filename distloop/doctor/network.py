"""Names, interfaces and ports: how other hosts reach this one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence

from distloop.doctor.findings import Context, Finding, failed, ok, warning
from distloop.errors import WorldError
from distloop.master import Master
from distloop.transports.addresses import is_loopback, listener, look_up, source_address, with_addresses
from distloop.transports.join import meets_by_mpi

DEFAULT_PORT = 29500  # torchrun's
LOOKUP = 3.0  # seconds for a name; a run gives it more, as its hosts may not be up yet


def host_name(context: Context) -> Iterator[Finding]:
    """Resolve this host's name, and the master's."""
    yield _own_name(context)
    if master := _address(context):
        yield _master(context, master)


def _own_name(context: Context) -> Finding:
    name = socket.gethostname()
    try:
        found = addresses(name)
    except OSError as failure:
        told, advice = f"{name!r} does not resolve ({failure})", f"add a line '<its address> {name}' to /etc/hosts"
        return (failed if context.several_hosts else warning)("host name", told, advice)
    told = f"{name} is {', '.join(found)}"
    if context.several_hosts and all(is_loopback(address) for address in found):
        advice = f"mend the line of {name} in /etc/hosts, or name the interface in GLOO_SOCKET_IFNAME"
        return warning("host name", f"{told}: of this host alone", advice)
    return ok("host name", told)


def _master(context: Context, master: str) -> Finding:
    try:
        found = addresses(master)
    except OSError as failure:
        advice = "give MASTER_ADDR (torchrun --master-addr, --rdzv-endpoint) a name that all hosts know, or an address"
        return failed("master", f"{master!r} does not resolve ({failure})", advice)
    told = f"{master} is {', '.join(found)}"
    # On rank 0's own host it is usual: Debian has host names at 127.0.1.1.
    if context.several_hosts and context.world.rank != 0 and all(is_loopback(address) for address in found):
        return failed("master", f"{told}: each host would look for it on itself", "give it an address others reach")
    return ok("master", told)


def interfaces(context: Context) -> Finding:
    """List the interfaces with their addresses, and say which leads to the master."""
    found = with_addresses()
    shown = {name: [address for address in own if not address.startswith("fe80:")] for name, own in found.items()}
    listed = ", ".join(f"{name} {' '.join(own)}" for name, own in shown.items() if own)
    asked = os.environ.get("GLOO_SOCKET_IFNAME")
    if unknown := [name for name in asked.split(",") if name not in found] if asked else []:
        advice = f"unset it, or set it to one of {', '.join(found)}"
        return failed("interfaces", f"GLOO_SOCKET_IFNAME={unknown[0]!r} is no interface with an address here", advice)
    master = _address(context)
    if not master:
        return ok("interfaces", listed)
    try:
        own = next(filter(None, map(source_address, addresses(master))), "")
    except OSError as failure:
        return failed("interfaces", f"{listed}; {master!r} does not resolve ({failure})", "see above")
    if not own:
        return failed("interfaces", f"{listed}; no way leads to {master}", "mend the network")
    name = next((name for name, own_ones in found.items() if own in own_ones), "unknown")
    return ok("interfaces", f"{listed}; to {master} by {name} ({own})")


def port(context: Context) -> Finding:
    """Say whether a port of the master's is free, or whose it is."""
    world, wanted = context.world, context.config.world
    if world.size == 1:
        return _default_port()
    if meets_by_mpi(world, wanted.transport, wanted.backend):
        return ok("port", "none is needed: ranks meet by MPI")
    try:
        ports = Master.from_environment(world).ports
    except WorldError as failure:
        return failed("port", failure)
    listed = ", ".join(map(str, ports))
    if world.rank != 0:
        return ok("port", f"{listed} is rank 0's host's")
    return _of_rank_0(ports, listed)


def _of_rank_0(ports: Sequence[int], listed: str) -> Finding:
    by = {number: listener(number) for number in ports}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return ok("port", f"{listed} is kept by the launcher" + (f" ({by[ports[0]]})" if by[ports[0]] else ""))
    if free := [number for number, taken in by.items() if taken is None]:
        return ok("port", f"{free[0]} is free")
    advice = "choose another port, or end who has it"
    return failed("port", f"MASTER_PORT={listed} is taken by {by[ports[0]]}", advice)


def _default_port() -> Finding:
    if (taken := listener(DEFAULT_PORT)) is None:
        return ok("port", f"{DEFAULT_PORT} is free")
    told = f"{DEFAULT_PORT}, torchrun's default, is taken by {taken}"
    return warning("port", told, "start torchrun with --standalone")


def _address(context: Context) -> str:
    """Return the name or address of rank 0's host, as a run of these ranks takes it; "" if nothing says."""
    try:
        return Master.from_environment(context.world).address
    except WorldError:  # the port may be all that is wrong
        return os.environ.get("MASTER_ADDR", "").strip()


def addresses(name: str) -> list[str]:
    """Return the addresses that a name resolves to.

    Raises:
        OSError: it does not, or nobody answers.
    """
    return list(dict.fromkeys(found.partition("%")[0] for found in look_up(name.strip(" []"), LOOKUP)))
