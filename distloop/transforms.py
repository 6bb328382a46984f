"""What happens to gradients between collecting and applying: loss-scale check, clipping.

Each transform takes a stream of ``(i, Collected)`` and gives one. Clipping by value lets it flow, so shard 0 is applied
while shard 5 is still on the wire; a norm is added up shard by shard as they come, and must drain it before the first
goes on; an overflow ends it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distloop import native
from distloop.errors import NonFiniteError
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
        held, norm = _measured(stream, total)  # also of a rank that owns nothing: the others count on its part
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
        scale = self.scale
        # inf and NaN survive the sum of squares. Reading it waits for the device: the price of deciding first.
        held, norm = _measured(stream, total)
        self.adjust(overflowed=not math.isfinite(norm.item()))
        if self.overflowed:
            return
        for i, collected in _last_first(held):
            yield i, collected.divided_by(torch.full((), scale, device=norm.device))


class SkipNonFinite(Transform):
    """Leave an update out on all ranks if the gradient's global norm is NaN or infinite; after ``most`` in a row, fail.

    The norm is computed from a sum over all ranks, so all decide alike. Loss scaling does this by itself.
    """

    def __init__(self, most: int):
        self.most = most
        self.overflowed = False  # in the last step
        self.in_a_row = 0

    def __call__(self, stream: Stream, total: Total) -> Stream:
        held, norm = _measured(stream, total)
        self.overflowed = not math.isfinite(norm.item())
        self.in_a_row = self.in_a_row + 1 if self.overflowed else 0
        if self.in_a_row > self.most:
            raise NonFiniteError(
                f"the gradient's norm was NaN or infinite in {self.in_a_row} steps in a row, and monitor.most_skipped "
                f"is {self.most}; a smaller optimizer.lr, schedule.warmup_steps or gradients.clip_norm may help"
            )
        if not self.overflowed:
            yield from _last_first(held)


def _last_first(held: list[tuple[int, Collected]]) -> list[tuple[int, Collected]]:
    """Return shards in the order in which the next forward pass needs them, where all are there anyway."""
    return sorted(held, key=lambda item: item[0], reverse=True)


def _measured(stream: Stream, total: Total) -> tuple[list[tuple[int, Collected]], Tensor]:
    """Drain ``stream``; return what it gave, and the L2 norm over all shards, pending division included.

    Each shard is measured as it comes, beside those that are still on their way. The parts are added in the shards'
    order, not in that of their arrival, so that a step gives the same bits whoever is late. The norm is a scalar,
    without device synchronisation.
    """
    held, squares = [], {}
    for i, collected in stream:
        held.append((i, collected))
        if collected.gradients:
            squares[i] = _square(collected.gradients)
    dtype = max((g.dtype for _, c in held for g in c.gradients), key=lambda d: d.itemsize, default=torch.float32)
    own = [squares[i].to(squares[min(squares)].device) for i in sorted(squares)]
    norm = total(torch.stack(own).sum() if own else torch.zeros((), dtype=torch.float64)).sqrt()
    norm = norm.to(dtype if dtype.itemsize >= 4 else torch.float32)
    divisor = held[0][1].divisor if held else None
    return held, norm if divisor is None else norm / divisor


def _square(gradients: Sequence[Tensor]) -> Tensor:
    """Return the square of the L2 norm, in double precision: that of a float's norm may be too large for a float."""
    squares = []
    full = [g for g in gradients if g.dtype.itemsize >= 4]
    if full:
        squares.append(torch.nn.utils.get_total_norm(full).double().square())
    half = [g for g in gradients if g.dtype.itemsize < 4]
    library = _library() if all(g.dtype == torch.bfloat16 and g.device.type == "cpu" for g in half) else None
    if library is not None and all(g.is_contiguous() for g in half):
        rows = [library.dl_squares(ctypes.c_void_p(g.data_ptr()), ctypes.c_int64(g.numel())) for g in half]
        squares.append(torch.tensor(math.fsum(rows), dtype=torch.float64))
    elif half:
        squares += [norm.double().square() for norm in torch._foreach_norm(half, 2, dtype=torch.float32)]
    return torch.stack(squares).sum() if len(squares) > 1 else squares[0]


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return what adds squares up in bf16 without widening the row in memory, where it can be had."""
    try:
        library = native.load("norm")
    except native.UnavailableError:
        return None
    library.dl_squares.restype = ctypes.c_double
    return library
