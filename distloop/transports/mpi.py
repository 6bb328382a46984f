"""Messages over MPI, through mpi4py: buffers only, no object of another rank is ever unpickled."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distloop.errors import RankDiedError, RankHungError
from distloop.transports.base import CONTROL_TAG, Rows, Transport, Work
from distloop.transports.mpi_library import cuda_aware, hosts, join, stay
from distloop.transports.rendezvous import gloo_group
from distloop.world import World

if TYPE_CHECKING:
    import torch.distributed as dist
    from mpi4py import MPI

SPIN = 1e-3  # seconds of waiting without sleep; longer ones would keep busy hosts from what is waited for
LONGEST_SLEEP = 1e-3
CLAIMING = 0.3  # seconds in which a lower rank may still say the same

_sched_yield: Callable[[], object] = getattr(os, "sched_yield", lambda: time.sleep(0))


def _poll(done: Callable[[], bool], timeout: float, overdue: Callable[[], str]) -> None:
    """Return when ``done``; leave the core to others meanwhile.

    Raises:
        RankHungError: it was not within ``timeout`` seconds; says ``overdue()``.
    """
    if done():
        return
    begun = time.monotonic()
    while not done():
        waited = time.monotonic() - begun
        if waited > timeout:
            raise RankHungError(f"{overdue()} for {timeout:g} s")
        if waited < SPIN:
            _sched_yield()
        else:
            time.sleep(min(waited / 100, LONGEST_SLEEP))


class _Message:
    """A message under way. ``buffer`` is what MPI reads or writes; ``into``, if given, gets a copy of it at the end."""

    def __init__(self, transport: MpiTransport, peer: int, buffer: Tensor, into: Tensor | None, *, sends: bool):
        self._transport, self._peer, self._buffer, self._into = transport, peer, buffer, into
        self._sends, self._complete = sends, False
        self._request: MPI.Request | None = None

    def start(self, communicator: MPI.Intracomm) -> _Message:
        raw = self._buffer.view(-1).view(torch.uint8)  # raises where the tensor is not contiguous
        self._count, self._kind = self._transport.in_units(raw.numel())
        what = [raw if raw.is_cuda else raw.numpy(), self._count, self._kind]
        self._request = (communicator.Isend if self._sends else communicator.Irecv)(what, self._peer)
        self._transport.under_way.add(self)  # MPI's buffer must outlive the caller's interest in it
        return self

    def wait(self) -> None:
        if self._complete:
            return
        _poll(self._done, self._transport.timeout, self._overdue)
        self._complete = True
        self._transport.under_way.discard(self)
        if self._into is not None:
            self._into.copy_(self._buffer)

    def _done(self) -> bool:
        from mpi4py import MPI

        assert self._request is not None
        status = MPI.Status()
        try:
            if not self._request.Test(status):
                return False
            if self._sends or status.Get_count(self._kind) == self._count:
                return True
        except MPI.Exception as failure:
            if failure.Get_error_class() != MPI.ERR_TRUNCATE:
                peer, reason = self._peer, failure.Get_error_string()
                raise RankDiedError(f"rank {peer} ended, or cannot be reached ({reason})") from failure
        self._transport.under_way.discard(self)
        raise RuntimeError(
            f"rank {self._transport.rank} expected {self._buffer.nbytes} bytes from rank {self._peer}, "
            "which sent another number"
        )

    def _overdue(self) -> str:
        own, peer = self._transport.rank, self._peer
        return (
            f"rank {peer} took nothing from rank {own}" if self._sends else f"rank {own} heard nothing from rank {peer}"
        )


class MpiTransport(Transport):
    """The ranks of an MPI job.

    Gradients, control messages and the last word before a failure have a communicator each, so that none is taken for
    another. CUDA tensors are staged through page-locked memory of the host, unless the MPI says that it is CUDA-aware;
    neither has been run yet: no machine with GPUs and an MPI was at hand.
    """

    def __init__(self, world: MPI.Intracomm, *, timeout: float):
        from mpi4py import MPI

        self.rank, self.size, self.timeout = world.rank, world.size, timeout
        self._wait_for_all(world)
        self._data, self._control, self._alarm = world.Dup(), world.Dup(), world.Dup()
        self._large: dict[int, MPI.Datatype] = {}
        self._reduced = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}
        self.under_way: set[_Message] = set()
        self.hosts = hosts(world)
        self.overlaps = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self.library = self._all_reduce
        self._cuda_aware = torch.cuda.is_available() and cuda_aware()
        self._group: dist.ProcessGroup | None = None
        self._left = False

    def isend(self, tensor: Tensor, to: int, tag: int = 0) -> Work:
        buffer = self._staged(tensor)
        if buffer is not tensor:
            buffer.copy_(tensor)
        elif tensor.is_cuda:
            torch.cuda.current_stream().synchronize()  # MPI knows nothing of streams
        return _Message(self, to, buffer.detach(), None, sends=True).start(self._of(tag))

    def irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Work:
        buffer = self._staged(tensor)
        if buffer is tensor and tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
        into = None if buffer is tensor else tensor.detach()
        return _Message(self, source, buffer.detach(), into, sends=False).start(self._of(tag))

    def all_gather(self, tensor: Tensor) -> Rows:
        return super().all_gather(tensor.detach().clone(memory_format=torch.contiguous_format))

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        whole = tensor.detach().contiguous()
        place = (self.rank - root) % self.size  # in a binomial tree: a parent has the place without its lowest one-bit
        lowest = place & -place if place else 1 << self.size.bit_length()
        if place:
            self.recv(whole, (place - lowest + root) % self.size)
        steps = [1 << i for i in reversed(range(lowest.bit_length() - 1)) if place + (1 << i) < self.size]
        for work in [self.isend(whole, (place + step + root) % self.size) for step in steps]:
            work.wait()
        if not tensor.is_contiguous() and 0 not in tensor.stride():  # (an expanded tensor has no elements to write to)
            tensor.detach().copy_(whole)

    def process_group(self) -> dist.ProcessGroup:
        """Return a gloo group of these ranks; they meet at rank 0, whose address MPI carries."""
        if self._group is None:
            self._group = gloo_group(self, here=len(set(self.hosts)) == 1, timeout=self.timeout)
        return self._group

    def close(self, *, failed: bool = False) -> None:
        """Leave together; after a failure leave MPI unfinished, from which mpirun sees that the others must end."""
        if self.shared is not None:
            self.shared.close()
        if failed:
            stay()
            return
        self._wait_for_all(self._control)
        if self._group is not None:
            torch.distributed.destroy_process_group()
            self._group = None
        for communicator in (self._data, self._control, self._alarm):
            communicator.Free()
        self._left = True

    def claim(self, what: str) -> bool:
        """Return whether this rank is the first to claim ``what``; of ranks that do so at once it is the lowest."""
        from mpi4py import MPI

        if self._left:
            return True
        tag, status = zlib.crc32(what.encode()) % 2**15, MPI.Status()
        try:
            if self._alarm.Iprobe(tag=tag):
                return False
            said = [self._alarm.Isend([bytes(1), 1, MPI.BYTE], peer, tag) for peer in self.peers()]
            until = time.monotonic() + CLAIMING
            while time.monotonic() < until:
                MPI.Request.Testall(said)
                while self._alarm.Iprobe(tag=tag, status=status):
                    self._alarm.Recv([bytearray(1), 1, MPI.BYTE], status.source, tag)
                    if status.source < self.rank:
                        return False
                time.sleep(1e-3)
        except MPI.Exception:
            pass  # cut off from the others: nobody else may be able to say it
        return True

    def _all_reduce(self, tensor: Tensor) -> None:
        kind = self._reduced.get(tensor.dtype)
        if kind is None:
            raise ValueError(f"MPI's all-reduce is for float32 and float64 here, not {tensor.dtype}")
        from mpi4py import MPI

        buffer = self._staged(tensor)
        if buffer is not tensor:
            buffer.copy_(tensor)
        raw = buffer.detach().view(-1)
        if raw.is_cuda:
            torch.cuda.current_stream().synchronize()
        # A blocking all-reduce is the faster, but waits for ever: begin when all are there.
        self._wait_for_all(self._data)
        self._data.Allreduce(MPI.IN_PLACE, [raw if raw.is_cuda else raw.numpy(), raw.numel(), kind])
        if buffer is not tensor:
            tensor.copy_(buffer)

    def in_units(self, size: int) -> tuple[int, MPI.Datatype]:
        """Return ``size`` bytes as MPI counts them: in 31 bits, before MPI 4."""
        from mpi4py import MPI

        if size < 2**31:
            return size, MPI.BYTE
        if size not in self._large:
            block = MPI.BYTE.Create_contiguous(2**30)
            whole, rest = divmod(size, 2**30)
            self._large[size] = MPI.Datatype.Create_struct([whole, rest], [0, size - rest], [block, MPI.BYTE]).Commit()
        return 1, self._large[size]

    def _staged(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, or memory of the host in its place if MPI cannot read where it lies."""
        if not tensor.is_cuda or self._cuda_aware:
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def _of(self, tag: int) -> MPI.Intracomm:
        return self._control if tag == CONTROL_TAG else self._data

    def _wait_for_all(self, communicator: MPI.Intracomm) -> None:
        barrier = communicator.Ibarrier()
        _poll(barrier.Test, self.timeout, lambda: f"rank {self.rank} waited for ranks that did not come")


def connect(world: World, *, timeout: float) -> MpiTransport:
    """Join the MPI job that the launcher started.

    Args:
        world: this process's place, as the launcher's variables say.
        timeout: seconds after which a message that a peer did not send or take fails.

    Raises:
        WorldError: mpi4py or MPI is missing, or MPI sees another world than the launcher's variables.
    """
    _state.transport = MpiTransport(join(world, timeout=timeout), timeout=timeout)
    return _state.transport


def abort(code: int) -> None:
    """End the whole job with exit code ``code``, where a rank's own end would not do that.

    Open MPI's mpirun returns the code of the first rank that ends in failure; MPICH's now and then that of the ranks
    which it kills for it.
    """
    from mpi4py import MPI

    if not MPI.Is_finalized() and MPI.get_vendor()[0] != "Open MPI":
        MPI.COMM_WORLD.Abort(code)


@dataclass
class _State:
    """The latest world that this process joined."""

    transport: MpiTransport | None = None


_state = _State()


def has_met() -> bool:
    """Return whether this process has met other ranks."""
    return _state.transport is not None


def claim(what: str) -> bool:
    """Return whether this is the first rank to claim ``what``; alone, or cut off from the others, it always is."""
    return _state.transport is None or _state.transport.claim(what)
