"""Reading a configuration file: YAML 1.2, nothing that runs or swells, and the line of every key.

Values are made here from the parser's events, and of few kinds: no tags, no aliases, no merge keys, no dates. So a file
means what it says, a key stands once, and reading takes a time that its length bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distloop.errors import ConfigError, nearest
from distloop.values import DEEPEST, LARGEST_BITS, MOST, brief, key_of, shown, strange

LARGEST_FILE = 2**18  # bytes; what it takes a second to read

Sections = dict[str, dict[str, tuple[Any, int]]]  # value and line by section and key


def read_sections(path: Path) -> Sections:
    """Read sections of keys. 1e-3 is a number, ``no`` and 12:30 are words, a key may stand once.

    Raises:
        ConfigError: the file is missing, too large, not YAML, or something else than sections of keys.
    """
    name = brief(str(path))
    document = _Document(_text(path), lambda line: f"{name}:{line}")
    value = document.value
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: must hold sections of keys, not {_kind(value)}")
    sections: Sections = {}
    for section, keys in value.items():
        line = document.lines[section,]
        if not isinstance(keys, dict | None):
            raise ConfigError(
                f"{name}:{line}: {brief(section)}: must be a section with keys below it, not {shown(keys)}"
            )
        key_of(section.replace(".", "_"), f"{name}:{line}")  # one with a dot is unknown, which says more
        sections[section] = {}
        for key, inner in (keys or {}).items():
            line = document.lines[section, key]
            sections[section][key_of(key, f"{name}:{line}")] = (inner, line)
    return sections


def parse_value(text: str, source: str) -> Any:
    """Return the value that ``text`` would have in a file; ``source`` names it in an error.

    Raises:
        ConfigError: there is nothing in it, or it is no value of one.
    """
    if not text.strip():
        raise ConfigError(f"{source}: has no value; null says that there is none, and '\"\"' is an empty text")
    if len(text.encode(errors="replace")) > LARGEST_FILE:
        raise ConfigError(f"{source}: is longer than {LARGEST_FILE // 2**10} KiB, which no value is")
    document = _Document(text, lambda line: source, hint=f"the value {shown(text)} is not valid YAML; quote it")
    if document.value is None and text.strip() not in ("null", "Null", "NULL", "~"):
        raise ConfigError(f"{source}: {shown(text)} holds no value; null says that there is none")
    if document.end < len(text.rstrip()):
        raise ConfigError(f"{source}: {shown(text)} has a comment in it, from the # on; quote it")
    return document.value


def _text(path: Path) -> str:
    name = brief(str(path))
    try:
        if not path.is_file():
            beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise ConfigError(f"{name}: there is no such file{nearest(path.name, beside[:50])}")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise ConfigError(f"{name}: is larger than {LARGEST_FILE // 2**10} KiB, which no configuration is")
        return data.decode("utf-8")
    except (OSError, ValueError) as failure:
        raise ConfigError(f"{name}: cannot be read as text: {brief(_reason(failure))}") from None


def _reason(failure: Exception) -> str:
    return getattr(failure, "strerror", None) or str(failure)


def _dotted(path: tuple[str, ...]) -> str:
    return f"{brief('.'.join(path[:2]))}: " if path else ""


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"only {shown(value)}"


class _Document:
    """The one value of a YAML text, and the lines in which the keys of its first two levels stand."""

    def __init__(self, text: str, where: Callable[[int], str], hint: str | None = None):
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        self.lines: dict[tuple[str, ...], int] = {}
        self.end = 0  # the place in the text where its value ends
        self._where, self._count = where, 0
        self._yaml: Any = YAML(typ="safe", pure=True)
        try:
            self._events: Iterator[Any] = self._yaml.parse(text)
            self.value = self._whole()
        except ConfigError:
            raise
        except MarkedYAMLError as failure:
            mark = failure.problem_mark
            problem = brief(str(failure.problem or "is not valid YAML").strip())
            raise ConfigError(f"{where(1 if mark is None else mark.line + 1)}: {hint or problem}") from None
        except (YAMLError, ValueError) as failure:
            first = brief(str(failure).strip().partition("\n")[0])
            raise ConfigError(f"{where(1)}: {hint or f'cannot be read as YAML: {first}'}") from None

    def _next(self) -> Any:
        event = next(self._events)
        what = None
        if type(event).__name__ == "AliasEvent":
            what = "an alias (*name)"
        elif getattr(event, "tag", None):
            what = f"a tag ({brief(str(event.tag))})"
        elif getattr(event, "version", None) or getattr(event, "tags", None):
            what = "a directive (%)"
        if what is not None:
            raise self._error(event, f"{what} is not allowed in a configuration")
        return event

    def _whole(self) -> Any:
        self._next()  # the stream begins
        event, value = self._next(), None
        while type(event).__name__ == "DocumentStartEvent":
            value = self._value(self._next(), ())
            self._next()
            event = self._next()
            if type(event).__name__ == "DocumentStartEvent":
                raise self._error(event, "expected a single document, but found another one")
        return value

    def _value(self, event: Any, path: tuple[str, ...]) -> Any:
        self._count += 1
        if self._count > MOST:
            raise self._error(event, f"more than {MOST} values, which no configuration has")
        if len(path) > DEEPEST:
            raise self._error(event, f"nesting deeper than {DEEPEST} levels is not allowed in a configuration")
        kind = type(event).__name__
        if kind == "ScalarEvent":
            value: Any = self._scalar(event, path)
        elif kind == "SequenceStartEvent":
            value = []
            while type(event := self._next()).__name__ != "SequenceEndEvent":
                value.append(self._value(event, (*path, "")))
        else:
            value = {}
            while type(event := self._next()).__name__ != "MappingEndEvent":
                key = self._key(event, value, path)
                value[key] = self._value(self._next(), (*path, key))
        self.end = event.end_mark.index
        return value

    def _key(self, event: Any, known: dict[str, Any], path: tuple[str, ...]) -> str:
        """Return a key as it is written: ``true`` is a word there."""
        if type(event).__name__ != "ScalarEvent":
            raise self._error(event, "a list or mapping is no key")
        key = self._plain_text(event)
        if key == "<<" and event.implicit[0]:
            raise self._error(event, "a merge key (<<) is not allowed in a configuration")
        if key in known:
            first = self.lines.get((*path, key))
            raise self._error(event, f'found duplicate key "{brief(key)}"' + (f", as in line {first}" if first else ""))
        if len(path) < 2:
            self.lines[*path, key] = event.start_mark.line + 1
        return key

    def _scalar(self, event: Any, path: tuple[str, ...]) -> Any:
        from ruamel.yaml.nodes import ScalarNode

        tag = str(self._yaml.resolver.resolve(ScalarNode, event.value, event.implicit))
        kind = tag.rpartition(":")[2]
        if kind == "null":
            return None
        if kind not in ("bool", "int", "float"):  # a date is text
            return self._plain_text(event, path)
        node = ScalarNode(tag, event.value, event.start_mark, event.end_mark)
        value = getattr(self._yaml.constructor, f"construct_yaml_{kind}")(node)
        if kind == "int" and value.bit_length() > LARGEST_BITS:
            raise self._error(event, f"{_dotted(path)}{shown(value)} is too large")
        return value

    def _plain_text(self, event: Any, path: tuple[str, ...] = ()) -> str:
        text = str(event.value)
        if (character := strange(text)) is not None:
            raise self._error(event, f"{_dotted(path)}{shown(text)} has {character}, which is no text")
        return text

    def _error(self, event: Any, message: str) -> ConfigError:
        return ConfigError(f"{self._where(event.start_mark.line + 1)}: {message}")
