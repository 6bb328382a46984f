"""Which parameters' gradients travel together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distloop.strategies.base import Parameters


@dataclass(frozen=True)
class Capacity:
    """The largest size of a bucket in bytes.

    With ``least`` the first is as small as that, so that sending begins early in backward; and none holds more than a
    quarter of what is still to come, down to ``least``, since what is on the wire when backward ends is waited for.
    """

    most: int
    least: int | None = None

    def of_next(self, left: int, *, first: bool) -> int:
        """Return the capacity of a bucket when there are ``left`` bytes of gradients to deal."""
        if self.least is None:
            return self.most
        return self.least if first else max(self.least, min(self.most, left // 4))


def fill(parameters: Parameters, capacity: Capacity) -> list[Parameters]:
    """Deal parameters into buckets of one dtype and device (a parameter above the capacity has one of its own).

    In reverse order of definition, because backward makes the last layer's gradients first.
    """
    buckets: list[dict[str, torch.nn.Parameter]] = []
    kind, room = None, 0
    left = sum(map(_bytes, parameters.values()))
    for name, p in reversed(list(parameters.items())):
        size = _bytes(p)
        if (p.dtype, p.device) != kind or size > room:
            kind, room = (p.dtype, p.device), capacity.of_next(left, first=not buckets)
            buckets.append({})
        buckets[-1][name] = p
        room -= size
        left -= size
    return list(buckets)


def _bytes(p: torch.Tensor) -> int:
    return p.numel() * p.element_size()
