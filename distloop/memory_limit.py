"""Whether the kernel has killed a process for the memory limit of this job (cgroups, first and second version)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distloop.control_groups import MOUNTED, OWN, groups_of

UNLIMITED = 2**60  # bytes; version 1 says so by a number near 2**63


@dataclass(frozen=True)
class _Group:
    events: Path
    limit: Path


class MemoryLimit:
    """Counts the kills from now on, in the control groups that this process is in."""

    def __init__(self, proc: Path = OWN, mounted: Path = MOUNTED):
        self._groups = _groups(proc, mounted)
        self._before = [_kills(group) for group in self._groups]

    def has_killed(self) -> str | None:
        """Return in words which limit has killed a process since this began; None if none has."""
        for group, before in zip(self._groups, self._before, strict=True):
            if _kills(group) > before:
                limit = min((_limit(group) for group in self._groups), default=UNLIMITED)
                return (
                    f"the memory limit of {limit / 2**20:.0f} MiB" if limit < UNLIMITED else "the kernel, out of memory"
                )
        return None


def memory_bound(proc: Path = OWN, mounted: Path = MOUNTED) -> int | None:
    """Return the bytes that this job may use; None without a limit."""
    least = min((_limit(group) for group in _groups(proc, mounted)), default=UNLIMITED)
    return least if least < UNLIMITED else None


def _groups(proc: Path, mounted: Path) -> list[_Group]:
    groups = []
    for group in groups_of("memory", proc, mounted):
        first = ("memory.oom_control", "memory.limit_in_bytes")
        events, limit = first if group.first_version else ("memory.events", "memory.max")
        groups.append(_Group(group.folder / events, group.folder / limit))
    return [group for group in groups if group.events.exists()]


def _kills(group: _Group) -> int:
    try:
        rows = [line.split() for line in group.events.read_text().splitlines()]
        return next((int(row[1]) for row in rows if row[0] == "oom_kill"), 0)
    except (OSError, ValueError, IndexError):
        return 0


def _limit(group: _Group) -> int:
    try:
        return int(group.limit.read_text())
    except (OSError, ValueError):  # "max"
        return UNLIMITED
