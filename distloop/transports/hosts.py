"""Which ranks share a host, and what they share."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from pathlib import Path

import torch

from distloop import native
from distloop.transports.base import Transport


def _find(transport: Transport) -> tuple[list[int], list[int]]:
    """Return the number of each rank's host, counted in order of its first rank, and each rank's process id there."""
    rows = transport.all_gather(torch.tensor([_digest(host()), os.getpid()], dtype=torch.int64)).wait().tolist()
    numbers: dict[int, int] = {}
    return [numbers.setdefault(digest, len(numbers)) for digest, _ in rows], [pid for _, pid in rows]


def share(transport: Transport, timeout: float, *, wanted: bool = True) -> str | None:
    """Tell ``transport`` which ranks share a host, and give it memory shared by them, if there are any.

    Returns:
        One clause that says why ranks of one host do not share memory; None if they do, or if no two share a host.
    """
    from distloop.transports.shared_memory import RefusedError, SharedMemory

    hosts, pids = _find(transport)
    transport.hosts = hosts
    if len(set(hosts)) == len(hosts):
        return None
    reason = _unusable() if wanted else "world.shared_memory is false"
    if int(transport.all_gather(torch.tensor([reason is None])).wait().min()) == 0:
        return reason or "it cannot be had on another rank"
    ranks = [rank for rank, number in enumerate(hosts) if number == hosts[transport.rank]]
    try:
        transport.shared = SharedMemory(transport, ranks, [pids[rank] for rank in ranks], timeout)
    except RefusedError as refusal:
        return str(refusal)
    return None


def host() -> str:
    """Return what tells this host from others: containers and network namespaces of one machine count as hosts."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/net", "/proc/self/ns/pid"):
        try:
            parts.append(str(Path(path).readlink()) if "/ns/" in path else Path(path).read_text().strip())
        except OSError:
            parts.append("")
    return "\n".join(parts)


def _unusable() -> str | None:
    """Return why this process cannot share memory, if it cannot."""
    try:
        native.load("shared_memory")
        os.close(os.pidfd_open(os.getpid()))
    except native.UnavailableError as reason:
        return str(reason)
    except (OSError, AttributeError) as failure:
        return f"this system does not let processes watch each other ({failure})"
    return None if sys.platform == "linux" else "this is not Linux"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
