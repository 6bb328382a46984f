"""The control groups that a process is in, of both versions: what limits a job is written there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OWN, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A control group's folder, and whether it is of the first version."""

    folder: Path
    first_version: bool


def groups_of(controller: str, own: Path = OWN, mounted: Path = MOUNTED) -> list[Group]:
    """Return this process's group and those around it, the innermost first, that a controller may have limits of.

    All of them hold. None where the system has no such groups.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    groups: list[Group] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controller if controllers else mounted
        inner = top / path.lstrip("/")
        # A container may see its own group as the top one, and still be told its path outside.
        folders = [inner, *inner.parents][: len(inner.relative_to(top).parts) + 1]
        groups += [Group(folder, bool(controllers)) for folder in folders]
    return groups
