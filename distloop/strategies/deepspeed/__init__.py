"""DeepSpeed's engine as a guest (Rajbhandari et al. 2020, ZeRO): it sums, clips, scales and updates by itself.

What distloop keeps in hand is what makes the gradient that of the global batch: the weight of each micro-batch, and
when the last of a step comes. What DeepSpeed is told is in ``settings``, how it gets into this process in ``guest``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from distloop.errors import ConfigError, NonFiniteError
from distloop.messages import agree_on
from distloop.strategies.base import Options, Parameters, Recipe, Shard, Strategy
from distloop.strategies.deepspeed import guest, optimizers, settings
from distloop.strategies.deepspeed.partitioned import Partitioned
from distloop.strategies.deepspeed.state import State
from distloop.strategies.scale import DynamicScale
from distloop.transports import Transport


class _LossIdentity(nn.Module):
    """Hands the loss through: DeepSpeed must see a forward pass, and the loss may run through several models.

    It holds the model, whose modules DeepSpeed looks for.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class DeepSpeed(Strategy):
    """ZeRO stages 1 to 3: each rank updates an even cut of all parameters.

    Until the last micro-batch of a step, gradients stay where autograd puts them; then all of them are reduced in one
    order, that of the parameters, so that it matters neither how many micro-batches a rank has nor in which order its
    backward reached the parameters. Stage 3 reduces in every backward: its ranks run in step anyway.
    """

    updates_itself = True

    def __init__(self, parameters: Parameters, transport: Transport, options: Options, recipe: Recipe):
        _refuse(parameters, options)
        device = next(iter(parameters.values())).device
        self._module = guest.load(device, options.weights)
        super().__init__(parameters, transport)
        self.shards: Sequence[Shard] = []
        self._recipe = recipe
        self.in_step = self.needs_every_gradient = options.stage == 3
        bucket = max(2, options.bucket_bytes(parameters) // 8 * 2)
        config = settings.configuration(options, recipe, device, bucket)
        agree_on(transport, {"version of DeepSpeed": self._module.__version__}, "how gradients are collected")
        optimizer = optimizers.make(parameters, recipe, options, device)
        guest.company.join(self._module, transport, device)
        first = {} if options.weights is None else {n: p.detach().clone() for n, p in parameters.items()}
        with guest.silence():
            self._engine = self._module.initialize(
                model=_LossIdentity(recipe.model), optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        self._zero = self._engine.optimizer
        self._state = State(self._module, self._engine, parameters, recipe)
        self._state.begin(first)
        self._scale = None if recipe.loss_scale is None else DynamicScale(recipe.loss_scale, recipe.growth_interval)
        self._rescale()
        self._together = hasattr(self._zero, "_coalesce_grad_reduction") and not self.in_step
        self._parts = Partitioned(self._module, self._engine, recipe.model) if options.stage == 3 else None
        self._reduction: AbstractContextManager[None] | None = None
        if self._together and options.weights is not None:
            self._zero.use_grad_accum_attribute = True  # add micro-batches in fp32, as stage 1 does by itself
        self._updates = 0
        self._fills = options.unused_parameters == "zeros"
        self.about = _about(options)

    def backward(self, loss: Tensor, weight: float, *, final: bool) -> None:
        if self._together:
            if self._reduction is None:
                self._reduction = self._engine.coalesce_grad_reduction()
                self._reduction.__enter__()
        else:
            self._engine.set_gradient_accumulation_boundary(final)
        if self._fills and not self._together:
            loss = loss + self.null_loss()
        # DeepSpeed divides the sum by the number of ranks; the weight takes that back.
        start = self.initial_gradient(loss, weight * self.transport.size)
        self._engine.scale(self._engine(loss)).backward(start, inputs=self._list)
        if final and self._reduction is not None:
            self._complete()
            reduction, self._reduction = self._reduction, None
            reduction.__exit__(None, None, None)

    def collect(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        yield from ()

    def settle(self) -> None:
        for group in self._zero.param_groups:
            group["lr"] = self.lr
        self._engine.step()
        self.overflowed = bool(self._zero.overflow)
        norm = self._engine.get_global_grad_norm()
        if self._scale is not None:
            self._scale.adjust(overflowed=self.overflowed)
            self._rescale()
        elif self.overflowed:
            raise NonFiniteError("gradients became infinite or NaN; a smaller optimizer.lr may help", everywhere=True)
        self._updates += not self.overflowed
        if self._recipe.clip_norm is not None and not self.overflowed:
            self.gradient_norm = torch.as_tensor(math.nan if norm is None else norm)

    def exported(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each parameter's name, values in fp32 and optimizer state, whole on every rank, one at a time.

        All ranks must take all of them, between two steps.
        """
        return self._state.read(self._updates)

    def counters(self) -> dict[str, float]:
        """Return what goes with :meth:`exported` and belongs to no parameter."""
        own = {"updates": float(self._updates)}
        if self._scale is not None:
            own |= self._scale.state_dict()
        return own

    def imported(self, state: Iterable[tuple[str, Mapping[str, Tensor]]], counters: Mapping[str, float]) -> None:
        """Go on from what a strategy of any stage, on any number of ranks, has exported; all ranks call it alike."""
        self._updates = int(counters["updates"])
        self._state.write(state, self._updates)
        if self._scale is not None and "loss_scale" in counters:
            self._scale.load_state_dict(counters)
            self._rescale()

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext() if self._parts is None else self._parts.whole()

    def finish(self) -> None:
        if self._parts is not None:
            self._parts.restore()
            self._parts = None
        self.close()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine = self._zero = None
            guest.company.leave(self._module)

    def _rescale(self) -> None:
        if self._scale is not None:
            self.loss_scale = self._scale.scale
            self._zero.override_loss_scale(self._scale.scale)

    def _complete(self) -> None:
        """Give parameters that no loss of this rank has reached a gradient of zero; DeepSpeed would leave them out."""
        for parameter in self._list:
            if self._zero.get_gradient_for_reduction(parameter) is None:
                place = "grad_accum" if self._zero.use_grad_accum_attribute else "grad"
                dtype = torch.float32 if place == "grad_accum" else parameter.dtype
                setattr(parameter, place, torch.zeros_like(parameter, dtype=dtype, requires_grad=False))


def _refuse(parameters: Parameters, options: Options) -> None:
    """Refuse parameters that DeepSpeed would compute with otherwise than in the precision they have."""
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"parameter {name!r} is in {dtype}: DeepSpeed's optimizers compute in fp32; make the model in fp32 "
                "(precision.weights half lets it train in half precision)"
            )


def _about(options: Options) -> str:
    offloaded = {
        "none": "",
        "optimizer": ", optimizer on the CPU",
        "parameters": ", optimizer and parameters on the CPU",
    }
    return f"ZeRO stage {options.stage}{offloaded[options.offload]}"
