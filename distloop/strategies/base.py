"""The seam: what a strategy is asked to do. Everything on the other side only says when, never how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distloop.errors import ConfigError, MismatchError
from distloop.messages import digest
from distloop.transports import Transport

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``stop`` of a named parameter, and the tensor in which the optimizer updates them.

    ``rounded``, where there is one, is another tensor that the optimizer leaves the new values in, in its dtype: that
    of the model, when ``values`` are a copy in higher precision.
    """

    name: str
    parameter: nn.Parameter
    start: int
    stop: int
    values: Tensor
    rounded: Tensor | None = None


Shard = Sequence[Segment]


@dataclass(frozen=True)
class Options:
    """What the user may tune; a strategy reads what concerns it."""

    bucket_mb: float | None = None  # None: 2 on CPU, 25 on GPU
    unused_parameters: Literal["refuse", "zeros"] = "refuse"
    wire_dtype: Literal["fp32", "bf16"] = "fp32"
    leaves: int = 8  # parts of a global batch whose gradients are added along one tree
    calibration: Literal["cached", "fresh"] = "cached"
    accumulate: Literal["device", "shard"] = "device"
    device_fraction: float = 0.0
    delayed_update: bool = False
    weights: torch.dtype | None = None  # of the model while it trains, with copies in fp32 for the optimizer
    stage: Literal[1, 2, 3] = 2
    offload: Literal["none", "optimizer", "parameters"] = "none"
    cpu_adam: Literal["native", "torch", "deepspeed"] = "native"
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # keys of DeepSpeed's own configuration

    def bucket_bytes(self, parameters: Parameters) -> int:
        """Return the largest size of a bucket in bytes."""
        if self.bucket_mb is not None:
            return max(1, int(self.bucket_mb * 2**20))
        # 25 MB is DDP's own default. On CPU it hides nothing for models of less than 25 MB (docs/decisions/0001).
        return (25 if any(p.is_cuda for p in parameters.values()) else 2) * 2**20


@dataclass(frozen=True)
class Recipe:
    """How gradients become updates, as plain data: for strategies that clip, scale and update by themselves."""

    model: nn.Module
    optimizer: str  # sgd, rmsprop, adam, adamw, or package.module:Class
    constants: Mapping[str, Any]  # by the names that torch.optim gives them
    decays: Mapping[str, float]  # weight decay by parameter name
    clip_norm: float | None = None
    clip_value: float | None = None
    loss_scale: float | None = None  # where it starts (None: gradients need no scale)
    growth_interval: int = 2000


class Strategy(ABC):
    """Collects one learner's gradients over all ranks and publishes its new parameter values.

    One step is: ``backward`` once per micro-batch, the last with ``final=True``; then ``collect``, whose consumer
    updates the values of shard ``i`` and calls ``broadcast(i)``; then ``settle``. The gradients handed out are *sums*
    over micro-batches and ranks of ``weight * d(loss)/d(parameter)``; with weights that add up to 1 over the global
    batch, that is exactly its gradient.
    """

    shards: Sequence[Shard]  # what this rank's optimizer updates
    plan: Sequence[str] = ()  # what it sends in a step, in order; where it is known
    about = ""  # what a user may want to know before the training
    replicated = True  # whether every rank's shards are all of every parameter
    apart = False  # whether shards hold what the model does not: more precision, or an update that it has not had yet
    leaves = 0  # parts of a global batch that are summed in an order of theirs; 0 where ranks decide that
    leaf = 0  # which of them the next backward is of
    on_host = False  # whether shards lie in the host's memory, and are rounded on their way back to the model
    needs_every_gradient = False  # whether each rank's loss must reach every parameter
    sends_every_backward = False  # whether ranks wait for each other in every backward, not in the final one alone
    # What the next few say concerns strategies with an engine of their own, which have no shards to hand out.
    updates_itself = False  # whether it clips, scales and updates in settle(), as its recipe says
    in_step = False  # whether all ranks must run forward and backward equally often, also with nothing to learn from
    lr = 0.0  # set before each update
    overflowed = False  # in the last step, which was skipped
    loss_scale: float | None = None
    gradient_norm: Tensor | None = None  # before clipping, of the last step

    def __init__(self, parameters: Parameters, transport: Transport):
        self.parameters, self.transport = parameters, transport
        self._list = list(parameters.values())
        self._initial: tuple[float, Tensor] | None = None
        for name, parameter in parameters.items():
            if not is_dense(parameter):
                raise ConfigError(
                    f"parameter {name!r} has gaps or overlaps in memory (strides {parameter.stride()}): make it "
                    "of its own memory, as in nn.Parameter(tensor.clone())"
                )
        agree_on_model(parameters, transport)
        for parameter in self._list:
            transport.broadcast(parameter.detach())

    @abstractmethod
    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        """Add ``weight`` times the gradient of ``loss``; ``final``: none follow in this step, so sending may start."""

    @abstractmethod
    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Yield ``(i, gradients)``: the summed gradient of each segment of shard ``i``, as they arrive."""

    def total(self, amount: Tensor) -> Tensor:
        """Return the sum over all owners of a per-shard amount (the amount itself where shards are replicated)."""
        return amount

    def broadcast(self, i: int) -> None:  # noqa: B027 (replicas compute the same update themselves)
        """Publish the new values of shard ``i``, without waiting."""

    @abstractmethod
    def settle(self) -> None:
        """Return when gradients are cleared, and this rank's model has every new value or will when a module is called.

        Who looks at it in other ways does so in :meth:`whole`.
        """

    def ahead(self, update: Callable[[], None]) -> bool:
        """Run ``update``, which collects and applies this step, beside its final backward, which is about to begin.

        Return False, without running it, where the caller has to do that.
        """
        return False

    def watch(self, model: nn.Module) -> None:  # noqa: B027 (nobody waits for modules, but those who publish ahead)
        """Look at the modules in which the parameters are used."""

    def look(self) -> AbstractContextManager[object]:
        """Return the context of guess, targets and loss in the first steps."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Return a context in which the model is whole on every rank, to be run, read or written; all ranks enter."""
        return nullcontext()

    def still(self) -> AbstractContextManager[None]:
        """Return a context in which nothing is under way and all is as it is between two steps; all ranks enter.

        The model is whole, and as the next forward pass will see it.
        """
        return self.whole()

    def exported(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield each parameter's name with the optimizer's values and state, whole; all ranks take all of them.

        Nothing, unless the strategy :attr:`updates_itself`; else the learner's optimizer knows.
        """
        yield from ()

    def counters(self) -> dict[str, float]:
        """Return numbers that go with :meth:`exported` and belong to no parameter."""
        return {}

    def imported(  # noqa: B027 (who exports nothing imports nothing)
        self, state: Iterable[tuple[str, Mapping[str, Tensor]]], counters: Mapping[str, float]
    ) -> None:
        """Go on from what was exported, by any strategy on any number of ranks; all ranks call it alike."""

    def resume(self) -> None:  # noqa: B027 (most strategies have nothing more to do)
        """Take note that parameters, shards and optimizer were set to a state between two steps of an earlier run."""

    def finish(self) -> None:
        """Leave the model whole, and as any other, on every rank: no step follows. All ranks call it."""
        self.close()

    def close(self) -> None:  # noqa: B027 (nothing to close is the common case)
        """Let go of threads; the strategy collects no more."""

    def null_loss(self) -> Tensor:
        """Return a loss of zero that touches every parameter: the turn of a rank that has no samples."""
        return torch.stack([p.reshape(-1)[:0].sum() for p in self._list]).sum()

    def initial_gradient(self, loss: Tensor, weight: float) -> Tensor:
        """Return ``weight`` as the tensor from which backward starts, which is cheaper than multiplying the loss."""
        if self._initial is None or self._initial[0] != weight:
            self._initial = weight, torch.full_like(loss, weight, requires_grad=False)
        return self._initial[1]


def whole(parameters: Parameters) -> Shard:
    """Return the shard that holds all of every parameter and is updated in place."""
    return [Segment(name, p, 0, p.numel(), p.detach()) for name, p in parameters.items()]


class OneShard(Strategy):
    """Every rank updates all parameters at once, and gradients lie wherever autograd or torch's reducer puts them."""

    def __init__(self, parameters: Parameters, transport: Transport):
        super().__init__(parameters, transport)
        self.shards = [whole(parameters)]

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        yield 0, [torch.zeros_like(p) if p.grad is None else p.grad for p in self._list]

    def settle(self) -> None:
        for parameter in self._list:
            parameter.grad = None


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill a stretch of memory, in whatever order of dimensions.

    Element-wise kernels walk parameter, gradient and state side by side in memory, so they must all lie alike.
    """
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def agree_on_model(parameters: Mapping[str, Tensor], transport: Transport) -> None:
    """Check that all ranks have the same parameters (or buffers) in the same order.

    Raises:
        MismatchError: they have not; names the first difference that can be told apart by position.
    """
    if transport.size == 1:
        return
    own = [f"{name} {tuple(p.shape)} {p.stride()} {p.dtype}" for name, p in parameters.items()]
    every = transport.all_gather(torch.tensor([len(own), digest("\n".join(own))], dtype=torch.int64)).wait()
    if (every == every[0]).all():
        return
    counts = every[:, 0].tolist()
    if len(set(counts)) > 1:
        raise MismatchError(f"ranks have different models: the numbers of parameters or buffers by rank are {counts}")
    digests = torch.tensor([digest(text) for text in own], dtype=torch.int64)
    rows = transport.all_gather(digests).wait()
    for rank in range(transport.size):
        differing = (rows[rank] != rows[0]).nonzero()
        if len(differing):
            i = int(differing[0])
            raise MismatchError(
                f"rank {rank}'s model differs from rank 0's at parameter {i}: on rank {transport.rank} it is {own[i]}"
            )
