"""Who takes a turn on which global batch: all learners on each, unless a task says otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from distloop.errors import ConfigError, nearest
from distloop.learner import Learner


class Turns(Sequence[Learner]):
    """Learners for the loop: to iterate over them is to begin a global batch. All of them are in ``learners``.

    Args:
        learners: in the order of their turns.
        every: by learner, on every how many global batches it takes its turn (default: on each). A GAN whose generator
            learns half as often as its discriminator has ``{"generator": 2}``.

    Raises:
        ConfigError: see :func:`check_turns`.
    """

    def __init__(self, learners: Sequence[Learner], every: Mapping[str, int] | None = None):
        self.learners = list(learners)
        self.every = check_turns(every or {}, [learner.name for learner in self.learners])
        self._all_on_each = set(self.every.values()) == {1}
        self.batches = 0  # begun so far
        self._taking = self.learners

    def __iter__(self) -> Iterator[Learner]:
        """Begin a global batch: yield those whose turn it is."""
        self.batches += 1
        if not self._all_on_each:
            self._taking = [learner for learner in self.learners if self.batches % self.every[learner.name] == 0]
        return iter(self._taking)

    @property
    def last(self) -> Learner:
        """Whose turn is the last on the present global batch."""
        return self._taking[-1]

    def __len__(self) -> int:
        return len(self.learners)

    @overload
    def __getitem__(self, index: int) -> Learner: ...
    @overload
    def __getitem__(self, index: slice) -> list[Learner]: ...
    def __getitem__(self, index: int | slice) -> Learner | list[Learner]:
        return self.learners[index]


def checked_turns(task: Any) -> dict[str, int]:
    """Return on every how many batches each learner of ``task`` takes its turn."""
    return check_turns(getattr(task, "turns", {}), list(task.objectives))


def check_turns(every: Any, names: Sequence[str]) -> dict[str, int]:
    """Return ``every`` with a number for each name.

    Raises:
        ConfigError: a name is unknown, a number is not positive, or there would be batches on which nobody learns.
    """
    if not isinstance(every, Mapping):
        raise ConfigError(f"task.turns: must be a mapping of learners to numbers, not {every!r}")
    for name, batches in every.items():
        if name not in names:
            raise ConfigError(f"task.turns: there is no learner {name!r}{nearest(name, names)}")
        if type(batches) is not int or batches < 1:
            raise ConfigError(f"task.turns: {name}: {batches!r} must be a whole number, at least 1")
    complete = {name: every.get(name, 1) for name in names}
    if complete and min(complete.values()) > 1:
        raise ConfigError(f"task.turns: some learner must take a turn on every batch, not {complete}")
    return complete
