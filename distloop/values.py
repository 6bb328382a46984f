"""Values of settings, whoever gives them: of which kinds they are, how large, and how an error shows them."""

from __future__ import annotations

import os
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from distloop.errors import ConfigError

DEEPEST = 20  # levels of lists and mappings in each other
MOST = 5_000  # values in a file, or in one setting
LONGEST_KEY = 100
LARGEST_BITS = 1000  # of a whole number; what is less can be a float too
SHOWN = 100  # characters of a value in an error


class _Short(reprlib.Repr):
    """Shows the beginning of anything, in a line that can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = SHOWN
        self.maxlist = self.maxtuple = self.maxdict = 4
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        digits = value.bit_length() * 3 // 10
        return repr(value) if digits < 40 else f"a whole number of some {digits} digits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """Return a value for an error, in one line of bounded length whatever it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 3 * SHOWN else f"{text[: 3 * SHOWN]}..."


def brief(text: str) -> str:
    """Return a text such as a path as it is, or its ends where it is long."""
    line = text if text.isprintable() else repr(text)[1:-1]
    return line if len(line) <= 3 * SHOWN else f"{line[:SHOWN]} ... {line[-SHOWN:]}"


def strange(text: str) -> str | None:
    """Return in words what in a text has no place in settings: files, terminals and other programs trip over it."""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            return f"the character U+{ord(character):04X}"
    return None


def key_of(key: str, where: str) -> str:
    """Return a key that a setting's dotted name can be made of, or refuse it."""
    if len(key) > LONGEST_KEY:
        raise ConfigError(f"{where}: {brief(key)}: a key of {len(key)} characters; the longest has {LONGEST_KEY}")
    if "." in key:
        raise ConfigError(f"{where}: {brief(key)!r}: a key has no dot here; write what is below it as its mapping")
    if (character := strange(key)) is not None:
        raise ConfigError(f"{where}: {brief(key)}: has {character} in a key")
    return key


def plain(value: Any, where: str) -> Any:
    """Return what a file would say for a Python value: lists for tuples, text for paths, plain numbers.

    Raises:
        ConfigError: it is none of those, or larger than any configuration; ``where`` says whose it is.
    """
    return _Plain(where).of(value, 0)


class _Plain:
    def __init__(self, where: str):
        self._where, self._count = where, 0

    def of(self, value: Any, depth: int) -> Any:
        self._count += 1
        if self._count > MOST:
            raise self._error(f"has more than {MOST} values in it")
        if depth > DEEPEST:
            raise self._error(f"nesting deeper than {DEEPEST} levels")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if value.bit_length() > LARGEST_BITS:
                raise self._error(f"{shown(int(value))} is too large")
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            return self._text(str(value))
        if isinstance(value, tuple | list):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return self._mapping(value, depth)
        raise self._error(f"a {type(value).__name__} is no number, text, list or mapping of such")

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise self._error(f"{shown(key)}: a key must be text")
            found[self._text(str(key))] = self.of(item, depth + 1)
        return found

    def _text(self, text: str) -> str:
        if (character := strange(text)) is not None:
            raise self._error(f"{shown(text)} has {character}, which is no text")
        return text

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"{self._where}: {message}")
