"""Stretches of memory that several processes map, as tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from distloop.host_memory import FAILED, LIBC, as_tensor

Pointers = ctypes.Array[ctypes.c_void_p]


class Mapping:
    """A file mapped for reading and writing. It keeps no descriptor, as mmap.mmap does: there may be thousands.

    Raises:
        OSError: it cannot be had, or the file is shorter: then touching the rest would end the process.
    """

    def __init__(self, handle: int, size: int):
        self.size, self._unmap = size, LIBC.munmap
        if os.fstat(handle).st_size < size:
            raise OSError(f"the file has less than {size} bytes")
        found = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, handle, 0)
        if found == FAILED or found is None:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address: int = found

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._unmap(self.address, self.size)


class Buffer:
    """A stretch of memory per rank of this host, each mapped by all of them."""

    def __init__(self, addresses: Sequence[int], size: int, keep: object):
        self.addresses, self.size, self._keep = list(addresses), size, keep
        self.pointers = pointers(self.addresses)

    @classmethod
    def of(cls, mappings: Sequence[Mapping]) -> Buffer:
        """Return the buffer that has a mapping per rank, and lasts as long as they are in that list."""
        return cls([mapping.address for mapping in mappings], mappings[0].size, mappings)

    def tensor(self, rank: int, dtype: torch.dtype, numel: int) -> Tensor:
        """Return the beginning of a rank's stretch as a tensor, which lasts as long as the buffer."""
        return as_tensor(self.addresses[rank], self.size, dtype, numel)

    def part(self, offset: int, size: int) -> Buffer:
        return Buffer([address + offset for address in self.addresses], size, self._keep)


def pointers(addresses: Sequence[int]) -> Pointers:
    return (ctypes.c_void_p * len(addresses))(*addresses)
