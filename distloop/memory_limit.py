"""Whether the kernel has killed a process for the memory limit of this job (cgroups, first and second version)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 2**60  # bytes; version 1 says so by a number near 2**63


@dataclass(frozen=True)
class _Group:
    events: Path
    limit: Path


class MemoryLimit:
    """Counts the kills from now on, in the control groups that this process is in."""

    def __init__(self, proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")):
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


def memory_bound(proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the bytes that this job may use; None without a limit."""
    least = min((_limit(group) for group in _groups(proc, mounted)), default=UNLIMITED)
    return least if least < UNLIMITED else None


def _groups(proc: Path, mounted: Path) -> list[_Group]:
    """Return this process's group and those around it, the innermost first."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    groups: list[_Group] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            top, events, limit = mounted / "memory", "memory.oom_control", "memory.limit_in_bytes"
        elif controllers == "":
            top, events, limit = mounted, "memory.events", "memory.max"
        else:
            continue
        inner = top / path.lstrip("/")
        # A container may see its own group as the top one, and still be told its path outside.
        folders = [inner, *inner.parents][: len(inner.relative_to(top).parts) + 1]
        groups += [_Group(f / events, f / limit) for f in folders if (f / events).exists()]
    return groups


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
