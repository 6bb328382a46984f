"""A process group of torch.distributed for ranks that can already talk to each other, by another transport."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from distloop.errors import WorldError
from distloop.transports.addresses import own_address, use_interface
from distloop.transports.base import Transport
from distloop.transports.listening import LOCAL
from distloop.transports.meeting import join, serve

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
    limit, rank, size = timedelta(seconds=timeout), transport.rank, transport.size
    try:
        store = _store(transport, here=here, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    except (OSError, RuntimeError, ValueError) as failure:
        first_line = (str(failure).strip().splitlines() or ["no reason given"])[0]
        raise WorldError(f"rank {rank} of {size} could not join the others over gloo: {first_line}") from failure
    if dist.group.WORLD is None:
        raise WorldError("torch.distributed gave no world group")
    return dist.group.WORLD


def _store(transport: Transport, *, here: bool, timeout: float) -> Store:
    """Return the store that rank 0 keeps, of whose address the others learn; each uses its own interface to there."""
    told = torch.zeros(ADDRESS, dtype=torch.uint8)
    if transport.rank == 0:
        address = LOCAL if here else own_address(os.environ.get("MASTER_ADDR", ""))
        store, port = serve(address, transport.size, timeout)
        text = f"{address} {port}".encode()
        told[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        transport.broadcast(told)
        use_interface(address)
        return store
    transport.broadcast(told)
    where = bytes(told.tolist()).rstrip(b"\0").decode()
    use_interface(LOCAL if here else own_address(where.split()[0]))
    return join(where, transport.size, timeout)
