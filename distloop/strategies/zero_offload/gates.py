"""Modules that wait for their own parameters, so that the others' may still be on their way when forward begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from distloop.errors import ConfigError


class Gates:
    """Before a module runs, ``need`` is called with the buckets in which its own parameters are.

    Parameters that are used before a module of theirs has run, as in weight decay written into a loss, cannot wait like
    that. Those that the first steps use so are found by looking at every torch function's arguments; their buckets are
    in ``early``, to be waited for before forward. If it happens later, the step is refused.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[nn.Parameter, str],
        places: Mapping[nn.Parameter, Sequence[int]],
        need: Callable[[Collection[int]], None],
    ):
        self.early: set[int] = set()
        self._names, self._places, self._need = names, places, need
        self._passed: set[nn.Parameter] = set()
        self._hooks = []
        for module in model.modules():
            own = [p for p in module.parameters(recurse=False) if p in places]
            if own:
                buckets = sorted({i for p in own for i in places[p]})
                self._hooks.append(module.register_forward_pre_hook(self._gate(own, buckets)))

    def shut(self) -> None:
        """Begin a step: no module has run."""
        self._passed.clear()

    def look(self) -> TorchFunctionMode:
        """Return the context in which uses of parameters outside their modules are found."""
        return _Look(self._used)

    def check(self, parameter: nn.Parameter, stale: Collection[int]) -> None:
        """Raise if a gradient came from values that may have been old: ``stale`` are buckets not waited for."""
        if parameter not in self._passed and not self.early.issuperset(set(self._places[parameter]) & set(stale)):
            raise ConfigError(
                f"parameter {self._names[parameter]!r} was used before its module was called, while its new values "
                "were on their way, and not so in the first steps; use it there too, or by calling the module"
            )

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _gate(self, own: Sequence[nn.Parameter], buckets: Sequence[int]) -> Callable[..., None]:
        def wait(module: nn.Module, arguments: object) -> None:
            self._passed.update(own)
            self._need(buckets)

        return wait

    def _used(self, parameter: nn.Parameter) -> None:
        if parameter in self._places and parameter not in self._passed:
            self.early.update(self._places[parameter])


class _Look(TorchFunctionMode):
    """Tells of every parameter that a torch function is called with."""

    def __init__(self, used: Callable[[nn.Parameter], None]):
        super().__init__()
        self._used = used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # shape and dtype of a parameter are not its values
            self._see([args, kwargs or {}])
        return func(*args, **(kwargs or {}))

    def _see(self, value: object) -> None:
        if isinstance(value, nn.Parameter):
            self._used(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self._see(item)
        elif isinstance(value, dict):
            self._see(list(value.values()))
