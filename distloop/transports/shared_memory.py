"""Memory that ranks of one host share, and sums in it: nothing is sent, and buckets that live there are not copied.

The memory is anonymous (memfd): it has no name in /dev/shm, is not bounded by the size of that, and is gone with the
last process that uses it, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from distloop import native
from distloop.errors import RankHungError
from distloop.host_memory import as_tensor
from distloop.transports.base import Transport
from distloop.transports.mappings import Buffer, Mapping, pointers
from distloop.transports.peers import Peers

SLOT = 256 * 1024  # bytes up to which a buffer is summed through a slot, with one barrier in place of two
SCRATCH = 4 * 2**20  # bytes of a larger buffer that does not live in shared memory which are summed at a time
PROCESSORS = 4096  # that are counted at most
LINE = 64  # bytes of a bell in the C helper
LOOK = 50_000_000  # nanoseconds of waiting after which a rank looks whether its peers are alive
MEANWHILE = 1_000_000  # and after which it does something else, where there is something else to be done
_SUFFIX = {torch.float32: "float", torch.float64: "double"}


class RefusedError(Exception):
    """Shared memory cannot be had; the reason is one clause."""


class SharedMemory:
    """What the ranks of this host share; see :class:`distloop.transports.base.Shared`.

    Made by :func:`share`. Every method is called by all ranks of the host, in the same order.
    """

    def __init__(self, transport: Transport, ranks: Sequence[int], pids: Sequence[int], timeout: float):
        self.ranks: Sequence[int] = list(ranks)
        self._transport = transport
        self._rank, self._size = self.ranks.index(transport.rank), len(self.ranks)
        self._native = _declared(native.load("shared_memory"))
        self._pids = list(pids)
        self.peers = self._watch()
        # Where ranks share cores, spinning keeps the others from theirs.
        self.spins = 100 if self._processors() >= self._size else 0
        self.timeout = timeout
        self.meanwhile: Callable[[], object] | None = None
        self._round, self._small = 0, 0
        self._buffers: dict[int, Buffer] = {}
        bells = LINE * self._size
        try:
            memory = self.map(bells + 2 * SLOT + SCRATCH)
        except RefusedError:
            self.close()
            raise
        self._bells = memory.addresses[0]  # the first rank's
        self._slots = [memory.part(bells + i * SLOT, SLOT).pointers for i in range(2)]
        self._scratch = memory.part(bells + 2 * SLOT, SCRATCH)

    def _processors(self) -> int:
        """Return how many processors these ranks have together; a launcher may have bound each to its own."""
        own = os.sched_getaffinity(0)
        mask = torch.tensor([number in own for number in range(PROCESSORS)])
        return int(self._transport.all_gather(mask).wait()[list(self.ranks)].any(0).sum())

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        try:
            mappings = self._map(max(numel * dtype.itemsize, 1))
        except RefusedError:
            return torch.zeros(numel, dtype=dtype)  # copied in and out, then, with the same sums
        shared = Buffer.of(mappings)
        own = mappings.pop(self._rank)  # the tensor's, and gone with it; the others' go when the record does
        self._buffers[own.address] = shared
        weakref.finalize(own, self._buffers.pop, own.address, None).atexit = False
        return as_tensor(own.address, own.size, dtype, numel, keep=own)

    def all_reduce(self, tensor: Tensor) -> None:
        flat = tensor.view(-1)  # refuses what is not contiguous: below only its address counts
        if tensor.nbytes <= SLOT and tensor.dtype in _SUFFIX:
            self._through_slots(flat)
            return
        shared = self._where(tensor)
        if shared is not None:
            self._in_place(shared, tensor.numel(), tensor.dtype)
            return
        for piece in flat.split(SCRATCH // tensor.element_size()):
            staged = self._scratch.tensor(self._rank, piece.dtype, piece.numel())
            staged.copy_(piece)
            self._in_place(self._scratch, piece.numel(), piece.dtype)
            piece.copy_(staged)

    def pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        if self.holds(tensor):
            return [tensor]
        return list(tensor.view(-1).split(SCRATCH // tensor.element_size()))

    def holds(self, tensor: Tensor) -> bool:
        return self._where(tensor) is not None

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        buffer = self._where(tensor)
        if buffer is None:
            buffer = self._scratch
            buffer.tensor(self._rank, tensor.dtype, tensor.numel()).copy_(tensor)
        self.barrier()
        start, stop = self._slice(self._rank, tensor.numel())
        self._sum(buffer, tensor.dtype, start, stop, to=[self._rank])
        return buffer.tensor(self._rank, tensor.dtype, tensor.numel())[start:stop]

    def all_gather(self, tensor: Tensor) -> None:
        buffer = self._where(tensor)
        own, staged = buffer is not None, buffer or self._scratch
        self.barrier()
        for rank in range(self._size):
            if rank != self._rank or not own:
                start, stop = self._slice(rank, tensor.numel())
                tensor[start:stop].copy_(staged.tensor(rank, tensor.dtype, tensor.numel())[start:stop])
        self.barrier()  # nobody changes what another still reads

    def barrier(self) -> None:
        """Return when every rank of this host has come here.

        Raises:
            RankDiedError, RankHungError: naming those who have not.
        """
        self._round += 1
        self._patiently(
            lambda entered: self._native.dl_barrier(
                self._bells, self._rank, self._size, self._round & 0xFFFFFFFF, entered, self.spins, self._patience()
            )
        )

    def check(self, seconds: float = 0.0) -> None:
        self.peers.check(seconds)

    def close(self) -> None:
        self.peers.close()
        self._buffers.clear()

    def _through_slots(self, tensor: Tensor) -> None:
        self._round += 1
        self._small ^= 1
        function = getattr(self._native, f"dl_small_{_SUFFIX[tensor.dtype]}")
        address, slots, numel = tensor.data_ptr(), self._slots[self._small], tensor.numel()
        self._patiently(
            lambda entered: function(
                address,
                slots,
                numel,
                self._bells,
                self._rank,
                self._size,
                self._round & 0xFFFFFFFF,
                entered,
                self.spins,
                self._patience(),
            )
        )

    def _patiently(self, attempt: Callable[[int], int]) -> None:
        """Call until it returns 0, looking after the peers meanwhile."""
        if not attempt(0):
            return
        deadline = time.monotonic() + self.timeout
        while attempt(1):
            if self.meanwhile is not None:
                self.meanwhile()
            late = self._late()
            self.peers.check()
            if late and time.monotonic() > deadline:
                raise RankHungError(
                    f"rank {self._transport.rank} waited {self.timeout:g} s in shared memory; not heard from: "
                    f"rank{'s' if len(late) > 1 else ''} {', '.join(map(str, late))}"
                )

    def _patience(self) -> int:
        return LOOK if self.meanwhile is None else MEANWHILE

    def _late(self) -> list[int]:
        """Return the ranks that have not come to the present barrier."""
        behind = [
            ((self._native.dl_arrived(self._bells, i) - self._round) & 0xFFFFFFFF) >= 1 << 31 for i in range(self._size)
        ]
        return [rank for i, rank in enumerate(self.ranks) if i != self._rank and behind[i]]

    def _where(self, tensor: Tensor) -> Buffer | None:
        """Return where a tensor that was allocated here, or a part of one, lies on all ranks; None if it was not."""
        address = tensor.data_ptr()
        if (whole := self._buffers.get(address)) is not None:
            return whole
        for start, buffer in self._buffers.items():
            if start < address and address + tensor.nbytes <= start + buffer.size:
                return buffer.part(address - start, tensor.nbytes)
        return None

    def _in_place(self, buffer: Buffer, numel: int, dtype: torch.dtype) -> None:
        self.barrier()
        start, stop = self._slice(self._rank, numel)
        self._sum(buffer, dtype, start, stop, to=range(self._size))
        self.barrier()

    def _slice(self, rank: int, numel: int) -> tuple[int, int]:
        """Return which elements a rank sums; in whole cache lines."""
        lines = -(-numel // LINE)
        return min(lines * rank // self._size * LINE, numel), min(lines * (rank + 1) // self._size * LINE, numel)

    def _sum(self, buffer: Buffer, dtype: torch.dtype, start: int, stop: int, to: Sequence[int]) -> None:
        """Sum elements ``start`` to ``stop`` over all ranks, in rank order, into those of the ranks ``to``."""
        if dtype in _SUFFIX:
            target = buffer.pointers if len(to) > 1 else pointers([buffer.addresses[rank] for rank in to])
            getattr(self._native, f"dl_sum_{_SUFFIX[dtype]}")(buffer.pointers, self._size, target, len(to), start, stop)
            return
        parts = [buffer.tensor(rank, dtype, stop)[start:] for rank in range(self._size)]
        exact = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
        total = parts[0].to(exact, copy=True)
        for part in parts[1:]:
            total += part
        for rank in to:
            parts[rank].copy_(total)

    def map(self, size: int) -> Buffer:
        """Return ``size`` bytes on each rank, that last as long as the buffer. Raises RefusedError, on all ranks."""
        return Buffer.of(self._map(size))

    def _map(self, size: int) -> list[Mapping]:
        """Make ``size`` bytes on each rank and map those of all; refused by all if one cannot."""
        handle, reserved = -1, True
        try:
            handle = os.memfd_create("distloop", os.MFD_CLOEXEC)
            os.posix_fallocate(handle, 0, size)  # now, rather than by a bus error later
        except OSError:
            reserved = False
        try:
            mappings = self._opened(self._told(handle if reserved else -1), size)
            everyone = self._told(len(mappings) == self._size)  # and only then close what they open
        finally:
            if handle >= 0:
                os.close(handle)
        if not all(everyone):
            raise RefusedError(f"no {size / 2**20:.3g} MiB of memory to share could be had")
        return mappings

    def _opened(self, handles: Sequence[int], size: int) -> list[Mapping]:
        """Map what the ranks of this host, by their descriptors, have reserved; nothing if one cannot be had."""
        mappings: list[Mapping] = []
        for pid, rank in zip(self._pids, self.ranks, strict=True):
            if handles[rank] < 0:
                return []
            try:
                opened = os.open(f"/proc/{pid}/fd/{handles[rank]}", os.O_RDWR | os.O_CLOEXEC)
                try:
                    mappings.append(Mapping(opened, size))
                finally:
                    os.close(opened)
            except OSError:
                return []
        return mappings

    def _watch(self) -> Peers:
        """Watch the processes of this host. Raises RefusedError, on all ranks, if one may not."""
        peers = None
        with suppress(OSError):
            peers = Peers(self.ranks, self._pids)
        if all(self._told(peers is not None)) and peers is not None:
            return peers
        if peers is not None:
            peers.close()
        raise RefusedError("processes may not watch each other here")

    def _told(self, own: int) -> list[int]:
        return [int(row) for row in self._transport.all_gather(torch.tensor([own], dtype=torch.int64)).wait()]


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the arguments of the C functions, once."""
    pointer, long, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32
    meeting: list[Any] = [pointer, ctypes.c_int, ctypes.c_int, word, ctypes.c_int, ctypes.c_int, long]
    library.dl_barrier.argtypes = meeting
    library.dl_arrived.argtypes, library.dl_arrived.restype = [pointer, ctypes.c_int], word
    for suffix in _SUFFIX.values():
        total = [pointer, ctypes.c_int, pointer, ctypes.c_int, long, long]
        getattr(library, f"dl_sum_{suffix}").argtypes = total
        getattr(library, f"dl_small_{suffix}").argtypes = [pointer, pointer, long, *meeting]
    return library
