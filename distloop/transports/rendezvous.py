"""A process group of torch.distributed for ranks that can already talk to each other, by another transport."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is there, and documented
from torch.distributed.distributed_c10d import Store

from distloop.errors import WorldError
from distloop.transports.base import Transport

ADDRESS = 512  # bytes in which rank 0's address is told


def gloo_group(transport: Transport, *, here: bool, timeout: float) -> dist.ProcessGroup:
    """Make the ranks of ``transport`` the world of torch.distributed; every rank calls it.

    Args:
        transport: what the ranks have; tells them where rank 0 listens.
        here: whether all ranks are on this host; nobody else can reach them then.
        timeout: seconds after which a rank that does not come is an error.

    Raises:
        WorldError: the ranks did not find each other.
    """
    if dist.is_initialized():
        raise WorldError("torch.distributed is in use already in this process: let distloop call init_process_group")
    if here:
        # Without this gloo resolves the host name and listens on whatever interface that gives.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    limit, rank, size = timedelta(seconds=timeout), transport.rank, transport.size
    try:
        store = _store(transport, here=here, limit=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    except (OSError, RuntimeError, ValueError) as failure:
        first_line = (str(failure).strip().splitlines() or ["no reason given"])[0]
        raise WorldError(f"rank {rank} of {size} could not join the others over gloo: {first_line}") from failure
    if dist.group.WORLD is None:
        raise WorldError("torch.distributed gave no world group")
    return dist.group.WORLD


def _store(transport: Transport, *, here: bool, limit: timedelta) -> Store:
    """Return the store that rank 0 keeps, of whose address the others learn."""
    told = torch.zeros(ADDRESS, dtype=torch.uint8)
    if transport.rank != 0:
        transport.broadcast(told)
        host, port = bytes(told.tolist()).rstrip(b"\0").decode().split()
        return _join(host, int(port), transport, limit)
    host = "127.0.0.1" if here else socket.gethostname()
    listening = socket.create_server((host if here else "", 0))
    port = listening.getsockname()[1]
    text = f"{host} {port}".encode()
    told[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    store = _join(host, port, transport, limit, is_master=True, master_listen_fd=listening.detach())
    transport.broadcast(told)
    return store


def _join(host: str, port: int, transport: Transport, limit: timedelta, **server: Any) -> Store:
    store: Store = TCPStore(host, port, transport.size, timeout=limit, wait_for_workers=False, **server)
    return store
