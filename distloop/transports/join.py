"""How ranks find each other, and which transport they then use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from distloop.errors import WorldError
from distloop.transports import process_group
from distloop.transports.base import Transport
from distloop.transports.hosts import share
from distloop.world import World


def join(
    world: World,
    name: str = "auto",
    *,
    backend: str = "auto",
    device: torch.device = torch.device("cpu"),  # noqa: B008 (it never changes)
    timeout: float = 300.0,
    share_memory: bool = True,
    torch_collects: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> tuple[Transport, list[str]]:
    """Join the other ranks of ``world``.

    Args:
        world: this process's place.
        name: of the transport of gradients: torch, sockets, shared_memory, mpi; or auto, which takes mpi under an
            mpirun, shared memory where all ranks share a host, else sockets, and torch for models on GPUs.
        backend: of torch.distributed, by which ranks meet if it is not by MPI: gloo, nccl, or auto.
        device: where this rank's model lives.
        timeout: seconds after which a silent peer is an error.
        share_memory: whether ranks of one host may share memory.
        torch_collects: whether gradients are torch's own reducer's to send, which needs nothing of ours.
        facts: what must be the same on all ranks, as far as they meet at an address; MPI's ranks meet before.

    Returns:
        The transport, and sentences on what was not to be had.

    Raises:
        WorldError: the ranks did not find each other, or what was asked for is not there.
    """
    transport = _meet(world, name, backend, device, timeout, facts or {})
    if torch_collects:
        return transport, []
    if device.type != "cpu":
        if name in ("sockets", "shared_memory"):
            raise WorldError(f"world.transport: {name} carries tensors of CPUs; use torch for models on GPUs")
        return transport, []
    reason = share(transport, timeout, wanted=share_memory)
    if name in ("torch", "mpi") or (name == "auto" and meets_by_mpi(world, name, backend)):
        found: Transport = transport
    elif name == "shared_memory":
        found = _in_shared_memory(transport, reason, timeout)
    else:
        found, reason = _over(transport, name, reason, timeout)
    return found, [f"ranks of one host do not share memory: {reason}"] if reason is not None else []


def meets_by_mpi(world: World, name: str, backend: str) -> bool:
    """Return whether ranks meet by MPI: because that is asked for, or because an mpirun started them."""
    # nccl is torch.distributed's, and whoever sets an address wants that as well.
    started = world.by_mpirun and "MASTER_ADDR" not in os.environ
    return name == "mpi" or (started and backend != "nccl" and name != "torch")


def _meet(
    world: World, name: str, backend: str, device: torch.device, timeout: float, facts: Mapping[str, Any]
) -> Transport:
    if meets_by_mpi(world, name, backend):
        from distloop.transports import mpi

        return mpi.connect(world, timeout=timeout)
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    return process_group.connect(world, backend=backend, device=device, timeout=timeout, facts=facts)


def _in_shared_memory(below: Transport, reason: str | None, timeout: float) -> Transport:
    from distloop.transports.queues import QueueTransport

    if len(set(below.hosts)) > 1:
        raise WorldError("world.transport: shared_memory is for ranks of one host; use auto, sockets or torch")
    if reason is not None:
        raise WorldError(f"world.transport: shared_memory cannot be had: {reason}; use auto, sockets or torch")
    return QueueTransport(below, timeout)


def _over(below: Transport, name: str, reason: str | None, timeout: float) -> tuple[Transport, str | None]:
    """Return the transport for ``auto`` or ``sockets``, and why ranks of one host share less than they could."""
    from distloop.transports.queues import QueueTransport
    from distloop.transports.sockets import SocketTransport

    if name != "sockets" and below.shared is not None and len(below.shared.ranks) == below.size:
        try:
            return QueueTransport(below, timeout), reason
        except WorldError as refusal:
            reason = str(refusal)
    return SocketTransport(below, timeout), reason
