"""What a configuration says otherwise than that of the checkpoint a run goes on from, and what counts then."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from distloop.errors import ConfigError
from distloop.settings import Resolved

# What the state in a checkpoint depends on: with another value it would mean something else.
IMMUTABLE = {
    "data.global_batch_size",
    "data.shuffle",
    "optimizer.name",
    "optimizer.options",
    "train.seed",
    "train.deterministic",
    "train.leaves",
}
# What decides how the same is computed, and where; the result is the same but for rounding.
ELASTIC = ("strategy.", "world.", "data.micro_batch_size", "data.workers", "data.prefetch", "data.pin_memory")
SILENT = ("log.", "checkpoint.", "data.worker_timeout")


def values_of(resolved: Resolved) -> dict[str, Any]:
    """Return every value by its dotted key, in JSON's types."""
    return {dotted: json.loads(json.dumps(value, default=str)) for dotted, value, _ in resolved.rows()}


def compare(resolved: Resolved, known: Mapping[str, Any], where: object) -> list[str]:
    """Return in words what has changed since a checkpoint whose values are ``known``; the new values count.

    Raises:
        ConfigError: something has changed that may not.
    """
    own = values_of(resolved)
    changed = {key: (known.get(key), own.get(key)) for key in sorted({*known, *own}) if known.get(key) != own.get(key)}
    refused = [
        f"{resolved.source(key)}: {key}: was {_shown(was)} and is {_shown(now)}"
        for key, (was, now) in changed.items()
        if key in IMMUTABLE or key.startswith("task.") or key.endswith((".optimizer.name", ".optimizer.options"))
    ]
    if refused:
        raise ConfigError(
            "\n".join([*refused, f"{where}: the checkpoint does not fit this: set it back, or begin another run"])
        )
    return list(_words(changed))


def _words(changed: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    for key, (was, now) in changed.items():
        if not key.startswith(SILENT):
            what = "how it is computed" if key.startswith(ELASTIC) else "the new value counts"
            yield f"{key} was {_shown(was)}, is {_shown(now)} ({what})"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
