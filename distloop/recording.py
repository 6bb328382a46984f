"""What of a learner is in a checkpoint, by parameter name, and how it comes back: on any ranks, with any strategy.

Each rank records what it owns; where all ranks hold the same, parameters are dealt to them by size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distloop.averages import MovingAverage
from distloop.checkpoints import Checkpoint, Stored
from distloop.errors import ConfigError
from distloop.learner import Learner
from distloop.objective import held_modules
from distloop.strategies import Segment

MASTER = "master"  # values that the optimizer updates, where they say more than the model's


@dataclass
class Recorded:
    """A learner's part of a checkpoint."""

    tensors: list[Stored]  # those that this rank writes
    numbers: dict[str, Any] = field(default_factory=dict)  # by parameter and name, what is no tensor


def record(learner: Learner, rank: int, ranks: int) -> Recorded:
    """Return what this rank records of the optimizer; every rank calls it, within ``strategy.still()``.

    Raises:
        ConfigError: the optimizer remembers something that is neither a tensor nor a number.
    """
    strategy, found = learner.strategy, Recorded([])
    for segment, state in _owned(learner, rank, ranks):
        prefix = f"optimizer/{learner.name}/{segment.name}"
        if strategy.apart:
            found.tensors.append(_stored(f"{prefix}/{MASTER}", segment, segment.values))
        for key, value in state.items():
            if not isinstance(value, Tensor):
                found.numbers.setdefault(segment.name, {})[key] = _number(learner.name, key, value)
            elif value.shape == segment.values.shape:
                found.tensors.append(_stored(f"{prefix}/{key}", segment, value))
            elif segment.start == 0:  # a counter, or a summary of all of a parameter
                found.tensors.append(Stored(f"{prefix}/{key}", on_host(value)))
    for number, (parameter, whole) in enumerate(strategy.exported()):
        if number % ranks == rank:
            kept = {key: value for key, value in whole.items() if key != "values" or strategy.apart}
            for key, value in kept.items():
                named = MASTER if key == "values" else key
                found.tensors.append(Stored(f"optimizer/{learner.name}/{parameter}/{named}", on_host(value)))
    return found


def record_others(learner: Learner, learned: Sequence[nn.Module]) -> list[Stored]:
    """Return what an objective has besides what its model's file holds: models that follow, buffers that files lack.

    ``learned`` are the models of all learners.
    """
    tensors = {f"held/{learner.name}/{key}": value for key, value in _followers(learner, learned).items()}
    tensors |= {f"buffer/{learner.name}/{key}": value for key, value in _unsaved(learner.objective.model).items()}
    return [Stored(name, on_host(value)) for name, value in tensors.items()]


def structure(model: nn.Module) -> dict[str, str]:
    """Return what two models of the same shapes may differ in: the kind of each module; and a digest of it all."""
    kinds = {name: type(module).__qualname__ for name, module in model.named_modules()}
    return {"digest": hashlib.sha256(repr(sorted(kinds.items())).encode()).hexdigest()[:16], "kind": kinds[""]}


@torch.no_grad()
def restore(
    learner: Learner, checkpoint: Checkpoint, numbers: Mapping[str, Any], learned: Sequence[nn.Module], prefix: str
) -> None:
    """Set a learner's model, and what its optimizer holds, to what a checkpoint says; every rank calls it.

    Args:
        learner: before any step.
        checkpoint: verified.
        numbers: what all ranks' records had as such, together.
        learned: the models of all learners.
        prefix: of the model's names in its file.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    strategy, model = learner.strategy, learner.objective.model
    remembered = _Remembered(learner, checkpoint, numbers, prefix)
    with strategy.whole():
        own = {} if strategy.updates_itself else {prefix + name: name for name in strategy.parameters}
        _check(learner, checkpoint, prefix)
        for key, value in model.state_dict().items():
            if prefix + key in own:
                value.copy_(remembered.of_model(key, value.dtype, behind=strategy.apart))
            elif prefix + key in checkpoint.tensors and key not in strategy.parameters:  # else it is tied, or imported
                value.copy_(checkpoint.read(prefix + key))
        for start, tensors in (("held", _followers(learner, learned)), ("buffer", _unsaved(model))):
            for key, value in tensors.items():
                if (name := f"{start}/{learner.name}/{key}") in checkpoint.tensors:
                    value.copy_(checkpoint.read(name))
    for shard in learner.parameters:
        for segment in shard.segments:
            if segment.values.untyped_storage().data_ptr() != segment.parameter.untyped_storage().data_ptr():
                segment.values.copy_(_part(remembered.values(segment.name), segment))
    learner.optimizer.restore(remembered.of_optimizer)
    if strategy.updates_itself:
        counters = {"updates": float(learner.step)} | (learner.state_dict()["loss_scale"] or {})
        strategy.imported(((name, remembered.whole(name)) for name in strategy.parameters), counters)
    strategy.resume()


class _Remembered:
    """A learner's part of a checkpoint, by parameter."""

    def __init__(self, learner: Learner, checkpoint: Checkpoint, numbers: Mapping[str, Any], prefix: str):
        self._checkpoint, self._numbers, self._prefix = checkpoint, numbers, prefix
        self._start = f"optimizer/{learner.name}/"
        self._keys: dict[str, list[str]] = {}
        for name in checkpoint.tensors:
            if name.startswith(self._start):
                parameter, _, key = name.removeprefix(self._start).rpartition("/")
                self._keys.setdefault(parameter, []).append(key)

    def values(self, parameter: str) -> Tensor:
        """Return a parameter's values as exactly as they are known."""
        if MASTER in self._keys.get(parameter, ()):
            return self._read(parameter, MASTER)
        return self._checkpoint.read(self._prefix + parameter)

    def of_model(self, parameter: str, dtype: torch.dtype, *, behind: bool) -> Tensor:
        """Return a parameter's values as the model has them in ``dtype``, maybe ``behind`` those of the optimizer."""
        stored = self._checkpoint.read(self._prefix + parameter)
        return stored if behind and dtype.itemsize <= stored.dtype.itemsize else self.values(parameter)

    def of_optimizer(self, segment: Segment) -> dict[str, Any]:
        """Return what is remembered of a segment."""
        found = dict(self._numbers.get(segment.name, {}))
        for key in self._keys.get(segment.name, ()):
            if key != MASTER:
                value = self._read(segment.name, key)
                whole = value.shape == segment.parameter.shape and key != "step"
                found[key] = _part(value, segment) if whole else value
        return found

    def whole(self, parameter: str) -> dict[str, Tensor]:
        """Return values and state of a parameter for a strategy that updates by itself."""
        keys = [key for key in self._keys.get(parameter, ()) if key not in (MASTER, "step")]
        return {"values": self.values(parameter)} | {key: self._read(parameter, key) for key in keys}

    def _read(self, parameter: str, key: str) -> Tensor:
        return self._checkpoint.read(f"{self._start}{parameter}/{key}")


def _check(learner: Learner, checkpoint: Checkpoint, prefix: str) -> None:
    """Refuse a checkpoint whose model has other tensors than the learner's."""
    for key, value in learner.strategy.parameters.items():
        stored = checkpoint.tensors.get(prefix + key)
        if stored is None:
            raise ConfigError(
                f"{checkpoint.path}: learner {learner.name!r}: parameter {key!r} is not in the checkpoint"
            )
        shape = tuple(getattr(value, "ds_shape", value.shape))  # DeepSpeed empties what it has in parts
        _same_shape(learner.name, f"parameter {key!r}", tuple(stored.shape), shape, checkpoint)
    if learner.strategy.updates_itself:
        return  # what it has of the model now may be in parts
    state = learner.objective.model.state_dict()
    known = {value.data_ptr() for key, value in state.items() if prefix + key in checkpoint.tensors}
    for key, value in state.items():
        if prefix + key in checkpoint.tensors:
            shape = tuple(checkpoint.tensors[prefix + key].shape)
            _same_shape(learner.name, f"{key!r}", shape, tuple(value.shape), checkpoint)
        elif value.numel() and value.data_ptr() not in known:  # else it is tied to another
            raise ConfigError(f"{checkpoint.path}: learner {learner.name!r}: {key!r} is not in the checkpoint")


def _same_shape(learner: str, what: str, there: tuple[int, ...], here: tuple[int, ...], checkpoint: Checkpoint) -> None:
    if there != here:
        raise ConfigError(
            f"{checkpoint.path}: learner {learner!r}: {what} has shape {there} there and {here} here: the model has "
            "changed"
        )


def _owned(learner: Learner, rank: int, ranks: int) -> Iterator[tuple[Segment, dict[str, Any]]]:
    """Yield what of the optimizer's state this rank records; over all ranks each element once."""
    held = list(learner.optimizer.state())
    if not learner.strategy.replicated:
        yield from held
        return
    loads = [0] * ranks
    for segment, state in sorted(held, key=lambda item: -item[0].parameter.numel()):
        least = loads.index(min(loads))
        loads[least] += segment.parameter.numel()
        if least == rank:
            yield segment, state


def _followers(learner: Learner, learned: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the tensors of the modules that an objective keeps up with its model: averages, target networks."""
    found: dict[str, Tensor] = {}
    for name, module in held_modules(learner.objective).items():
        if not any(module is model for model in learned):
            # Of one that nobody keeps up, such as a teacher, forward passes may still change the buffers.
            follows = hasattr(learner.objective, "updated") or isinstance(module, MovingAverage)
            tensors = _every(module) if follows else dict(module.named_buffers())
            found |= {f"{name}/{key}": tensor for key, tensor in tensors.items()}
    return found


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model's ``state_dict`` leaves out."""
    saved = model.state_dict().keys()
    return {key: buffer for key, buffer in model.named_buffers() if key not in saved}


def _every(module: nn.Module) -> dict[str, Tensor]:
    return {**{key: p.detach() for key, p in module.named_parameters()}, **dict(module.named_buffers())}


def _stored(name: str, segment: Segment, values: Tensor) -> Stored:
    """Return what is stored of a segment: all of a parameter in its shape, or a cut in the order of its memory."""
    parameter = segment.parameter
    if values.shape == parameter.shape:
        return Stored(name, on_host(values))
    order = _order(parameter)
    shape = tuple(parameter.shape[i] for i in order)
    return Stored(name, on_host(values), shape, segment.start, None if order == tuple(range(len(order))) else order)


def _part(whole: Tensor, segment: Segment) -> Tensor:
    """Return a segment's elements of a tensor of its parameter's shape, as the segment has them."""
    if segment.values.shape == whole.shape:
        return whole
    return whole.permute(_order(segment.parameter)).reshape(-1)[segment.start : segment.stop]


def _order(parameter: Tensor) -> tuple[int, ...]:
    """Return the dimensions from the one whose neighbours lie farthest apart in memory to the nearest."""
    strides = parameter.stride()
    return tuple(sorted(range(parameter.dim()), key=lambda i: (-strides[i], i)))


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor as it is now, on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def _number(learner: str, key: str, value: Any) -> Any:
    if value is None or isinstance(value, int | float | str):
        return value
    raise ConfigError(
        f"learner {learner!r}: the optimizer's state {key!r} is a {type(value).__name__}; a checkpoint holds tensors "
        "and numbers (checkpoint.enabled false trains without)"
    )
