"""The optimizer that DeepSpeed is given: one of torch's, or its own for the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distloop.errors import ConfigError
from distloop.strategies.base import Options, Parameters, Recipe

ELEMENTWISE = ["sgd", "rmsprop", "adam", "adamw"]
FUSED = ("sgd", "adam", "adamw")


def make(parameters: Parameters, recipe: Recipe, options: Options, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer over ``parameters``, in groups of one weight decay each.

    Raises:
        ConfigError: it would need more of a parameter than a rank has, or is not for this device.
    """
    if recipe.optimizer not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer.name: {recipe.optimizer} may look at more than one element at a time, and under strategy "
            f"deepspeed a rank has an even cut of all parameters; {', '.join(ELEMENTWISE)} work"
        )
    by_decay: dict[float, list[Tensor]] = {}
    for name, parameter in parameters.items():
        by_decay.setdefault(recipe.decays[name], []).append(parameter)
    groups = [{"params": members, "weight_decay": decay} for decay, members in by_decay.items()]
    optimizer = _optimizer(groups, recipe, options, device)
    if recipe.clip_value is not None:
        _clip_values(optimizer, recipe.clip_value)
    return optimizer


def _optimizer(
    groups: list[dict[str, Any]], recipe: Recipe, options: Options, device: torch.device
) -> torch.optim.Optimizer:
    # Without a learning rate nothing moves until the schedule has given one.
    constants: dict[str, Any] = {"lr": 0.0, **recipe.constants}
    if options.cpu_adam == "deepspeed":
        return _of_deepspeed(groups, recipe, options, device, constants)
    kinds = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}
    kind: Any = kinds.get(recipe.optimizer, torch.optim.AdamW)
    return kind(groups, **constants, **({"fused": True} if recipe.optimizer in FUSED else {}))  # type: ignore[no-any-return]


def _of_deepspeed(
    groups: list[dict[str, Any]], recipe: Recipe, options: Options, device: torch.device, constants: dict[str, Any]
) -> torch.optim.Optimizer:
    if recipe.optimizer not in ("adam", "adamw"):
        raise ConfigError(
            f"strategy.cpu_adam: deepspeed is for adam and adamw, and optimizer.name is {recipe.optimizer}"
        )
    if device.type != "cpu" and options.offload == "none":
        raise ConfigError(
            "strategy.cpu_adam: deepspeed is for optimizers on the CPU; set strategy.offload to optimizer"
        )
    from distloop.strategies.deepspeed import extension

    return extension.cpu_adam(groups, adamw_mode=recipe.optimizer == "adamw", **constants)


def _clip_values(optimizer: torch.optim.Optimizer, most: float) -> None:
    """Clamp gradients right before the optimizer sees them: after DeepSpeed has divided by the scale and clipped."""

    def clamp(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            torch._foreach_clamp_min_(gradients, -most)
            torch._foreach_clamp_max_(gradients, most)

    optimizer.register_step_pre_hook(clamp)
