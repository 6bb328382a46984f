"""Parameters side by side in flat memory, and that memory cut into buckets of one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distloop.collectives.sharded import unit
from distloop.strategies.base import Parameters, Segment
from distloop.transports import Transport


@dataclass(frozen=True)
class Member:
    """Elements ``start`` to ``stop`` of a parameter, in the order in which they lie in memory, in a bucket at ``at``.

    ``home`` is where all of the parameter will be, in its own shape.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    at: int
    home: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements of ``tensor``, which has the parameter's shape."""
        return in_memory_order(tensor, self.parameter)[self.start : self.stop]

    def place_in(self, buffer: Tensor) -> Tensor:
        return buffer[self.at : self.at + self.stop - self.start]


class Bucket:
    """A stretch of flat memory: what travels together. Every rank owns an even cut of it."""

    def __init__(self, flat: Tensor, members: Sequence[Member], rank: int, size: int):
        self.flat, self.members = flat, members
        part = len(flat) // size
        self.first, self.last = part * rank, part * (rank + 1)  # this rank's
        self.own = flat[self.first : self.last]

    def adopt(self, values: Tensor) -> None:
        """Move the parameters here, as they are: what this rank owns in full precision to ``values`` too."""
        for member in self.members:
            member.place_in(self.flat).copy_(member.of(member.parameter.detach()))
        if values.data_ptr() != self.own.data_ptr():
            for member, start, stop, where in self._owned():
                values[where].copy_(in_memory_order(member.parameter.detach(), member.parameter)[start:stop])
        for member in self.members:
            if member.stop == member.parameter.numel():
                member.parameter.data = member.home

    def segments(self, values: Tensor, rounded: Tensor | None) -> list[Segment]:
        """Return this rank's part as segments whose values are in ``values``, of the length of the part."""
        return [
            Segment(m.name, m.parameter, start, stop, values[where], None if rounded is None else rounded[where])
            for m, start, stop, where in self._owned()
        ]

    def fill(self, buffer: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        """Set ``buffer`` to the gradients of the members, in their places; zeros where there is none.

        ``sums`` are of earlier micro-batches, where those are kept apart.
        """
        copied: tuple[list[Tensor], list[Tensor]] = [], []
        added: tuple[list[Tensor], list[Tensor]] = [], []
        for member in self.members:
            parts = [t for t in (sums.get(member.parameter), member.parameter.grad) if t is not None]
            place = member.place_in(buffer)
            if not parts:
                place.zero_()
            for part, (to, what) in zip(parts, (copied, added), strict=False):
                to.append(place)
                what.append(member.of(part))
        if copied[0]:
            torch._foreach_copy_(*copied)
        if added[0]:
            torch._foreach_add_(*added)

    def take(self, buffer: Tensor) -> list[Tensor]:
        """Return the segments' parts of ``buffer``, which is of the length of this rank's part."""
        return [buffer[where] for *_, where in self._owned()]

    def _owned(self) -> Iterator[tuple[Member, int, int, slice]]:
        """Yield which elements of which parameter this rank owns, and where in its part they lie."""
        for m in self.members:
            start = m.start + max(self.first - m.at, 0)
            stop = min(m.stop, m.start + self.last - m.at)
            if stop > start:
                at = m.at + start - m.start - self.first
                yield m, start, stop, slice(at, at + stop - start)


def in_memory_order(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the elements of ``tensor`` in the order in which those of ``parameter`` lie in memory, as one row."""
    if tensor.stride() != parameter.stride():
        tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def lay_out(parameters: Parameters, transport: Transport, nbytes: int, weights: torch.dtype | None) -> list[Bucket]:
    """Return buckets of flat memory for parameters, in reverse order of definition; they move in by ``adopt``.

    Backward makes the last layer's gradients first. A parameter may reach over several buckets.

    Args:
        parameters: of any dtypes and devices; a bucket has those of one.
        transport: allocates the memory.
        nbytes: of a bucket's parameters, at most.
        weights: the dtype of parameters in single precision from now on (None: that).
    """
    groups: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
    for name, p in reversed(list(parameters.items())):
        groups.setdefault((p.dtype, p.device), {})[name] = p
    buckets: list[Bucket] = []
    for (dtype, device), members in groups.items():
        kept = weights if weights is not None and dtype == torch.float32 else dtype
        total, size = sum(p.numel() for p in members.values()), transport.size
        step = unit(nbytes // kept.itemsize, size)
        length = max(nbytes // kept.itemsize // step, 1) * step
        step = unit(total % length, size)
        flat = transport.allocate(total // length * length + -(-(total % length) // step) * step, kept, device)
        for start in range(0, len(flat), length):
            part = flat[start : start + length]
            buckets.append(Bucket(part, _members(members, flat, start, len(part)), transport.rank, size))
    return buckets


def _members(parameters: Parameters, flat: Tensor, start: int, length: int) -> list[Member]:
    """Return what lies in ``length`` elements of ``flat`` from ``start`` on, if parameters lie one behind the other."""
    members, at = [], 0
    for name, p in parameters.items():
        first, last = max(start - at, 0), min(start + length - at, p.numel())
        if last > first:
            home = flat[at : at + p.numel()].as_strided(p.shape, p.stride())
            members.append(Member(name, p, first, last, at + first - start, home))
        at += p.numel()
    return members
