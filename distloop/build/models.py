"""Models on their devices, the same on all ranks, and how their gradients are collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distloop.averages import MovingAverage
from distloop.build.deterministic import leaves_of
from distloop.build.method import Method
from distloop.build.place import Place
from distloop.config import Config
from distloop.errors import ConfigError
from distloop.objective import Objective, held_modules, trained_parameters
from distloop.strategies import Options, Strategy, make
from distloop.strategies.base import agree_on_model

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def options_from(config: Config) -> Options:
    """Return what a configuration says that strategies read."""
    section, precision = config.strategy, config.precision
    return Options(
        bucket_mb=section.bucket_mb,
        unused_parameters=section.unused_parameters,
        wire_dtype=section.wire_dtype,
        leaves=leaves_of(config),
        calibration=section.calibration,
        accumulate=section.accumulate,
        device_fraction=section.device_fraction,
        delayed_update=section.delayed_update,
        weights=HALF.get(precision.name) if precision.weights == "half" else None,
        stage=section.stage,
        offload=section.offload,
        cpu_adam=section.cpu_adam,
        deepspeed=section.deepspeed,
    )


def make_strategy(name: str, objective: Objective, place: Place, config: Config, method: Method) -> Strategy:
    """Make an objective's model, and what it looks at, the same on all ranks; choose how gradients are collected.

    Raises:
        ConfigError: there is nothing to train, or something that cannot be trained in parts.
    """
    model = objective.model.to(place.device)
    if place.world.size > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise ConfigError(
            f"objective {name!r}: SyncBatchNorm waits for every rank at every forward pass, and here a rank may "
            "have fewer of them or none; use GroupNorm or LayerNorm, or BatchNorm"
        )
    parameters = trained_parameters(name, model)
    strategy = make(
        config.strategy.name, parameters, place.transport, options_from(config), method.recipe(model, parameters)
    )
    if strategy.updates_itself and config.monitor.nonfinite == "skip":
        raise ConfigError(
            f"monitor.nonfinite: {config.strategy.name} updates by itself, and skips for a loss scale alone; set stop",
            everywhere=True,
        )
    rest = {key: t for key, t in _tensors(model).items() if key not in parameters}
    for held, module in held_modules(objective).items():
        module.to(place.device)
        rest |= {f"{held}.{key}": t for key, t in _tensors(module).items()}
    agree_on_model(rest, place.transport)
    for tensor in rest.values():
        place.transport.broadcast(tensor.detach())
    return strategy


def moving_averages(objectives: Mapping[str, Objective]) -> dict[str, nn.Module]:
    """Return the moving averages that objectives hold, as ``objective.attribute``."""
    return {
        f"{name}.{attribute}": held.average
        for name, objective in objectives.items()
        for attribute, held in held_modules(objective).items()
        if isinstance(held, MovingAverage)
    }


def refuse_shared_parameters(objectives: Mapping[str, Objective]) -> None:
    """Refuse a parameter that two learners would train.

    Each has gradients, optimizer state and, where updates are sharded, a copy of the values of its own: of two updates
    one would be lost without a word.
    """
    owner: dict[int, tuple[str, str]] = {}
    for name, objective in objectives.items():
        for key, parameter in objective.model.named_parameters():
            first, first_key = owner.setdefault(id(parameter), (name, key))
            if first != name and parameter.requires_grad:
                raise ConfigError(
                    f"objectives {first!r} and {name!r} share parameters (the first is {first_key!r}), and only one "
                    "may train them: make them one objective whose loss is the sum, or leave them out of the model of "
                    "one, which may still use them in its guess"
                )


def refuse_what_runs_models(task: Any, strategies: Mapping[str, Strategy]) -> None:
    """Refuse a task that needs its models between the forward and backward passes of the steps, where none is whole.

    Raises:
        ConfigError: a strategy has all ranks run its model in step, and the task cannot.
    """
    if not any(one.in_step for one in strategies.values()):
        return
    reasons = {
        "more than one learner, and each learner's model is in parts during the other's turn": len(strategies) > 1,
        "join(site), and what acts runs its model by itself": hasattr(task, "join"),
    }
    for name, objective in task.objectives.items():
        averages = any(isinstance(held, MovingAverage) for held in held_modules(objective).values())
        reasons[f"updated() of {name!r} or a moving average, which follow whole models"] = averages or hasattr(
            objective, "updated"
        )
    for reason, found in reasons.items():
        if found:
            raise ConfigError(
                f"strategy.stage: 3 leaves each rank a part of a model, and this task has {reason}; use stage 1 or 2",
                everywhere=True,
            )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
