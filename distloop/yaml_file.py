"""Reading a configuration file: YAML 1.2, nothing that runs or swells, and the line of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distloop.errors import ConfigError, nearest

LARGEST_FILE = 2**20
DEEPEST = 20

Sections = dict[str, dict[str, tuple[Any, int]]]  # value and line by section and key


def read_sections(path: Path) -> Sections:
    """Read sections of keys. 1e-3 is a number, ``no`` and 12:30 are words, a key may stand once.

    Raises:
        ConfigError: the file is missing, too large, not YAML, or something else than sections of keys.
    """
    document = _load(path, _text(path))
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must hold sections of keys, not a {type(document).__name__}")
    sections: Sections = {}
    for name, keys in document.items():
        if not isinstance(keys, dict | None):
            line = _line(document, name)
            raise ConfigError(f"{path}:{line}: {name}: must be a section with keys below it, not {_plain(keys)!r}")
        sections[str(name)] = {str(key): (_plain(value), _line(keys, key)) for key, value in (keys or {}).items()}
    return sections


def parse_value(text: str, source: str) -> Any:
    """Return the value that ``text`` would have in a file; ``source`` names it in an error."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        raise ConfigError(f"{source}: the value {text!r} is not valid YAML; quote it") from None


def _text(path: Path) -> str:
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: there is no such file{nearest(path.name, beside)}")
    if path.stat().st_size > LARGEST_FILE:
        raise ConfigError(f"{path}: is larger than {LARGEST_FILE // 2**20} MiB, which no configuration is")
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as failure:
        raise ConfigError(f"{path}: cannot be read as text: {failure}") from None


def _load(path: Path, text: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        _refuse_dangerous(path, text)
        return YAML(typ="rt", pure=True).load(text)  # the round-trip loader knows lines, and builds no objects
    except MarkedYAMLError as failure:
        mark = failure.problem_mark
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: {str(failure.problem or 'is not valid YAML').strip()}") from None
    except (YAMLError, ValueError, RecursionError) as failure:
        raise ConfigError(f"{path}: cannot be read as YAML: {str(failure).strip().splitlines()[0]}") from None


def _refuse_dangerous(path: Path, text: str) -> None:
    """Refuse aliases, tags and deep nesting before a document is built: a few lines can stand for gigabytes."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

    depth = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        what = None
        if isinstance(event, AliasEvent):
            what = "an alias (*name)"
        elif getattr(event, "tag", None):
            what = f"a tag ({event.tag})"
        elif depth > DEEPEST:
            what = f"nesting deeper than {DEEPEST} levels"
        if what is not None:
            raise ConfigError(f"{path}:{event.start_mark.line + 1}: {what} is not allowed in a configuration")


def _line(mapping: Any, key: Any) -> int:
    return int(mapping.lc.key(key)[0]) + 1


def _plain(value: Any) -> Any:
    """Strip the round-trip loader's own types, which remember comments and spelling."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
