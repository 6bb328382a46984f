"""An objective: what one model learns, as the user writes it; and what can be told of it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from distloop.errors import ConfigError
from distloop.strategies import Parameters


class Objective(Protocol):
    """What one model learns. Two methods are optional.

    - ``weight(batch)`` returns what ``loss`` is a mean over. Without it a batch weighs its number of samples. A
      language model whose loss is a mean over tokens returns how many there are.
    - ``updated()`` is called on every rank after each applied update: a moving average or a target network follows.
    """

    model: nn.Module

    def guess(self, batch: Any) -> Any:
        """Return the model's answer to ``batch``."""

    def targets(self, batch: Any) -> Any:
        """Return what the answer should have been: from the data, the inputs, noise, or another model."""

    def loss(self, guesses: Any, targets: Any) -> Tensor:
        """Return a scalar: the mean over what ``weight`` counts."""


def trained_parameters(name: str, model: nn.Module) -> Parameters:
    """Return the parameters of ``model`` that require a gradient, by name.

    Raises:
        ConfigError: there are none.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            f"objective {name!r}: its model {type(model).__name__} has no parameter that requires a gradient"
        )
    return trained


def held_modules(objective: Objective) -> dict[str, nn.Module]:
    """Return the modules that an objective holds besides its model, by attribute: a teacher, a target network."""
    slots = [name for kind in type(objective).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [*slots, *getattr(objective, "__dict__", {})]
    held: dict[str, Any] = {name: getattr(objective, name, None) for name in names}
    if isinstance(objective, nn.Module):
        held |= dict(objective.named_children())
    for name, value in list(held.items()):
        if isinstance(value, list | tuple):
            held |= {f"{name}.{i}": item for i, item in enumerate(value)}
    return {n: m for n, m in held.items() if isinstance(m, nn.Module) and m is not objective.model}
