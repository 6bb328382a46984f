"""One rank: the gradient of its batch is the gradient of the global batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distloop.strategies.base import Options, Parameters, Strategy, whole
from distloop.transports import Transport


class Single(Strategy):
    """Leaves gradients where autograd puts them: no bucket, no copy."""

    def __init__(self, parameters: Parameters, transport: Transport, options: Options):
        super().__init__(parameters, transport)
        if transport.size != 1:
            raise ValueError(f"strategy single is for one rank, not {transport.size}")
        self.shards = [whole(parameters)]

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        loss.backward(self.initial_gradient(loss, weight), inputs=self._list)

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        yield 0, [torch.zeros_like(p) if p.grad is None else p.grad for p in self._list]

    def settle(self) -> None:
        for parameter in self._list:
            parameter.grad = None
