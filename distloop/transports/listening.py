"""Where rank 0 may be looked for, and what it listens at there."""

from __future__ import annotations

import errno
import socket

from distloop.errors import WorldError
from distloop.master import Master
from distloop.transports.addresses import close_in_children, family, is_loopback, resolve
from distloop.transports.introduction import whose
from distloop.world import World

LOCAL = "127.0.0.1"
EVERYWHERE = ""  # all addresses of this host
NAME_IT = "set it to a name or an address of rank 0's host that the others reach"


def addresses_of_master(world: World, master: Master) -> tuple[list[str], bool]:
    """Return where rank 0 may answer, and whether that is for ranks of this host alone."""
    chosen = master.address == "localhost" or is_loopback(master.address)
    if world.single_host and not chosen:
        return [LOCAL], True  # nobody else is to reach it
    found = resolve(master.address)
    outside = [address for address in found if not is_loopback(address)]
    if outside:
        return outside, False
    return found, world.single_host or (chosen and not world.host_known)


def listen(addresses: list[str], master: Master) -> list[socket.socket]:
    """Return rank 0's listeners, one for each address, at the first port that is free on all of them.

    An address that is not this host's may be that of something before it, as of a service of Kubernetes: then it is all
    of this host's.
    """
    taken = ""
    for port in master.ports:
        found: list[socket.socket] = []
        for address in addresses:
            try:
                found.append(_listen_at(address, port))
            except OSError as failure:
                for listener in found:
                    listener.close()
                if failure.errno != errno.EADDRINUSE:
                    where = f"{address}:{port} (MASTER_ADDR={master.address!r})"
                    raise WorldError(f"rank 0 cannot listen at {where}: {failure.strerror or failure}") from failure
                taken = taken or f"{address or socket.gethostname()}:{port} {whose(address or LOCAL, port)}"
                break
        else:
            return found
    raise WorldError(taken)


def _listen_at(address: str, port: int) -> socket.socket:
    try:
        return close_in_children(socket.create_server((address, port), family=family(address)))
    except OSError as failure:
        if failure.errno != errno.EADDRNOTAVAIL:
            raise
    return close_in_children(socket.create_server((EVERYWHERE, port), family=family(address)))
