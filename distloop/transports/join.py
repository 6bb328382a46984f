"""How ranks find each other, and which transport they then use."""

from __future__ import annotations

import torch

from distloop.errors import WorldError
from distloop.transports import process_group
from distloop.transports.base import Transport
from distloop.transports.hosts import share
from distloop.world import World

TRANSPORTS = ("torch", "sockets", "shared_memory", "mpi")


def join(
    world: World,
    name: str = "auto",
    *,
    backend: str = "gloo",
    device: torch.device = torch.device("cpu"),  # noqa: B008 (it never changes)
    timeout: float = 300.0,
    share_memory: bool = True,
) -> tuple[Transport, list[str]]:
    """Join the other ranks of ``world``.

    Args:
        world: this process's place.
        name: of the transport of gradients: torch, sockets, shared_memory, mpi; or auto, which takes shared memory
            where all ranks share a host, else sockets, and torch for models on GPUs.
        backend: of torch.distributed, by which ranks meet if it is not by MPI.
        device: where this rank's model lives.
        timeout: seconds after which a silent peer is an error.
        share_memory: whether ranks of one host may share memory.

    Returns:
        The transport, and sentences on what was not to be had.

    Raises:
        WorldError: the ranks did not find each other, or what was asked for is not there.
    """
    transport = process_group.connect(world, backend=backend, device=device, timeout=timeout)
    if device.type != "cpu":
        if name in ("sockets", "shared_memory"):
            raise WorldError(f"world.transport: {name} carries tensors of CPUs; use torch for models on GPUs")
        return transport, []
    reason = share(transport, timeout, wanted=share_memory)
    if name == "torch":
        found: Transport = transport
    elif name == "shared_memory":
        found = _in_shared_memory(transport, reason, timeout)
    else:
        found, reason = _over(transport, name, reason, timeout)
    return found, [f"ranks of one host do not share memory: {reason}"] if reason is not None else []


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
