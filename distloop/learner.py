"""A learner: one objective, the strategy that collects its gradients, and the optimizer that applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distloop.ahead import Ahead
from distloop.averages import MovingAverage
from distloop.data import MicroBatch
from distloop.errors import ConfigError
from distloop.first_step import FirstStepCheck
from distloop.leaf_state import LeafState
from distloop.objective import Objective, held_modules
from distloop.optimizer import Optimizer, OptimizerShard
from distloop.schedules import Schedule
from distloop.strategies import Strategy
from distloop.transforms import ClipByNorm, Collected, LossScale, SkipNonFinite, Stream, Transform
from distloop.transports import Transport

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NOTHING_SPECIAL = nullcontext()
NOTHING = object()  # the guess of a rank that has nothing to learn from


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which forward passes run at ``precision``: fp32, bf16 or fp16."""
    dtype = _AUTOCAST.get(precision)
    return _NOTHING_SPECIAL if dtype is None else torch.autocast(device.type, dtype)


class Learner:
    """One objective with everything that turns its loss into updates; the verbs are those of the loop."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        strategy: Strategy,
        optimizer: Optimizer,
        *,
        lr: float,
        schedule: Schedule,
        transforms: Sequence[Transform] = (),
        precision: str = "fp32",
        unused: str = "refuse",
    ):
        self.name, self.objective, self.strategy, self.optimizer = name, objective, strategy, optimizer
        self.base_lr, self.schedule, self.transforms = lr, schedule, list(transforms)
        self.parameters: Sequence[OptimizerShard] = optimizer.shards
        self.step = 0  # updates applied
        self.skipped = 0  # updates that an overflow, a NaN or an infinity prevented
        self.losses: list[tuple[float, Tensor]] = []  # of this turn: this rank's (share of the global batch, loss)
        self._loss_scale = next((t for t in self.transforms if isinstance(t, LossScale)), None)
        self._skips = [t for t in self.transforms if isinstance(t, LossScale | SkipNonFinite)]
        self._clip = next((t for t in self.transforms if isinstance(t, ClipByNorm)), None)
        self._last: Any = NOTHING  # batch that was run, if it may be needed again
        self._device = next(iter(strategy.parameters.values())).device
        self._precision = precision
        self._check: FirstStepCheck | None = FirstStepCheck(name, strategy, refuse_unused=unused == "refuse")
        self._gradients = Gradients(self.collected)
        self._ahead: Ahead | None = None  # this step's update, if the strategy runs it by itself
        strategy.watch(objective.model)
        self._updated: Callable[[], None] | None = getattr(objective, "updated", None)
        self.turn = 0  # turns taken, whether or not an update came of them
        self.leaf_state: LeafState | None = None  # where turns must not depend on the number of ranks

    @property
    def lr(self) -> float:
        """The learning rate of the next update."""
        return self.base_lr * self.schedule(self.step)

    @property
    def may_skip(self) -> bool:
        """Whether a loss that is not finite is borne: its update is left out."""
        return any(isinstance(transform, SkipNonFinite) for transform in self.transforms)

    @property
    def loss_scale(self) -> float | None:
        """The factor on the loss (fp16 only)."""
        return self._loss_scale.scale if self._loss_scale else self.strategy.loss_scale

    @property
    def gradient_norm(self) -> Tensor | None:
        """The global norm before clipping, of the last step (only if clipping by norm is on)."""
        if self._ahead is not None:
            self._ahead.await_decision()
        return self._clip.norm if self._clip else self.strategy.gradient_norm

    def guess(self, micro_batch: MicroBatch) -> Any:
        if self.leaf_state is not None:
            self.leaf_state.begin(self.turn, self.strategy.leaf)
        batch = self._batch(micro_batch)
        if batch is NOTHING:
            return NOTHING
        with self._looking(), self._autocast():
            return self.objective.guess(batch)

    def targets(self, micro_batch: MicroBatch) -> Any:
        batch = self._batch(micro_batch)
        if batch is NOTHING:
            return NOTHING
        with self._looking():
            return self.objective.targets(batch)

    def loss(self, guesses: Any, targets: Any) -> Tensor:
        if guesses is NOTHING:  # the other ranks count on this one's turn all the same
            return self.strategy.null_loss()
        with self._looking(), self._autocast():
            loss = self.objective.loss(guesses, targets)
        # The weight enters backward in the loss's own dtype, and half precision would round it.
        return loss.float() if isinstance(loss, Tensor) and loss.dtype.itemsize < 4 else loss

    def gradients(self, loss: Tensor, micro_batch: MicroBatch) -> Gradients:
        """Add the gradient of ``loss``, weighted by the micro-batch's share of the global batch."""
        share = micro_batch.share(self.name)
        if self._check is not None:
            self._check(loss, idle=share == 0.0, final=micro_batch.final)
            if self._check.steps == FirstStepCheck.STEPS:
                self._check = None
        self.losses.append((share, loss.detach()))
        if micro_batch.final:
            ahead = Ahead(partial(self._transformed, self.lr), self._apply)
            self._ahead = ahead if self.strategy.ahead(ahead) else None
        weight = share if self._loss_scale is None else share * self._loss_scale.scale
        self.strategy.backward(loss, weight, final=micro_batch.final)
        if self.leaf_state is not None:
            self.leaf_state.end(share)
        return self._gradients

    def broadcast(self, i: int) -> None:
        self.strategy.broadcast(i)

    def collected(self) -> Iterator[tuple[int, Collected]]:
        """Yield each shard's gradients, transformed, unless the strategy has taken that over; then count the step."""
        if self._ahead is None:
            yield from self._transformed(self.lr)
        self.strategy.settle()
        if self.leaf_state is not None:
            self.leaf_state.settle(self.turn)
        self.turn += 1
        if self._ahead is not None and self._skips:
            self._ahead.await_decision()
        if self.strategy.overflowed or any(transform.overflowed for transform in self._skips):
            self.skipped += 1
            return
        self.step += 1
        if self._updated is not None:
            with self.strategy.whole():
                self._updated()

    def _transformed(self, lr: float) -> Stream:
        self.optimizer.lr = self.strategy.lr = lr
        stream: Stream = ((i, Collected(gradients)) for i, gradients in self.strategy.collect())
        for transform in self.transforms:
            stream = transform(stream, self.strategy.total)
        return stream

    def _apply(self, i: int, collected: Collected) -> None:
        self.optimizer.apply(collected, self.parameters[i])
        self.broadcast(i)

    def take_losses(self) -> list[tuple[float, Tensor]]:
        """Return this turn's (share, loss) pairs and forget them."""
        taken, self.losses = self.losses, []
        return taken

    def average_statistics(self, transport: Transport) -> None:
        """Make buffers equal on all ranks: the mean of BatchNorm's running statistics, rank 0's of all others.

        Those of the model and of its moving averages; between evaluations BatchNorm's are each rank's own.
        """
        if self.leaf_state is not None:
            return  # they are equal after each turn
        models = list(self._with_buffers().values())
        statistics = {
            id(buffer): buffer
            for model in models
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
            if buffer.is_floating_point()
        }
        if statistics and transport.size > 1:
            flat = torch.cat([buffer.detach().double().cpu().view(-1) for buffer in statistics.values()])
            mean = transport.all_gather(flat).wait().mean(0)
            sizes = [buffer.numel() for buffer in statistics.values()]
            for buffer, part in zip(statistics.values(), mean.split(sizes), strict=True):
                buffer.copy_(part.view(buffer.shape))
        for buffer in (buffer for model in models for buffer in model.buffers()):
            if id(buffer) not in statistics:
                transport.broadcast(buffer)

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers that :meth:`average_statistics` makes equal, by name."""
        return {f"{name}/{key}": b for name, model in self._with_buffers().items() for key, b in model.named_buffers()}

    def state_dict(self) -> dict[str, Any]:
        """Return, in JSON's types, what decides how it goes on, beside model and optimizer."""
        scale = self.strategy.counters() if self._loss_scale is None else self._loss_scale.state_dict()
        return {
            "step": self.step,
            "skipped": self.skipped,
            "turn": self.turn,
            "loss_scale": {key: value for key, value in scale.items() if key != "updates"},
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.step, self.skipped, self.turn = state["step"], state["skipped"], state["turn"]
        self.schedule.load_state_dict(state["schedule"])
        if self._loss_scale is not None and state["loss_scale"]:
            self._loss_scale.load_state_dict(state["loss_scale"])

    def _with_buffers(self) -> dict[str, nn.Module]:
        averages = {n: m for n, m in held_modules(self.objective).items() if isinstance(m, MovingAverage)}
        return {"model": self.objective.model, **averages}

    def _batch(self, micro_batch: MicroBatch) -> Any:
        """Return what to run, or NOTHING: there is no sample, or none of any weight (a mean over no tokens).

        Where ranks must run in step, one with nothing to learn from runs what it ran last, which then weighs nothing.
        """
        idle = micro_batch.share(self.name) == 0.0
        if not self.strategy.in_step:
            return NOTHING if idle else micro_batch.batch
        if not idle:
            self._last = micro_batch.batch
        elif self._last is NOTHING:
            raise ConfigError(
                f"rank {self.strategy.transport.rank} has not had a sample yet, and under this strategy all ranks run "
                "the model in step: start no more ranks than data.global_batch_size, with samples enough for all"
            )
        return self._last

    def _looking(self) -> AbstractContextManager[object]:
        """Return the context in which the strategy sees how parameters are used; in the first steps."""
        return _NOTHING_SPECIAL if self._check is None else self.strategy.look()

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self._device, self._precision)


class Gradients:
    """The summed gradients of a learner's turn, still to be collected over ranks."""

    def __init__(self, collect: Callable[[], Iterator[tuple[int, Collected]]]):
        self.collect = collect
