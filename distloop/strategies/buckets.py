"""Which parameters' gradients travel together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distloop.strategies.base import Parameters


@dataclass(frozen=True)
class Capacity:
    """The largest size of a bucket in bytes.

    The first may be smaller, so that sending begins early in backward; the last too, since nothing is left to compute
    while it is on the wire.
    """

    most: int
    first: int | None = None
    last: int | None = None


def fill(parameters: Parameters, capacity: Capacity) -> list[Parameters]:
    """Deal parameters into buckets of one dtype and device (a parameter above the capacity has one of its own).

    In reverse order of definition, because backward makes the last layer's gradients first.
    """
    buckets: list[dict[str, torch.nn.Parameter]] = []
    kind, room = None, 0
    left = sum(map(_bytes, parameters.values()))
    closing = False  # whether what is left goes into the last bucket
    for name, p in reversed(list(parameters.items())):
        size = _bytes(p)
        ends = capacity.last is not None and left <= capacity.last and not closing
        if (p.dtype, p.device) != kind or size > room or ends:
            kind, room = (p.dtype, p.device), capacity.first if not buckets and capacity.first else capacity.most
            closing = closing or ends
            buckets.append({})
        buckets[-1][name] = p
        room -= size
        left -= size
    return list(buckets)


def _bytes(p: torch.Tensor) -> int:
    return p.numel() * p.element_size()
