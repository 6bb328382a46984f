"""Tensors in a safetensors file: written as a stream, and a header that is believed only after it has been checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distloop.checkpoints import text
from distloop.checkpoints.names import cut_key, is_tensor
from distloop.errors import CheckpointError

HEADER = 2**24  # bytes of a file's header at most
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor, or a cut of one, as it goes into a file.

    The tensor that is stored is ``logical.permute(order)``, or the logical one without ``order``. ``order`` is for
    memory formats: that of channels_last is (0, 2, 3, 1), and what is stored is then contiguous where the logical
    tensor is not. Who reads by name is given the logical tensor.

    Args:
        name: of the logical tensor; no other file of the checkpoint has it, apart from its other cuts.
        tensor: whole: the tensor as stored. A cut: one dimension, elements ``start`` onwards of the flattened
            (row-major) tensor as stored. A cut without elements is left out.
        shape: of the *logical* tensor; needed for a cut.
        start: None for a whole tensor.
        order: of dimensions, if not their own.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...] | None = None
    start: int | None = None
    order: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """What it is called in the file."""
        if self.start is None:
            return self.name
        return cut_key(self.name, self.start, self.start + self.tensor.numel())

    @property
    def logical_shape(self) -> tuple[int, ...]:
        if self.shape is not None:
            return tuple(self.shape)
        return inverse_shape(tuple(self.tensor.shape), self.order)

    def check(self) -> None:
        """Raise :class:`CheckpointError` if what it says of itself cannot be."""
        said = f"tensor {self.name!r}"
        if not is_tensor(self.name):
            raise CheckpointError(f"{said}: a name is of printable characters, and does not end as a cut does")
        if self.tensor.layout != torch.strided or self.tensor.is_meta or self.tensor.dtype not in NAMES:
            raise CheckpointError(f"{said}: {self.tensor.dtype} ({self.tensor.layout}) has no place in safetensors")
        if self.start is not None and (self.shape is None or self.tensor.dim() != 1):
            raise CheckpointError(f"{said}: a cut has one dimension, and says the shape of the whole")
        shape = self.logical_shape
        if self.order is not None and sorted(self.order) != list(range(len(shape))):
            raise CheckpointError(f"{said}: order {self.order} does not order {len(shape)} dimensions")
        if self.start is None and permuted(shape, self.order) != tuple(self.tensor.shape):
            raise CheckpointError(
                f"{said}: has shape {tuple(self.tensor.shape)}; {permuted(shape, self.order)} is said"
            )
        if self.start is not None and not 0 <= self.start <= math.prod(shape) - self.tensor.numel():
            raise CheckpointError(f"{said}: {self.key} is not within its {math.prod(shape)} elements")


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor: where its bytes are, counted from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def permuted(shape: tuple[int, ...], order: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the shape as stored of a logical one."""
    return shape if order is None else tuple(shape[i] for i in order)


def inverse_shape(stored: tuple[int, ...], order: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the logical shape of one as stored."""
    if order is None or sorted(order) != list(range(len(stored))):
        return stored
    return tuple(stored[order.index(i)] for i in range(len(order)))


def file_of(tensors: Iterable[Stored], metadata: Mapping[str, str] | None) -> tuple[list[Stored], bytes]:
    """Return tensors in the order of a file, and the header for them.

    Raises:
        CheckpointError: they cannot be stored.
    """
    found = []
    for stored in tensors:
        stored.check()
        if stored.start is None or stored.tensor.numel():
            found.append(stored)
    found.sort(key=lambda stored: -stored.tensor.dtype.itemsize)  # so that each lies at a multiple of its elements
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    if not all(isinstance(item, str) for pair in header["__metadata__"].items() for item in pair):
        raise CheckpointError("metadata: are strings by strings")
    end = 0
    for stored in found:
        if stored.key in header:
            raise CheckpointError(f"tensor {stored.key!r}: is given twice for one file")
        begin, end = end, end + stored.tensor.numel() * stored.tensor.dtype.itemsize
        shape = list(stored.tensor.shape)
        header[stored.key] = {"dtype": NAMES[stored.tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    if len(data) > HEADER:
        raise CheckpointError(f"a file of {len(found)} tensors has a header of {len(data)} bytes; at most {HEADER}")
    return found, len(data).to_bytes(8, "little") + data


def parts(found: list[Stored], header: bytes) -> Iterator[bytes | memoryview]:
    """Return the file's bytes, one tensor at a time: at most one is copied at any moment."""
    yield header
    for stored in found:
        yield as_bytes(stored.tensor.detach().cpu().contiguous())


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def parse(data: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Check the header of a file and return its tensors by key, and its metadata.

    Args:
        data: the file's beginning: 8 bytes and the header they tell the length of.
        size: the file's number of bytes.

    Raises:
        ValueError: what is wrong with it.
    """
    header = text.loads(data[8:])
    if not isinstance(header, dict):
        raise ValueError("has a header that is no table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has metadata that are not strings")
    entries = {key: _entry(key, value, len(data)) for key, value in header.items()}
    end = len(data)
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            kind = "overlap" if entry.begin < end else "leave a hole"
            raise ValueError(f"has tensors that {kind} before {key[:80]!r}: at byte {entry.begin}, not {end}")
        end = entry.end
    if end != size:
        raise ValueError(f"has {size} bytes; its header tells of {end}")
    return entries, metadata


def header_length(first: bytes, size: int) -> int:
    """Return the length of the header that a file's first 8 bytes tell, these 8 included.

    Raises:
        ValueError: it cannot be.
    """
    length = 8 + int.from_bytes(first, "little")
    if not 8 + 2 <= length <= min(size, 8 + HEADER):
        raise ValueError(f"has a header of {length - 8} bytes; at most {min(size - 8, HEADER)} can be")
    return length


def _entry(key: str, value: object, base: int) -> Entry:
    said = f"says of {key[:80]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{said} other than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{said} dtype {str(dtype)[:20]!r}, which is not known")
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        raise ValueError(f"{said} a shape or offsets that are not numbers from 0 on")
    bytes_ = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != bytes_:
        raise ValueError(f"{said} {offsets[1] - offsets[0]} bytes; {dtype} of shape {shape[:8]} takes {bytes_}")
    return Entry(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def is_shape(value: object) -> bool:
    """Return whether this is a list of sizes that a tensor can have."""
    if not isinstance(value, list) or len(value) > 64:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
