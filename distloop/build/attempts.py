"""The attempts of a run, as ``run.json`` has them: a launcher that restarts its ranks goes on with what they began."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distloop.config import Config
from distloop.errors import StorageError
from distloop.world import World

RUN = "run.json"


@dataclass
class _Runs:
    """How many runs this process has begun: a script may train several, one after the other."""

    begun: int = 0


_runs = _Runs()


def begin() -> None:
    """Take note that this process begins another run; rank 0 alone asks which."""
    _runs.begun += 1


def note(path: Path, known: Mapping[str, Any], run_id: str, token: str, step: int | None, world: World) -> None:
    """Write down in ``run.json`` that an attempt begins, at ``step`` if it goes on from a checkpoint.

    Raises:
        StorageError: it cannot be written.
    """
    attempt = {
        "token": token,
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "ranks": world.size,
        "launch": _launch(world),
        "resumed_step": step,
    }
    created = known.get("created") or attempt["begun"]
    values = {"run_id": run_id, "created": created, "attempts": [*known.get("attempts", []), attempt]}
    partial = path / f".{RUN}.partial"
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n")
        partial.replace(path / RUN)
    except OSError as failure:
        raise StorageError(f"{path / RUN}: cannot be written: {failure.strerror}") from failure


def known_of(path: Path) -> dict[str, Any]:
    """Return what is known of a run's attempts; nothing, if the file says nothing that can be understood."""
    try:
        known = json.loads((path / RUN).read_text())
    except OSError as failure:
        if failure.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise StorageError(f"{path / RUN}: cannot be read: {failure.strerror}") from failure
        return {}
    except ValueError:
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("attempts", []), list) else {}


def earlier(config: Config, world: World) -> Path | None:
    """Return the directory in which this very launch has run before, if a launcher restarts its ranks."""
    launch = _launch(world)
    if launch is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    name = Path(config.log.name) if config.log.name else Path("*")
    places = Path(config.log.directory, name.parent).glob(f"{name.name}*/{RUN}")
    for path in sorted(places, key=lambda place: place.stat().st_mtime, reverse=True):
        attempts = known_of(path.parent).get("attempts", [])
        if any(isinstance(attempt, dict) and attempt.get("launch") == launch for attempt in attempts):
            return path.parent
    return None


def _launch(world: World) -> str | None:
    """Return what tells one launch of torchrun from others: its process, as long as it lives."""
    if world.launcher != "torchrun" or _runs.begun == 0:
        return None
    agent = os.getppid()
    try:
        begun = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        begun = ""
    own = f"{agent}/{begun}/{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    return f"{socket.gethostname()}/{own}/{_runs.begun}"
