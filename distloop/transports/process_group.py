"""Messages over torch.distributed: gloo for CPU tensors and all control traffic, NCCL for CUDA tensors."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distloop.errors import WorldError
from distloop.transports.base import CONTROL_TAG, Rows, Transport, Work
from distloop.world import World


class TorchTransport(Transport):
    """A process group for gradients, and one of its own for control, so that neither waits in the other's queue."""

    def __init__(self, data: dist.ProcessGroup, control: dist.ProcessGroup):
        self.data, self.control = data, control
        self.rank, self.size = dist.get_rank(data), dist.get_world_size(data)

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        return _work(dist.isend(tensor, to, group=self._group(tag), tag=tag))

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        return _work(dist.irecv(tensor, source, group=self._group(tag), tag=tag))

    def all_gather(self, tensor: Tensor) -> Rows:
        # gloo matches an operation to its peers' by order, so the copy may be made now and sent later.
        rows = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype)
        work = dist.all_gather(list(rows.unbind(0)), tensor.clone(), group=self.control, async_op=True)
        return Rows(rows, [_work(work)])

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        dist.broadcast(tensor, root, group=self.data if tensor.is_cuda else self.control)

    def close(self, *, failed: bool = False) -> None:
        if failed:
            return  # destroying a group whose peers are gone can wait for ever; the process is about to end
        dist.barrier(group=self.control)
        dist.destroy_process_group()

    def _group(self, tag: int) -> dist.ProcessGroup:
        return self.control if tag == CONTROL_TAG else self.data


def _work(work: dist.Work | None) -> Work:
    if work is None:
        raise RuntimeError("this process is not a member of the process group")
    return work


def connect(world: World, *, backend: str, device: torch.device, timeout: float) -> TorchTransport:
    """Join the process group that the launcher's variables describe.

    Args:
        world: this process's place.
        backend: ``gloo`` or ``nccl``; carries gradients. Control traffic always uses gloo.
        device: where this rank's model lives.
        timeout: seconds after which a collective that a peer did not join fails.

    Raises:
        WorldError: an address is missing, NCCL is not usable here, or the ranks did not find each other.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise WorldError(
            f"{world.launcher} started {world.size} ranks but {' and '.join(missing)} is not set: "
            "start with torchrun, or export the address and a free port of rank 0's host"
        )
    if backend == "nccl" and device.type != "cuda":
        raise WorldError(nccl_unusable())
    if world.single_host:
        # Without this gloo resolves the host name and listens on whatever interface that gives.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", world.rank, world.size, timeout=limit))
        store.set_timeout(limit)
        _stores.append(store)
        dist.init_process_group(
            backend,
            store=PrefixStore("distloop", store),
            rank=rank,
            world_size=size,
            timeout=limit,
            device_id=device if backend == "nccl" else None,
        )
        data = dist.group.WORLD
        if data is None:
            raise WorldError("torch.distributed gave no world group")
        control = dist.new_group(backend="gloo", timeout=limit)
    except (dist.DistError, RuntimeError, ValueError) as failure:
        first_line = str(failure).strip().splitlines()[0]
        raise WorldError(
            f"rank {world.rank} of {world.size} could not join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout:g} s: {first_line}"
        ) from failure
    return TorchTransport(data, control)


# The store of this process's group, kept for the last word of a failing rank. A process has one world at most.
_stores: list[Store] = []


def claim(what: str) -> bool:
    """Return whether this is the first rank to claim ``what``; alone, or cut off from the others, it always is."""
    if not _stores:
        return True
    try:
        return int(_stores[-1].add(f"claim/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1)) == 1
    except (dist.DistError, RuntimeError):
        return True


def nccl_unusable() -> str:
    """Say why NCCL cannot be used here and what can."""
    return (
        f"backend nccl needs a GPU: this host has {torch.cuda.device_count()} usable GPUs and torch "
        f"{torch.__version__}; use world.backend gloo"
    )
