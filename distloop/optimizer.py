"""A torch optimizer that is handed one shard at a time.

The optimizers of the textbooks call torch's own kernels, fused where torch has them: the arithmetic of ``torch.optim``
without most of its Python, and without the import of the compiler stack that building any ``torch.optim.Optimizer``
brings (0.8 CPU seconds of a process's start; docs/decisions/0003). Any other optimizer is used as it is, by class.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop

from distloop import host_memory
from distloop.strategies import Segment, Shard
from distloop.transforms import Collected

GROUP = "of all "  # begins the names of what an optimizer remembers of all its parameters at once


@dataclass(eq=False)
class Group:
    """The segments of a shard that share weight decay, dtypes and device, with the optimizer's state for them.

    ``rounded`` has a tensor per segment that the new values are left in as well, or none. What is restored into the
    state is to be copied into its tensors: a rule may have kept their addresses.
    """

    indices: list[int]
    values: list[Tensor]
    weight_decay: float
    state: dict[str, list[Tensor]] = field(default_factory=dict)
    rounded: list[Tensor] = field(default_factory=list)
    _steps: Tensor | None = None

    def buffers(self, name: str) -> list[Tensor]:
        """Return the named state, zero at first, one tensor per segment."""
        if name not in self.state:
            self.state[name] = host_memory.zeros_like(self.values)
        return self.state[name]

    def counters(self) -> list[Tensor]:
        """Return the number of updates so far, one scalar per segment, where torch's kernels want to find it."""
        if "step" not in self.state:
            self._steps = torch.zeros(len(self.values), device=self.values[0].device)
            self.state["step"] = list(self._steps.unbind())
        return self.state["step"]

    def count(self) -> list[Tensor]:
        """Count one more update, of all segments at once, and return the counters."""
        counters = self.counters()
        if self._steps is None:
            torch._foreach_add_(counters, 1.0)
        else:
            self._steps.add_(1.0)
        return counters


class Rule(ABC):
    """How gradients change values: one method of optimisation with its constants.

    What a rule does not do in its kernel is done before and after it.
    """

    folds = False  # whether its kernel divides the gradients in the pass that it makes anyway
    widens = False  # whether it takes gradients in half precision for values in single precision
    rounds = False  # whether it fills ``group.rounded``

    @abstractmethod
    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        """Update ``group.values`` in place by ``gradients / divisor``; ``divisor`` is None unless the rule folds."""

    def describe(self) -> str:
        """Return in words which kernel it uses, if there is a choice."""
        return ""

    def for_group(self, group: Group) -> Rule:
        """Return the rule that updates ``group``: this one, or another of the same arithmetic where this cannot."""
        return self

    def state_of(self, group: Group) -> list[dict[str, Any]]:
        """Return by segment what the rule remembers of it: tensors and numbers by name."""
        return [{name: tensors[i] for name, tensors in group.state.items()} for i in range(len(group.values))]

    def restore(self, group: Group, state: Sequence[Mapping[str, Any]]) -> None:
        """Remember what :meth:`state_of` returned, by segment; before any update."""
        for i, remembered in enumerate(state):
            for name, value in remembered.items():
                own = group.counters() if name == "step" else group.buffers(name)
                own[i].copy_(value)


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
        kernel = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        kernel(
            group.values,
            gradients,
            group.buffers("exp_avg"),
            group.buffers("exp_avg_sq"),
            [],
            group.count(),
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
        self._fresh: dict[int, dict[str, Any]] = {}  # the settings of each as they were at first

    def update(self, group: Group, gradients: list[Tensor], lr: float, divisor: Tensor | None) -> None:
        optimizer = self._instances.get(id(group)) or self._build(group, lr)
        optimizer.param_groups[0]["lr"] = lr
        for values, gradient in zip(group.values, gradients, strict=True):
            values.grad = gradient
        optimizer.step()
        for values in group.values:
            values.grad = None

    def state_of(self, group: Group) -> list[dict[str, Any]]:
        instance = self._instances.get(id(group))
        known: Mapping[Tensor, dict[str, Any]] = {} if instance is None else instance.state
        found = [known.get(values, {}) for values in group.values]
        changed: dict[str, Any] = {}
        if instance is not None:
            fresh, now = self._fresh[id(group)], instance.param_groups[0]
            changed = {GROUP + k: v for k, v in now.items() if k not in ("params", "lr") and v is not fresh.get(k)}
        return [changed | {name: value for name, value in own.items() if value is not None} for own in found]

    def restore(self, group: Group, state: Sequence[Mapping[str, Any]]) -> None:
        instance = self._build(group, 0.0)  # each update sets the learning rate
        for values, remembered in zip(group.values, state, strict=True):
            own = {name: _like(values, v) for name, v in remembered.items() if not name.startswith(GROUP)}
            if own:
                instance.state[values] = own
            instance.param_groups[0] |= {k.removeprefix(GROUP): v for k, v in remembered.items() if k.startswith(GROUP)}

    def _build(self, group: Group, lr: float) -> torch.optim.Optimizer:
        options = dict(self._options)
        if "weight_decay" in inspect.signature(self._make).parameters:
            options["weight_decay"] = group.weight_decay  # the class's own default would decay biases too
        self._instances[id(group)] = optimizer = self._make(group.values, lr=lr, **options)
        self._fresh[id(group)] = dict(optimizer.param_groups[0])
        return optimizer


class OptimizerShard:
    """A shard as the optimizer sees it: its segments in groups that one kernel call can update."""

    def __init__(self, shard: Shard, decays: Mapping[str, float]):
        groups: dict[tuple[float, torch.dtype, torch.device, torch.dtype | None], Group] = {}
        for index, segment in enumerate(shard):
            values, rounded, decay = segment.values, segment.rounded, decays[segment.name]
            key = (decay, values.dtype, values.device, None if rounded is None else rounded.dtype)
            group = groups.setdefault(key, Group([], [], decay))
            group.indices.append(index)
            group.values.append(values)
            if rounded is not None:
                group.rounded.append(rounded)
        self.groups, self.segments = list(groups.values()), shard


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
        self._rules = {group: rule.for_group(group) for shard in self.shards for group in shard.groups}

    def apply(self, collected: Collected, shard: OptimizerShard) -> None:
        """Update the values of ``shard`` by its ``collected`` gradients, and what the values are rounded to."""
        if collected.divisor is not None and not all(self._folds(group) for group in shard.groups):
            collected.settle()
        gradients = collected.gradients
        for group in shard.groups:
            rule, dtype, own = self._rules[group], group.values[0].dtype, [gradients[i] for i in group.indices]
            if not (rule.widens and dtype == torch.float32):
                own = [g if g.dtype == dtype else g.to(dtype) for g in own]
            rule.update(group, own, self.lr, collected.divisor)
            if group.rounded and not rule.rounds:
                torch._foreach_copy_(group.rounded, group.values)

    def state(self) -> Iterator[tuple[Segment, dict[str, Any]]]:
        """Yield each segment with what is remembered of it, tensors and numbers by name; nothing before an update."""
        for shard in self.shards:
            for group in shard.groups:
                remembered = self._rules[group].state_of(group)
                yield from zip((shard.segments[i] for i in group.indices), remembered, strict=True)

    def restore(self, remembered: Callable[[Segment], Mapping[str, Any]]) -> None:
        """Go on from what was remembered of each segment."""
        for shard in self.shards:
            for group in shard.groups:
                own = [remembered(shard.segments[i]) for i in group.indices]
                if any(own):
                    self._rules[group].restore(group, own)

    def _folds(self, group: Group) -> bool:
        """Return whether the rule divides: the kernels take a divisor in single precision, which is enough for that."""
        return self._rules[group].folds and group.values[0].dtype == torch.float32


def _like(values: Tensor, remembered: Any) -> Any:
    """Return a remembered tensor of its own, laid out in memory as ``values`` where it has their shape."""
    if not isinstance(remembered, Tensor):
        return remembered
    if remembered.shape == values.shape:
        return torch.empty_like(values, dtype=remembered.dtype).copy_(remembered)
    return remembered.clone()
