"""Where configuration comes from: defaults, a file, environment variables, the command line; each value knows which."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distloop.errors import ConfigError, nearest
from distloop.layers import LEARNERS, Setting, Settings, divide, learner_key, leaves
from distloop.yaml_file import parse_value, read_sections

if TYPE_CHECKING:
    from distloop.config import Config

PREFIX = "DISTLOOP_"


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
                raise self.error(dotted, f"the task has no learner {name!r}{nearest(name, known)}")

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
                dotted, f"unknown name {name!r}{nearest(name, names)}" + (f", {otherwise}" if otherwise else "")
            )

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


def resolve(*layers: Settings) -> Resolved:
    """Merge layers, the later ones winning, and check the result.

    Raises:
        ConfigError: a key is unknown or a value is wrong; one line each, with its source.
    """
    parted = [divide(layer) for layer in layers]
    learners: dict[str, Resolved] = {}
    sources: dict[str, str] = {}
    own: dict[str, dict[str, dict[str, Any]]] = {}  # by learner, section and key, as it would stand in a file
    for name in dict.fromkeys(name for _, by_learner in parted for name in by_learner):
        # In a layer what is said of one learner wins over what is said of all; a later layer wins over both.
        learners[name] = _resolve([layer for general, mine in parted for layer in (general, _named(name, mine))])
        for dotted, setting in ((d, s) for _, mine in parted for d, s in mine.get(name, {}).items()):
            section, _, key = dotted.partition(".")
            value = getattr(getattr(learners[name].config, section), key)
            own.setdefault(name, {}).setdefault(section, {})[key] = value
            sources[f"{LEARNERS}.{name}.{dotted}"] = setting.source
    resolved = _resolve([general for general, _ in parted], own)
    return replace(resolved, sources={**resolved.sources, **sources}, learners=learners)


def _named(name: str, by_learner: Mapping[str, Settings]) -> Settings:
    """Return what a layer says of a learner, with its name beside the source."""
    own = by_learner.get(name, {})
    return {dotted: replace(s, source=f"{s.source}: {LEARNERS}.{name}") for dotted, s in own.items()}


def _resolve(layers: Sequence[Settings], learners: Mapping[str, Any] | None = None) -> Resolved:
    """Merge and check layers that say nothing of single learners."""
    from pydantic import ValidationError

    from distloop.config import Config

    merged: Settings = {}
    heights: dict[str, int] = {}
    for height, layer in enumerate(layers):
        merged |= layer
        heights |= dict.fromkeys(layer, height)
    sections: dict[str, dict[str, Any]] = {LEARNERS: dict(learners or {})}
    for dotted, setting in merged.items():
        section, key = check_key(dotted, setting.source)
        try:
            json.dumps(setting.value)
        except (TypeError, ValueError):
            kind = type(setting.value).__name__
            raise ConfigError(
                f"{setting.source}: {dotted}: a {kind} is no number, text, list or mapping of such"
            ) from None
        sections.setdefault(section, {})[key] = setting.value
    try:
        config = Config.model_validate(sections)
    except ValidationError as failure:
        raise ConfigError("\n".join(_sentences(failure, merged))) from None
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    if micro is not None and micro > whole:
        source = merged["data.micro_batch_size"].source
        raise ConfigError(
            f"{source}: data.micro_batch_size: {micro} is more than data.global_batch_size, which is {whole}"
        )
    return _settled(Resolved(config, {dotted: setting.source for dotted, setting in merged.items()}, heights))


def _settled(resolved: Resolved) -> Resolved:
    """Return the configuration with the deterministic mode and its strategy together, whichever of them was given."""
    from distloop.strategies import BY_LEAVES, by_leaves

    config, sources, layers = resolved.config, dict(resolved.sources), dict(resolved.layers)
    mode, name = "train.deterministic", "strategy.name"
    if config.train.deterministic == by_leaves(config.strategy.name):
        return resolved
    given, other = (mode, name) if config.train.deterministic else (name, mode)
    if other in sources:
        value = config.strategy.name if other == name else "false"
        raise resolved.error(other, f"{value} contradicts {given} ({sources[given]}), whose strategy is {BY_LEAVES}")
    sources[other], layers[other] = sources[given], layers[given]
    strategy = config.strategy.model_copy(update={"name": BY_LEAVES})
    train = config.train.model_copy(update={"deterministic": True})
    settled = config.model_copy(update={"strategy": strategy, "train": train})
    return replace(resolved, config=settled, sources=sources, layers=layers)


def check_section(section: str, source: str, dotted: str = "") -> None:
    """Refuse a section that does not exist, with the nearest that does."""
    from distloop.config import Config

    sections = Config.model_fields
    if section in sections:
        return
    elsewhere = [f"{name}.{section}" for name in sections if section in _keys(name)]
    hint = f" (did you mean {' or '.join(elsewhere)}?)" if elsewhere else nearest(section, sections)
    raise ConfigError(f"{source}: {dotted or section}: unknown section {section!r}{hint}")


def check_key(dotted: str, source: str) -> tuple[str, str]:
    """Return the section and the key of a dotted key, or refuse it with the nearest that exists."""
    section, _, key = dotted.partition(".")
    check_section(section, source, dotted)
    if not key:
        raise ConfigError(f"{source}: {section}: is a section; give one of its keys, as in {section}.{_first(section)}")
    if section == LEARNERS:
        if "." in key:
            name, inner = learner_key(dotted, source)
            check_key(inner, f"{source}: {LEARNERS}.{name}")
    elif section != "task" and key not in _keys(section):
        raise ConfigError(f"{source}: {dotted}: unknown key {key!r}{nearest(key, _keys(section))}")
    return section, key


def from_file(path: Path) -> Settings:
    """Read a YAML file (see :mod:`distloop.yaml_file`).

    Raises:
        ConfigError: it cannot be read, or a section is unknown.
    """
    settings: Settings = {}
    for section, keys in read_sections(path).items():
        if not keys:
            check_section(section, str(path))
        for key, (value, line) in keys.items():
            settings[f"{section}.{key}"] = Setting(value, f"{path}:{line}")
    return settings


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """Read variables such as ``DISTLOOP_OPTIMIZER__LR=0.1``."""
    env = os.environ if environment is None else environment
    settings: Settings = {}
    for name, text in env.items():
        if name.startswith(PREFIX):
            if "__" not in name:
                raise ConfigError(
                    f"environment {name}: settings have two underscores between section and key, as in "
                    "DISTLOOP_OPTIMIZER__LR"
                )
            dotted = name[len(PREFIX) :].lower()
            dotted = dotted.replace("__", ".", 3 if dotted.startswith(f"{LEARNERS}__") else 1)
            settings[dotted] = Setting(parse_value(text, name), f"environment {name}")
    return settings


def from_arguments(arguments: Sequence[str]) -> Settings:
    """Read ``--section.key value`` and ``--section.key=value``.

    Raises:
        ConfigError: an argument is neither, or a key is given twice.
    """
    settings: Settings = {}
    waiting = list(arguments)
    while waiting:
        option = waiting.pop(0)
        name, equals, text = option.partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"command line: {option!r} is not expected here; settings look like --optimizer.lr 0.1")
        if not equals:
            if not waiting:
                raise ConfigError(f"command line: {name} has no value; settings look like --optimizer.lr 0.1")
            text = waiting.pop(0)
        parts = name[2:].split(".")
        named = 1 if parts[0] == LEARNERS else None  # a learner is called as its task calls it
        dotted = ".".join(part if i == named else part.replace("-", "_") for i, part in enumerate(parts))
        check_key(dotted, "command line")
        if dotted in settings:
            raise ConfigError(f"command line: --{dotted} is given twice")
        settings[dotted] = Setting(parse_value(text, name), f"command line --{dotted}")
    return settings


def from_mapping(sections: Mapping[str, Any], source: str = "argument") -> Settings:
    """Read what a Python caller passes as sections of keys."""
    settings: Settings = {}
    for section, keys in sections.items():
        if not isinstance(keys, Mapping):
            check_section(section, source)
            raise ConfigError(f"{source}: {section}: must be a mapping of keys, not {keys!r}")
        settings |= {f"{section}.{key}": Setting(_as_in_a_file(v), f"{source} {section}") for key, v in keys.items()}
    return settings


def _as_in_a_file(value: Any) -> Any:
    """Return what a file would say for a Python value: lists for tuples, text for paths."""
    if isinstance(value, tuple | list):
        return [_as_in_a_file(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _keys(section: str) -> list[str]:
    from distloop.config import Config

    model: Any = Config.model_fields[section].annotation
    return list(getattr(model, "model_fields", ()))  # the names of learners are the task's


def _first(section: str) -> str:
    return "NAME.optimizer.lr" if section == LEARNERS else _keys(section)[0]


def _sentences(failure: Any, merged: Settings) -> Iterator[str]:
    for error in failure.errors():
        dotted = ".".join(str(part) for part in error["loc"][:2])
        setting = merged.get(dotted)
        source = setting.source if setting else "default"
        shown = error["input"]
        yield f"{source}: {dotted}: {shown!r} is wrong: {_lower(error['msg'])}"


def _lower(message: str) -> str:
    return message.removeprefix("Input ")[:1].lower() + message.removeprefix("Input ")[1:]
