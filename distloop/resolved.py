"""A configuration that has been checked, with where each value came from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distloop.errors import ConfigError, nearest
from distloop.layers import LEARNERS, leaves
from distloop.values import shown

if TYPE_CHECKING:
    from distloop.config import Config


@dataclass(frozen=True)
class Resolved:
    """A valid configuration and where its values came from (dotted keys that are missing are defaults)."""

    config: Config
    sources: Mapping[str, str]
    layers: Mapping[str, int]  # which of the layers a value came from; the higher wins
    learners: Mapping[str, Resolved] = field(default_factory=dict)  # where a learner has values of its own

    def for_learner(self, name: str) -> Resolved:
        """Return the configuration as it is for one learner."""
        return self.learners.get(name, self)

    def check_learners(self, names: Iterable[str]) -> None:
        """Refuse what is said of a learner that does not exist."""
        known = list(names)
        for name in self.learners:
            if name not in known:
                dotted = next(key for key in self.sources if key.startswith(f"{LEARNERS}.{name}."))
                raise self.error(dotted, f"the task has no learner {shown(name)}{nearest(name, known)}")

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Yield (dotted key, value, source) for every value."""
        for section, values in self.config.model_dump().items():
            for dotted, value in leaves(section, values, depth=3 if section == LEARNERS else 1):
                yield dotted, value, self.source(dotted)

    def source(self, dotted: str) -> str:
        """Return where a value came from."""
        return self.sources.get(dotted, "default")

    def error(self, dotted: str, message: str) -> ConfigError:
        """Return an error about a value, with its source."""
        return ConfigError(f"{self.source(dotted)}: {dotted}: {message}")

    def choose(self, dotted: str, known: Iterable[str], otherwise: str = "") -> None:
        """Refuse the name at ``dotted`` unless it is known."""
        section, _, key = dotted.partition(".")
        name = getattr(getattr(self.config, section), key)
        if name not in (names := list(known)):
            raise self.error(
                dotted, f"unknown name {shown(name)}{nearest(name, names)}" + (f", {otherwise}" if otherwise else "")
            )

    def refuse_idle(self, dotted: str, chooser: str, reader: str) -> None:
        """Refuse a key that was given although nothing reads it as ``chooser`` stands, unless a higher layer chose."""
        section, _, key = dotted.partition(".")
        values = getattr(self.config, section)
        if dotted not in self.sources or self.layers[dotted] < self.layers.get(chooser, 0):
            return
        if getattr(values, key) != type(values).model_fields[key].get_default():  # a default does no harm
            raise self.error(dotted, f"is read with {reader} alone")

    def refuse_unread(self, section: str, method: str, read: Collection[str]) -> None:
        """Refuse a key that was given although the chosen method does not read it.

        What a file says beside one name does not count when a higher layer chooses another name.
        """
        chosen = self.layers.get(f"{section}.name", 0)
        for dotted in self.sources:
            head, _, key = dotted.partition(".")
            if head != section or key in read or self.layers[dotted] < chosen:
                continue
            values = getattr(self.config, section)
            if getattr(values, key) != type(values).model_fields[key].get_default():  # a default does no harm
                raise self.error(dotted, f"{method} does not read it; it reads {', '.join(sorted(read))}")

    def nested(self) -> dict[str, Any]:
        """Return the configuration with JSON's types only."""
        return self.config.model_dump(mode="json")
