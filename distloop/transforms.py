"""What happens to gradients between collecting and applying: loss-scale check, clipping.

Each transform takes a stream of ``(i, Collected)`` and gives one. Clipping by value lets it flow, so shard 0 is applied
while shard 5 is still on the wire; a norm must drain it first; an overflow ends it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distloop.strategies.scale import DynamicScale


@dataclass(slots=True)
class Collected:
    """One shard's gradients, maybe none, and what they still have to be divided by.

    The division is left to the optimizer, whose fused kernels do it in the pass they make anyway.
    """

    gradients: Sequence[Tensor]
    divisor: Tensor | None = None

    def divided_by(self, divisor: Tensor) -> Collected:
        """Return the same gradients with one more division pending."""
        return Collected(self.gradients, divisor if self.divisor is None else self.divisor * divisor)

    def settle(self) -> Sequence[Tensor]:
        """Carry the pending division out, in place or, where that would round to half precision, in fp32; return them.

        ``gradients`` are then the quotients.
        """
        if self.divisor is not None and self.gradients:
            if any(g.dtype.itemsize < 4 for g in self.gradients):
                self.gradients = [g.float() if g.dtype.itemsize < 4 else g for g in self.gradients]
            torch._foreach_div_(list(self.gradients), self.divisor)
        self.divisor = None
        return self.gradients


Stream = Iterator[tuple[int, Collected]]
Total = Callable[[Tensor], Tensor]


class Transform(ABC):
    """One treatment of the gradient stream; ``total`` sums a per-shard amount over all owners of shards."""

    @abstractmethod
    def __call__(self, stream: Stream, total: Total) -> Stream: ...


class ClipByNorm(Transform):
    """Scale the gradient down to a global L2 norm of at most ``max_norm`` (Pascanu et al. 2013, algorithm 1).

    ``g * min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` has it. ``norm`` is the one before
    clipping, exact over shards.
    """

    def __init__(self, max_norm: float):
        self.max_norm = max_norm
        self.norm: Tensor | None = None

    def __call__(self, stream: Stream, total: Total) -> Stream:
        held = list(stream)
        norm = _norm(held, total)  # also of a rank that owns nothing: the others count on its part
        factor = ((norm + 1e-6) / self.max_norm).clamp(min=1.0)
        if held:
            self.norm = norm
        for i, collected in _last_first(held):
            yield i, collected.divided_by(factor)


class ClipByValue(Transform):
    """Clamp every element of the gradient to ``[-max_value, max_value]``."""

    def __init__(self, max_value: float):
        self.max_value = max_value

    def __call__(self, stream: Stream, total: Total) -> Stream:
        for i, collected in stream:
            gradients = list(collected.settle())
            if gradients:
                torch._foreach_clamp_min_(gradients, -self.max_value)
                torch._foreach_clamp_max_(gradients, self.max_value)
            yield i, Collected(gradients)


class LossScale(DynamicScale, Transform):
    """Keep fp16 gradients above underflow (Micikevicius et al. 2018, section 3.2), with a scale that finds itself.

    The loss is multiplied by ``scale`` before backward. If any gradient on any rank overflowed, the step is skipped on
    all ranks and the scale is halved; after ``growth_interval`` good steps in a row it is doubled. torch's GradScaler
    does the same in one process, but gives ranks that own different shards no way to agree.
    """

    def __call__(self, stream: Stream, total: Total) -> Stream:
        held, scale = list(stream), self.scale
        # inf and NaN survive the sum of squares. Reading it waits for the device: the price of deciding first.
        norm = _norm(held, total)
        self.adjust(overflowed=not math.isfinite(norm.item()))
        if self.overflowed:
            return
        for i, collected in _last_first(held):
            yield i, collected.divided_by(torch.full((), scale, device=norm.device))


def _last_first(held: list[tuple[int, Collected]]) -> list[tuple[int, Collected]]:
    """Return shards in the order in which the next forward pass needs them, where all are there anyway."""
    return sorted(held, key=lambda item: item[0], reverse=True)


def _norm(held: Sequence[tuple[int, Collected]], total: Total) -> Tensor:
    """Return the L2 norm over all shards, pending division included, as a scalar without device synchronisation."""
    gradients = [g.float() if g.dtype.itemsize < 4 else g for _, collected in held for g in collected.gradients]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = total(norm.double().square()).sqrt().to(norm.dtype)  # the square of a float's norm may be too large for one
    divisor = held[0][1].divisor if held else None
    return norm if divisor is None else norm / divisor
