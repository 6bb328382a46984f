"""The host's memory as tensors: stretches of huge pages, and what is mapped already."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

HUGE = 2**21  # bytes of a huge page on x86, and on ARM with pages of 4 KiB; what is smaller gains nothing


def allocate(numel: int, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    """Return zeros on huge pages, where the system has them; they are freed with the tensor.

    One huge page is one entry of the processor's address table where there were 512, and one fault at first touch.

    Args:
        numel: number of elements, in one dimension.
        dtype: of each.
        pinned: registered with CUDA too, if it is there, for copies to and from a GPU beside its work.
    """
    size = numel * dtype.itemsize
    stretch = _stretch(size) if size >= HUGE else None
    if stretch is None:
        return torch.zeros(numel, dtype=dtype, pin_memory=pinned and torch.cuda.is_available())
    if pinned:
        stretch.pin()
    return as_tensor(stretch.address, size, dtype, numel, keep=stretch)


def zeros_like(tensors: list[Tensor]) -> list[Tensor]:
    """Return zeros that lie as each of ``tensors`` does, on huge pages where they are on the CPU and large together."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += math.ceil(tensor.numel() / 16) * 16  # so that each begins at a cache line
    same = {(t.device.type, t.dtype) for t in tensors}
    if same != {("cpu", tensors[0].dtype)} or end * tensors[0].dtype.itemsize < HUGE:
        return [torch.zeros_like(t, memory_format=torch.preserve_format) for t in tensors]
    flat = allocate(end, tensors[0].dtype)
    return [flat[a : a + t.numel()].as_strided(t.shape, t.stride()) for a, t in zip(starts, tensors, strict=True)]


def as_tensor(address: int, size: int, dtype: torch.dtype, numel: int, keep: object = None) -> Tensor:
    """Return memory as a tensor; ``keep`` lives as long as it does."""
    if not numel:
        return torch.empty(0, dtype=dtype)  # frombuffer refuses it
    data = (ctypes.c_char * size).from_address(address)
    data.keep = keep  # type: ignore[attr-defined]
    return torch.frombuffer(data, dtype=dtype, count=numel)


class _Stretch:
    """Memory of this process alone, from a multiple of a huge page on."""

    def __init__(self, size: int):
        self._size, self._unmap = size + HUGE, LIBC.munmap
        self._unpin: Callable[[int], object] | None = None
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        found = LIBC.mmap(None, self._size, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
        if found == FAILED or found is None:
            raise MemoryError(f"the system has no {size} bytes of memory for one tensor")
        self._begin: int = found
        self.address = math.ceil(found / HUGE) * HUGE
        # The next multiple of a page: advice is for whole pages.
        self.huge = not LIBC.madvise(self.address, math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)

    def pin(self) -> None:
        """Register the stretch with CUDA, where there is one. No test reaches this: it takes a GPU."""
        if not torch.cuda.is_available():
            return
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(self.address, self._size - HUGE, 0)) == 0:
            self._unpin = runtime.cudaHostUnregister

    def __del__(self) -> None:
        if not hasattr(self, "_begin"):
            return
        if self._unpin is not None:
            with contextlib.suppress(Exception):  # at exit CUDA may be gone before its memory
                self._unpin(self.address)
        self._unmap(self._begin, self._size)


def _stretch(size: int) -> _Stretch | None:
    """Return memory of huge pages, or None where there are none to ask for."""
    if sys.platform != "linux":
        return None
    stretch = _Stretch(size)
    return stretch if stretch.huge else None


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.mmap.restype = ctypes.c_void_p
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


LIBC = _libc()
FAILED = ctypes.c_void_p(-1).value  # what mmap returns when it has failed
