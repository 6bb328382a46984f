"""What an engine of DeepSpeed's has learned, by parameter name and whole, for checkpoints that know no strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distloop.strategies.base import Parameters, Recipe

VALUES = "values"
# Where the optimizers of the three kinds of engines keep what they update.
FLAT = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")


def keys_of(recipe: Recipe) -> list[str]:
    """Return the names of the optimizer's state, as torch has them, that has one number for each of a parameter's."""
    momentum = ["momentum_buffer"] if recipe.constants.get("momentum") else []
    return {"sgd": momentum, "rmsprop": ["square_avg", *momentum]}.get(recipe.optimizer, ["exp_avg", "exp_avg_sq"])


class State:
    """Reads and writes the optimizer's copy of the values and its state; all ranks do it alike, between steps."""

    def __init__(self, deepspeed: Any, engine: Any, parameters: Parameters, recipe: Recipe):
        self._tools, self._zero = deepspeed.utils, engine.optimizer
        self._parameters, self._keys = parameters, keys_of(recipe)
        self._counts = recipe.optimizer != "sgd"
        self._flat: list[Tensor] = next(getattr(self._zero, name) for name in FLAT if hasattr(self._zero, name))

    def read(self, updates: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each parameter's name, with its values in fp32 and the optimizer's state for it: one at a time.

        After so many updates, which optimizers that count have a counter of, as those of other strategies do.
        """
        self._prepare()
        for name, parameter in self._parameters.items():
            found = {VALUES: self._tools.safe_get_full_fp32_param(parameter)}
            for key in self._keys:
                found[key] = self._tools.safe_get_full_optimizer_state(parameter, key)
            if self._counts:
                found["step"] = torch.tensor(float(updates))
            yield name, {key: tensor.detach().clone() for key, tensor in found.items()}

    @torch.no_grad()
    def write(self, state: Iterable[tuple[str, Mapping[str, Tensor]]], updates: int) -> None:
        """Take over what ``read`` of an engine of any stage has yielded, after so many updates."""
        self._prepare()
        for name, tensors in state:
            parameter = self._parameters[name]
            for key in (VALUES, *self._keys):
                self._write(parameter, tensors[key].to(torch.float32), None if key == VALUES else key)
        for flat in self._flat:
            own = self._zero.optimizer.state[flat]
            if isinstance(own.get("step"), Tensor):
                own["step"].fill_(updates)
            elif self._counts:
                own["step"] = updates
        self._publish()

    @torch.no_grad()
    def begin(self, values: Mapping[str, Tensor]) -> None:
        """Let the optimizer start from ``values``, in fp32; by itself it would start from their half precision."""
        for name, tensor in values.items():
            self._write(self._parameters[name], tensor, None)

    def _prepare(self) -> None:
        """Give the optimizer its state where it has made no step yet, and let each parameter find its part of it."""
        optimizer = self._zero.optimizer
        of_torch = type(optimizer).__module__.startswith("torch.")
        for flat in self._flat:
            own = optimizer.state[flat]
            for key in self._keys:
                if own.get(key) is None:
                    own[key] = torch.zeros_like(flat, requires_grad=False)
            if self._counts and "step" not in own:
                own["step"] = torch.zeros((), device=flat.device) if of_torch else 0
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._hp_optimizer_states_linked = False  # it links all groups when the first of them has a state
            self._zero._lazy_init_hp_params_optimizer_state()

    def _write(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        if not hasattr(parameter, "ds_id"):
            parameter.set_full_hp_param(whole, key)
            return
        size, rank = parameter.ds_tensor.ds_numel, parameter.ds_zero_partition_rank
        flat = whole.flatten()
        # DeepSpeed's own way for whole tensors cuts beyond the end of one that ranks cannot share evenly.
        part = F.pad(flat, (0, size * parameter.ds_zero_partition_world_size - flat.numel()))[rank * size :][:size]
        parameter._z3_optimizer.set_local_hp_param(part, parameter, key)

    def _publish(self) -> None:
        """Make the model's values those that the optimizer has."""
        if hasattr(self._zero, "update_lp_params"):
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for number in range(len(self._flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
