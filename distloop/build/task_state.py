"""The state of tasks and observers that have one of their own, for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distloop.errors import ConfigError
from distloop.records import Observer


class TaskState:
    """A task's own, of this rank: what it holds beside its objectives' models and what it collected.

    A task has a state if it has ``state()`` and ``restore(states)``; the latter gets those of all ranks of then.
    """

    def __init__(self, task: Any):
        self._task = task
        both = [callable(getattr(task, name, None)) for name in ("state", "restore")]
        self._has = all(both)
        if any(both) and not self._has:
            raise ConfigError(
                f"task {type(task).__name__}: state() and restore(states) come together: what is saved must come back"
            )

    def state_dict(self) -> dict[str, Any]:
        return dict(self._task.state()) if self._has else {}

    def load_states(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        if self._has:
            self._task.restore(states)


class ObserverStates:
    """Those of this rank's observers, by kind; an observer has one if it has ``state_dict`` and ``load_state_dict``."""

    def __init__(self, observers: Sequence[Observer]):
        self._observers: dict[str, Any] = {}
        for observer in observers:
            if hasattr(observer, "state_dict") and hasattr(observer, "load_state_dict"):
                kind = f"{type(observer).__module__}:{type(observer).__qualname__}"
                number = sum(known.partition("#")[0] == kind for known in self._observers)
                self._observers[f"{kind}#{number}"] = observer

    def state_dict(self) -> dict[str, Any]:
        return {name: observer.state_dict() for name, observer in self._observers.items()}

    def load_states(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        own = states[rank] if rank < len(states) else {}
        for name in own:
            if name not in self._observers and not name.startswith("distloop."):
                raise ConfigError(
                    f"log.observers: {name.partition('#')[0]} has a state in the checkpoint and is missing"
                )
        for name, observer in self._observers.items():
            if name in own:
                observer.load_state_dict(own[name])
