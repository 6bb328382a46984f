"""Copies that follow a model: moving averages of its weights, and target networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage(nn.Module):
    """An exponential moving average of a model's parameters, always in evaluation mode; buffers are copied.

    ``average = decay * average + (1 - decay) * model`` at each :meth:`update` (Polyak and Juditsky 1992 in spirit; as a
    target network Lillicrap et al. 2016, algorithm 1, with tau = 1 - decay; with ``decay`` 0 a plain copy). It is
    computed from equal models by equal arithmetic, and so stays equal on all ranks.

    Args:
        model: what to start from; it is copied.
        decay: from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float = 0.0):
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay {decay} must be at least 0 and below 1")
        self.decay = decay
        self.average = copy.deepcopy(model).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MovingAverage:
        """Stay in evaluation mode: dropout and batch statistics are for what is trained."""
        return super().train(False)

    def forward(self, *inputs: Any) -> Any:
        return self.average(*inputs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards ``model``."""
        own: list[Tensor] = list(self.average.parameters())
        # A model in half precision is followed in the precision that its average began in.
        theirs: list[Tensor] = [p.to(mine.dtype) for mine, p in zip(own, model.parameters(), strict=True)]
        if self.decay:
            torch._foreach_lerp_(own, theirs, 1.0 - self.decay)
        else:
            torch._foreach_copy_(own, theirs)
        for mine, other in zip(self.average.buffers(), model.buffers(), strict=True):
            mine.copy_(other)
