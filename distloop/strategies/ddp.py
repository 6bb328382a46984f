"""torch's DistributedDataParallel: gradients are summed bucket by bucket while backward still runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distloop.errors import ConfigError
from distloop.strategies.base import OneShard, Options, Parameters
from distloop.transports import Transport


class _LossIdentity(nn.Module):
    """Hands the loss through. DDP must see a forward pass; it need not be the user's model's.

    So the model's ``state_dict`` stays clean, and a loss may run through several models.
    """

    def __init__(self, parameters: Parameters):
        super().__init__()
        self.held = nn.ParameterList(parameters.values())

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class DDP(OneShard):
    """All-reduce by torch's reducer, which overlaps it with the final backward."""

    def __init__(self, parameters: Parameters, transport: Transport, options: Options):
        super().__init__(parameters, transport)
        self._reducer = DistributedDataParallel(
            _LossIdentity(parameters),
            process_group=transport.process_group(),
            bucket_cap_mb=options.bucket_bytes(parameters) / 2**20,
            gradient_as_bucket_view=True,
            init_sync=False,  # the base class has broadcast the parameters
            find_unused_parameters=options.unused_parameters == "zeros",
        )
        self.needs_every_gradient = options.unused_parameters != "zeros"

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        # DDP divides the sum by the number of ranks; the weight takes that back.
        start = self.initial_gradient(loss, weight * self.transport.size)
        with nullcontext() if final else self._reducer.no_sync():
            self._reducer(loss).backward(start, inputs=self._list)

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        try:
            self._reducer._check_reducer_finalized()  # DDP itself would look a step late
        except RuntimeError as failure:
            if "finish" not in str(failure) and "finalize" not in str(failure):
                raise
            raise ConfigError(
                f"rank {self.transport.rank}: the last micro-batch's loss did not reach every parameter, as ddp needs; "
                "set strategy.unused_parameters to zeros, or freeze those that it never reaches"
            ) from failure
        yield from super().collect()
