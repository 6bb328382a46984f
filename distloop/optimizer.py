"""A torch optimizer that is handed one shard at a time.

The optimizers of the textbooks call torch's own kernels, fused where torch has them: the arithmetic of ``torch.optim``
without most of its Python, and without the import of the compiler stack that building any ``torch.optim.Optimizer``
brings (0.8 CPU seconds of a process's start; docs/decisions/0003). Any other optimizer is used as it is, by class.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

from distloop.strategies import Shard
from distloop.transforms import Collected


@dataclass
class Group:
    """The segments of a shard that share weight decay, dtype and device, with the optimizer's state for them."""

    indices: list[int]
    values: list[Tensor]
    weight_decay: float
    state: dict[str, list[Tensor]] = field(default_factory=dict)

    def buffers(self, name: str) -> list[Tensor]:
        """Return the named state, zero at first, one tensor per segment."""
        if name not in self.state:
            self.state[name] = [torch.zeros_like(v, memory_format=torch.preserve_format) for v in self.values]
        return self.state[name]

    def counters(self) -> list[Tensor]:
        """Return the number of updates so far, one scalar per segment, where torch's kernels want to find it."""
        if "step" not in self.state:
            self.state["step"] = [torch.zeros((), device=v.device) for v in self.values]
        return self.state["step"]


class Rule(ABC):
    """How gradients change values: one method of optimisation with its constants."""

    folds = False  # whether its kernel divides the gradients in the pass that it makes anyway

    @abstractmethod
    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        """Update ``group.values`` in place by ``gradients / divisor``; ``divisor`` is None unless the rule folds."""


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013)."""

    momentum: float = 0.0
    nesterov: bool = False
    folds = True

    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        torch._fused_sgd_(
            group.values,
            gradients,
            group.buffers("momentum_buffer") if self.momentum else [],  # zero is where an undamped momentum starts
            weight_decay=group.weight_decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            is_first_step=False,
            grad_scale=divisor,
        )


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (Kingma and Ba 2015, algorithm 1); ``decoupled`` makes it AdamW (Loshchilov and Hutter 2019)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = False
    folds = True

    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        counters = group.counters()
        torch._foreach_add_(counters, 1.0)
        kernel = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        kernel(
            group.values,
            gradients,
            group.buffers("exp_avg"),
            group.buffers("exp_avg_sq"),
            [],
            counters,
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=group.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )


@dataclass(frozen=True)
class RMSProp(Rule):
    """RMSProp (Hinton 2012, lecture 6e), with momentum if asked for. torch has no fused kernel for it."""

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0

    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        rmsprop(
            group.values,
            gradients,
            group.buffers("square_avg"),
            [],
            group.buffers("momentum_buffer") if self.momentum else [],
            group.counters(),
            foreach=True,
            lr=lr,
            alpha=self.alpha,
            eps=self.eps,
            weight_decay=group.weight_decay,
            momentum=self.momentum,
            centered=False,
        )


class Torch(Rule):
    """Any ``torch.optim.Optimizer`` class, one instance per group of segments."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any]):
        self._make, self._options = make, dict(options)
        self._instances: dict[int, torch.optim.Optimizer] = {}

    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        optimizer = self._instances.get(id(group)) or self._build(group, lr)
        optimizer.param_groups[0]["lr"] = lr
        for values, gradient in zip(group.values, gradients, strict=True):
            values.grad = gradient
        optimizer.step()
        for values in group.values:
            values.grad = None

    def _build(self, group: Group, lr: float) -> torch.optim.Optimizer:
        options = dict(self._options)
        if "weight_decay" in inspect.signature(self._make).parameters:
            options["weight_decay"] = group.weight_decay  # the class's own default would decay biases too
        self._instances[id(group)] = optimizer = self._make(group.values, lr=lr, **options)
        return optimizer


class OptimizerShard:
    """A shard as the optimizer sees it: its segments in groups that one kernel call can update."""

    def __init__(self, shard: Shard, decays: Mapping[str, float]):
        groups: dict[tuple[float, torch.dtype, torch.device], Group] = {}
        for index, segment in enumerate(shard):
            values, decay = segment.values, decays[segment.name]
            group = groups.setdefault((decay, values.dtype, values.device), Group([], [], decay))
            group.indices.append(index)
            group.values.append(values)
        self.groups = list(groups.values())


class Optimizer:
    """Applies a rule shard by shard.

    Args:
        rule: the method.
        shards: the strategy's, in its order.
        decays: weight decay by parameter name.
    """

    def __init__(self, rule: Rule, shards: Sequence[Shard], decays: Mapping[str, float]):
        self.rule = rule
        self.shards = [OptimizerShard(shard, decays) for shard in shards]
        self.lr = 0.0  # set before each step by the schedule

    def apply(self, collected: Collected, shard: OptimizerShard) -> None:
        """Update the values of ``shard`` by its ``collected`` gradients."""
        divisor = collected.divisor
        if divisor is not None and not (self.rule.folds and _single_precision(collected.gradients)):
            collected.settle()  # the fused kernels take a divisor in single precision only
            divisor = None
        gradients = collected.gradients
        for group in shard.groups:
            self.rule.update(group, [gradients[i] for i in group.indices], self.lr, divisor)


def _single_precision(gradients: Sequence[Tensor]) -> bool:
    return all(g.dtype == torch.float32 for g in gradients)
