"""The first steps are looked at before anything is sent (docs/decisions/0005)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distloop.errors import ConfigError
from distloop.messages import agree_on
from distloop.strategies import Strategy


class FirstStepCheck:
    """Asks of a learner's first step: is the loss one, and does it reach every parameter?

    And of its first steps: are all ranks about to do the same? Ranks that are not would add up gradients of different
    learners without a word, or wait for each other for ever.
    """

    MISSED, REACHED, IDLE = 0, 1, 2
    STEPS = 3

    def __init__(self, name: str, strategy: Strategy, *, refuse_unused: bool):
        self._name, self._strategy, self._refuse_unused = name, strategy, refuse_unused
        self._reached: set[int] = set()
        self.steps = 0  # looked at
        self._begins = True

    def __call__(self, loss: Any, *, idle: bool, final: bool) -> None:
        """Look at one micro-batch.

        Raises:
            ConfigError: on all ranks alike if it is about parameters that no gradient reaches.
            MismatchError: on all ranks alike, if they are not at the same step of the same learner.
        """
        if self._begins:  # and not at the end: DDP waits for all ranks in the second step's first backward
            self._agree()
            if self.steps == 1 and self._refuse_unused and self._strategy.sends_every_backward:
                self._compare()  # ranks with fewer micro-batches must not wait for it while others wait for them
        self._begins = final
        if self.steps == 0:
            self._look(loss, idle=idle, final=final)
        self.steps += final

    def _agree(self) -> None:
        own = {"learner": self._name, "its step": self.steps + 1, "its collectives": list(self._strategy.plan)}
        agree_on(self._strategy.transport, own, "what they are about to send")

    def _look(self, loss: Any, *, idle: bool, final: bool) -> None:
        where = f"objective {self._name!r}: loss(guesses, targets)"
        if not isinstance(loss, Tensor):
            raise ConfigError(f"{where} returned a {type(loss).__name__}; it must return a scalar tensor")
        if loss.dim() != 0:
            raise ConfigError(
                f"{where} returned a tensor of shape {tuple(loss.shape)}; it must be a scalar: take the mean"
            )
        if not loss.requires_grad:
            raise ConfigError(
                f"{where} returned a tensor that depends on no trained parameter (detached, or made under no_grad)"
            )
        leaves = _leaves(loss)
        if leaves is None:
            raise ConfigError(
                f"objective {self._name!r}: an activation checkpoint with use_reentrant=True hides its parameters from "
                "the gradient; pass use_reentrant=False"
            )
        if not self._refuse_unused:
            return
        if final and self._strategy.needs_every_gradient:
            self._reached.clear()  # it looks at the last backward alone
        if not idle:
            self._reached |= leaves
        if final and not self._strategy.sends_every_backward:
            self._compare()

    def _compare(self) -> None:
        parameters, every = self._strategy.parameters, self._strategy.needs_every_gradient
        idle = not self._reached  # a null loss reaches everything
        own = [
            self.IDLE if idle else self.REACHED if id(p) in self._reached else self.MISSED for p in parameters.values()
        ]
        rows = self._strategy.transport.all_gather(torch.tensor(own, dtype=torch.uint8)).wait()
        refused = (rows == self.MISSED).any(0)
        if not every:
            refused &= ~(rows == self.REACHED).any(0)
        unused = [name for name, refuse in zip(parameters, refused.tolist(), strict=True) if refuse]
        if unused:
            listed = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
            raise ConfigError(
                f"objective {self._name!r}: the loss does not reach parameters {listed}; freeze them with "
                "requires_grad_(False), or set strategy.unused_parameters to zeros"
            )


def _leaves(loss: Tensor) -> set[int] | None:
    """Return the ids of the tensors whose gradient the loss has, by walking its graph; None if part of it is hidden."""
    leaves: set[int] = set()
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            return None
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return leaves
