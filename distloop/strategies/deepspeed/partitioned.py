"""A model whose parameters lie in parts on all ranks (stage 3), and how it becomes whole for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Partitioned:
    """What DeepSpeed has made of a model; between steps alone it may be asked to be whole."""

    def __init__(self, deepspeed: Any, engine: Any, model: nn.Module):
        self._zero, self._offload = deepspeed.zero, engine.optimizer.parameter_offload
        self._model = model
        # DeepSpeed sees the forward pass of the loss alone; it is to know of the model's own, in which a module may use
        # another one's parameters (tied weights).
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self._mark(forward=True)),
            model.register_forward_hook(lambda *_: self._mark(forward=False), always_call=True),
        ]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all parameters on every rank; outside of training, ranks may then run the model as they like."""
        with self._zero.GatheredParameters(list(self._model.parameters())):
            self._release_hooks()
            try:
                yield
            finally:
                self._offload.setup_zero_stage3_hooks()

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model an ordinary one again, for good: whole on every rank."""
        parameters = list(self._model.parameters())
        with self._zero.GatheredParameters(parameters):
            values = [parameter.detach().clone() for parameter in parameters]
        self._release_hooks()
        for hook in self._hooks:
            hook.remove()
        for parameter, whole in zip(parameters, values, strict=True):
            vars(parameter).clear()  # DeepSpeed's records and the methods that it put over torch's
            parameter.data = whole
        for module in self._model.modules():
            if hasattr(module, "_original_parameters"):
                vars(module)["_parameters"] = module._original_parameters
                del module._original_parameters

    def _release_hooks(self) -> None:
        self._offload._remove_module_hooks()
        self._offload.forward_hooks.clear()
        self._offload.backward_hooks.clear()

    def _mark(self, *, forward: bool) -> None:
        for module in self._model.modules():
            if hasattr(module._parameters, "_in_forward"):
                module._parameters._in_forward = forward
