"""Messages over torch.distributed: gloo for CPU tensors and all control traffic, NCCL for CUDA tensors."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distloop.errors import RankDiedError, RankHungError, WorldError
from distloop.transports.base import CONTROL_TAG, Rows, Shared, Transport, Work
from distloop.transports.meeting import meet
from distloop.world import World

# How gloo says, in a bare RuntimeError, that a peer is gone, and that it is silent.
LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
)
SILENT = ("Timed out waiting", "Timeout waiting", "Application timeout caused pair closure")


class TorchTransport(Transport):
    """A process group for gradients, and one of its own for control, so that neither waits in the other's queue."""

    def __init__(self, data: dist.ProcessGroup, control: dist.ProcessGroup):
        self.data, self.control = data, control
        self.rank, self.size = dist.get_rank(data), dist.get_world_size(data)
        self._on_host = dist.get_backend(data) == "gloo"
        self.library = self._all_reduce

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        self._check(tensor)
        return GlooWork(dist.isend(tensor, to, group=self._group(tag), tag=tag), f"rank {to}", self.shared)

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        self._check(tensor)
        return GlooWork(dist.irecv(tensor, source, group=self._group(tag), tag=tag), f"rank {source}", self.shared)

    def all_gather(self, tensor: Tensor) -> Rows:
        # gloo matches an operation to its peers' by order, so the copy may be made now and sent later.
        rows = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype)
        work = dist.all_gather(list(rows.unbind(0)), tensor.clone(), group=self.control, async_op=True)
        return Rows(rows, [GlooWork(work, "another rank", self.shared)])

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        whole = tensor.contiguous()  # gloo writes as if it were
        dist.broadcast(whole, root, group=self.data if tensor.is_cuda else self.control)
        if whole is not tensor and 0 not in tensor.stride():  # (an expanded tensor has no elements to write to)
            tensor.copy_(whole)

    def process_group(self) -> dist.ProcessGroup:
        return self.data

    def close(self, *, failed: bool = False) -> None:
        if self.shared is not None:
            self.shared.close()
        if failed:
            return  # destroying a group whose peers are gone can wait for ever; the process is about to end
        dist.barrier(group=self.control)
        dist.destroy_process_group()

    def _all_reduce(self, tensor: Tensor) -> None:
        GlooWork(dist.all_reduce(tensor, group=self.data, async_op=True), "another rank", self.shared).wait()

    def _check(self, tensor: Tensor) -> None:
        if tensor.is_cuda and self._on_host:
            raise WorldError("gloo sends no GPU tensors between ranks: use world.backend nccl, or strategy.name ddp")

    def _group(self, tag: int) -> dist.ProcessGroup:
        return self.control if tag == CONTROL_TAG else self.data


class GlooWork:
    """An operation under way; a failure of it names the rank at its other end, where there is one."""

    def __init__(self, work: dist.Work | None, whose: str, shared: Shared | None):
        if work is None:
            raise RuntimeError("this process is not a member of the process group")
        self._work, self._whose, self._shared = work, whose, shared

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as failure:
            text = str(failure)
            if self._shared is not None and any(sign in text for sign in (*LOST, *SILENT)):
                self._shared.check(0.2)  # it can name who has ended: connections close a moment before
            if any(sign in text for sign in SILENT):
                raise RankHungError(f"{self._whose} has not been heard from for as long as world.timeout") from failure
            if any(sign in text for sign in LOST):
                raise RankDiedError(f"{self._whose} has ended, or cannot be reached") from failure
            raise


def connect(
    world: World, *, backend: str, device: torch.device, timeout: float, facts: Mapping[str, Any]
) -> TorchTransport:
    """Join the process group that the launcher's variables describe.

    Args:
        world: this process's place.
        backend: ``gloo`` or ``nccl``; carries gradients. Control traffic always uses gloo.
        device: where this rank's model lives.
        timeout: seconds after which a collective that a peer did not join fails.
        facts: what must be the same on all ranks.

    Raises:
        WorldError: an address is missing, NCCL is not usable here, or the ranks did not find each other.
    """
    if backend == "nccl" and device.type != "cuda":
        raise WorldError(nccl_unusable())
    if dist.is_initialized():
        raise WorldError(
            "this process has joined the other ranks before, and a run that failed, or code of yours, has not left "
            "them: start the ranks again, and let distloop call init_process_group"
        )
    limit = timedelta(seconds=timeout)
    try:
        store = meet(world, timeout, facts)
        dist.init_process_group(
            backend,
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
            device_id=device if backend == "nccl" else None,
        )
        data = dist.group.WORLD
        if data is None:
            raise WorldError("torch.distributed gave no world group")
        control = dist.new_group(backend="gloo", timeout=limit)
    except (dist.DistError, RuntimeError, ValueError) as failure:
        first_line = (str(failure).strip().splitlines() or ["no reason given"])[0]
        raise WorldError(
            f"rank {world.rank} of {world.size} could not join the others within {timeout:g} s: {first_line}"
        ) from failure
    return TorchTransport(data, control)


def nccl_unusable() -> str:
    """Say why NCCL cannot be used here and what can."""
    return (
        f"backend nccl needs models on GPUs: torch {torch.__version__} sees {torch.cuda.device_count()} of them here; "
        "use world.backend gloo"
    )
