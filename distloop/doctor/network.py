"""Names, interfaces and ports: how other hosts reach this one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from distloop.doctor.findings import Context, Finding, failed, ok, warning
from distloop.transports.addresses import is_loopback, listener, look_up, source_address, with_addresses

DEFAULT_PORT = 29500  # torchrun's
LOOKUP = 3.0  # seconds for a name; a run gives it more, as its hosts may not be up yet


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
    if context.several_hosts and all(is_loopback(address) for address in found):
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
    # On rank 0's own host it is usual: Debian has host names at 127.0.1.1.
    if context.several_hosts and context.world.rank != 0 and all(is_loopback(address) for address in found):
        return failed("master", f"{told}: each host would look for it on itself", "give it an address others reach")
    return ok("master", told)


def interfaces(context: Context) -> Finding:
    """List the interfaces with their addresses, and say which leads to the master."""
    found = with_addresses()
    listed = ", ".join(f"{name} {' '.join(own)}" for name, own in found.items())
    asked = os.environ.get("GLOO_SOCKET_IFNAME")
    if unknown := [name for name in asked.split(",") if name not in found] if asked else []:
        advice = f"unset it, or set it to one of {', '.join(found)}"
        return failed("interfaces", f"GLOO_SOCKET_IFNAME={unknown[0]!r} is no interface with an address here", advice)
    master = os.environ.get("MASTER_ADDR")
    if not master:
        return ok("interfaces", listed)
    try:
        own = next(filter(None, map(source_address, addresses(master))), "")
    except OSError as failure:
        return failed("interfaces", f"{listed}; MASTER_ADDR={master} does not resolve ({failure})", "see above")
    if not own:
        return failed("interfaces", f"{listed}; no way leads to MASTER_ADDR={master}", "mend the network")
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
    """Return the addresses that a name resolves to.

    Raises:
        OSError: it does not, or nobody answers.
    """
    return list(dict.fromkeys(found.partition("%")[0] for found in look_up(name.strip(" []"), LOOKUP)))
