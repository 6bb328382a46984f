"""Where configuration comes from: defaults, a file, environment variables, the command line; each value knows which."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distloop.errors import ConfigError, nearest
from distloop.layers import LEARNERS, Setting, Settings, divide, learner_key
from distloop.resolved import Resolved
from distloop.values import LONGEST_KEY, brief, key_of, plain, shown
from distloop.yaml_file import parse_value, read_sections

if TYPE_CHECKING:
    from distloop.config import Config

PREFIX = "DISTLOOP_"
MOST_SENTENCES = 10  # in one error

__all__ = ["Resolved", "from_arguments", "from_environment", "from_file", "from_mapping", "resolve"]


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
    merged: Settings = {}
    heights: dict[str, int] = {}
    for height, layer in enumerate(layers):
        merged |= layer
        heights |= dict.fromkeys(layer, height)
    for layer in layers:  # what a higher layer overrules is wrong all the same where it is wrong
        hidden = {dotted: setting for dotted, setting in layer.items() if merged[dotted] is not setting}
        if hidden:
            _validated(hidden)
    config = _validated(merged, learners)
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    if micro is not None and micro > whole:
        source = merged["data.micro_batch_size"].source
        raise ConfigError(
            f"{source}: data.micro_batch_size: {micro} is more than data.global_batch_size, which is {whole}"
        )
    return _settled(Resolved(config, {dotted: setting.source for dotted, setting in merged.items()}, heights))


def _validated(settings: Settings, learners: Mapping[str, Any] | None = None) -> Config:
    """Return what settings come to, or refuse those whose keys or values are wrong."""
    from pydantic import ValidationError

    from distloop.config import Config

    sections: dict[str, dict[str, Any]] = {LEARNERS: dict(learners or {})}
    for dotted, setting in settings.items():
        section, key = check_key(dotted, setting.source)
        sections.setdefault(section, {})[key] = plain(setting.value, f"{setting.source}: {dotted}")
    try:
        return Config.model_validate(sections)
    except ValidationError as failure:
        said = list(_sentences(failure, settings))
        more = [f"and {len(said) - MOST_SENTENCES} more"] if len(said) > MOST_SENTENCES else []
        raise ConfigError("\n".join([*said[:MOST_SENTENCES], *more])) from None


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
    if len(section) > LONGEST_KEY:
        raise ConfigError(f"{source}: unknown section {brief(section)!r}")
    elsewhere = [f"{name}.{section}" for name in sections if section in _keys(name)]
    hint = f" (did you mean {' or '.join(elsewhere)}?)" if elsewhere else nearest(section, sections)
    raise ConfigError(f"{source}: {brief(dotted or section)}: unknown section {brief(section)!r}{hint}")


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
    elif section == "task":
        if not key_of(key, f"{source}: task").isidentifier():
            raise ConfigError(f"{source}: task.{brief(key)}: {shown(key)} cannot be the name of a task's argument")
    elif key not in _keys(section):
        hint = nearest(key[:LONGEST_KEY], _keys(section))
        raise ConfigError(f"{source}: {section}.{brief(key)}: unknown key {brief(key)!r}{hint}")
    return section, key


def from_file(path: Path) -> Settings:
    """Read a YAML file (see :mod:`distloop.yaml_file`).

    Raises:
        ConfigError: it cannot be read, or a section is unknown.
    """
    settings: Settings = {}
    for section, keys in read_sections(path).items():
        if not keys:
            check_section(section, brief(str(path)))
        for key, (value, line) in keys.items():
            check_section(section, f"{brief(str(path))}:{line}", f"{section}.{key}")
            settings[f"{section}.{key}"] = Setting(value, f"{brief(str(path))}:{line}")
    return settings


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """Read variables such as ``DISTLOOP_OPTIMIZER__LR=0.1``."""
    env = os.environ if environment is None else environment
    settings: Settings = {}
    for name, text in env.items():
        if name.upper().startswith(PREFIX):
            source = f"environment {brief(name)}"
            if not name.startswith(PREFIX):
                raise ConfigError(f"{source}: settings are in capitals, as in DISTLOOP_OPTIMIZER__LR")
            if "__" not in name:
                raise ConfigError(
                    f"{source}: settings have two underscores between section and key, as in DISTLOOP_OPTIMIZER__LR"
                )
            dotted = name[len(PREFIX) :].lower()
            dotted = dotted.replace("__", ".", 3 if dotted.startswith(f"{LEARNERS}__") else 1)
            check_key(dotted, source)
            if dotted in settings:
                raise ConfigError(f"{source}: {dotted} is given twice, by {settings[dotted].source} too")
            settings[dotted] = Setting(parse_value(text, f"{source}: {dotted}"), source)
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
            raise ConfigError(
                f"command line: {shown(option)} is not expected here; settings look like --optimizer.lr 0.1"
            )
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"command line: {brief(name)} has no value; settings look like --optimizer.lr 0.1")
            text = waiting.pop(0)
        parts = name[2:].split(".")
        named = 1 if parts[0] == LEARNERS else None  # a learner is called as its task calls it
        dotted = ".".join(part if i == named else part.replace("-", "_") for i, part in enumerate(parts))
        check_key(dotted, "command line")
        if dotted in settings:
            raise ConfigError(f"command line: --{dotted} is given twice")
        settings[dotted] = Setting(parse_value(text, f"command line --{dotted}"), f"command line --{dotted}")
    return settings


def from_mapping(sections: Mapping[str, Any], source: str = "argument") -> Settings:
    """Read what a Python caller passes as sections of keys."""
    settings: Settings = {}
    for section, keys in sections.items():
        name = str(section)
        if not isinstance(keys, Mapping):
            check_section(name, source)
            raise ConfigError(f"{source}: {name}: must be a mapping of keys, not {shown(keys)}")
        for key, value in keys.items():
            if not isinstance(key, str):
                raise ConfigError(f"{source} {name}: {shown(key)}: a key must be text")
            check_section(name, source, f"{name}.{key}")
            settings[f"{name}.{key_of(key, f'{source} {name}')}"] = Setting(value, f"{source} {name}")
    return settings


def _keys(section: str) -> list[str]:
    from distloop.config import Config

    model: Any = Config.model_fields[section].annotation
    return list(getattr(model, "model_fields", ()))  # the names of learners are the task's


def _first(section: str) -> str:
    return "NAME.optimizer.lr" if section == LEARNERS else _keys(section)[0]


def _sentences(failure: Any, merged: Settings) -> Iterator[str]:
    said = set()
    for error in failure.errors():
        dotted = ".".join(str(part) for part in error["loc"][:2])
        if dotted in said:  # one wrong item of a list tells enough
            continue
        said.add(dotted)
        setting = merged.get(dotted)
        source = setting.source if setting else "default"
        yield f"{source}: {dotted}: {shown(error['input'])} is wrong: {_lower(error['msg'])}"


def _lower(message: str) -> str:
    text = message.removeprefix("Input ").removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
