"""JSON that round-trips, and that no input can make expensive.

JSON has no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf". A string that is one of these,
or that begins with an apostrophe, gets an apostrophe before it; reading takes it away again. Tuples become lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from distloop.errors import CheckpointError

LARGEST = 2**24  # bytes of a JSON file
DEEPEST = 50  # levels
NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any, what: str) -> bytes:
    """Return ``value`` as JSON.

    Args:
        value: None, bool, int, float, str, and lists, tuples and mappings by strings of these.
        what: names it in errors.

    Raises:
        CheckpointError: JSON does not hold it; says where in it.
    """
    try:
        data = json.dumps(_escaped(value, what, 0), allow_nan=False).encode()
    except ValueError as failure:
        raise CheckpointError(f"{what}: cannot be written as JSON: {failure}") from failure
    if len(data) > LARGEST:
        raise CheckpointError(
            f"{what}: takes {len(data)} bytes as JSON; at most {LARGEST}: what is large goes into tensors"
        )
    return data


def decode(data: bytes) -> Any:
    """Return what :func:`encode` was given.

    Raises:
        ValueError: it did not come from there.
    """
    return _unescaped(loads(data))


def loads(data: bytes) -> Any:
    """Return JSON as it is: no name twice in an object, no NaN, not too deep.

    Raises:
        ValueError: the first thing that is wrong with it.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant)
        _limit(value, 0)
    except RecursionError:
        raise ValueError(f"is nested deeper than {DEEPEST} levels") from None
    except UnicodeDecodeError as failure:
        raise ValueError(f"is not text: {failure.reason} at byte {failure.start}") from None
    except json.JSONDecodeError as failure:
        raise ValueError(f"is not JSON: {failure.msg} at character {failure.pos}") from None
    return value


def _escaped(value: Any, where: str, depth: int) -> Any:
    if depth > DEEPEST:
        raise CheckpointError(f"{where}: is nested deeper than {DEEPEST} levels")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, str):
        return "'" + value if value in NUMBERS or value.startswith("'") else value
    if isinstance(value, list | tuple):
        return [_escaped(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: key {key!r} is a {type(key).__name__}; JSON has strings")
        return {key: _escaped(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    raise CheckpointError(f"{where}: is a {type(value).__name__}, which JSON does not hold")


def _unescaped(value: Any) -> Any:
    if isinstance(value, str):
        return NUMBERS[value] if value in NUMBERS else value.removeprefix("'")
    if isinstance(value, list | dict):  # in place: a copy of what may be large is not needed
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _unescaped(item)
    return value


def _limit(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"is nested deeper than {DEEPEST} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("holds a number that is too large")
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _limit(item, depth + 1)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"has {twice[:80]!r} twice in one object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which JSON does not have")
