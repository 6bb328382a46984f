"""Stretches of memory that several processes map, as tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

Pointers = ctypes.Array[ctypes.c_void_p]
_FAILED = ctypes.c_void_p(-1).value  # what mmap returns when it has failed


class Mapping:
    """A file mapped for reading and writing. It keeps no descriptor, as mmap.mmap does: there may be thousands.

    Raises:
        OSError: it cannot be had, or the file is shorter: then touching the rest would end the process.
    """

    def __init__(self, handle: int, size: int):
        self.size, self._unmap = size, _LIBC.munmap
        if os.fstat(handle).st_size < size:
            raise OSError(f"the file has less than {size} bytes")
        found = _LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, handle, 0)
        if found == _FAILED or found is None:
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


def as_tensor(address: int, size: int, dtype: torch.dtype, numel: int, keep: object = None) -> Tensor:
    """Return memory as a tensor; ``keep`` lives as long as it does."""
    if not numel:
        return torch.empty(0, dtype=dtype)  # frombuffer refuses it
    data = (ctypes.c_char * size).from_address(address)
    data.keep = keep  # type: ignore[attr-defined]
    return torch.frombuffer(data, dtype=dtype, count=numel)


def pointers(addresses: Sequence[int]) -> Pointers:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


_LIBC = _libc()
