"""One rank: the gradient of its batch is the gradient of the global batch."""

from __future__ import annotations

from torch import Tensor

from distloop.strategies.base import OneShard, Options, Parameters
from distloop.transports import Transport


class Single(OneShard):
    """Leaves gradients where autograd puts them: no bucket, no copy."""

    def __init__(self, parameters: Parameters, transport: Transport, options: Options):
        super().__init__(parameters, transport)
        if transport.size != 1:
            raise ValueError(f"strategy single is for one rank, not {transport.size}")

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        loss.backward(self.initial_gradient(loss, weight), inputs=self._list)
