"""Which launcher started this process, and what tells so."""

from __future__ import annotations

import os

from distloop.errors import DistloopError
from distloop.world import LAUNCHERS, World


def found() -> str:
    """Return the launcher and this process's place, or what is wrong with its variables."""
    try:
        world = World.from_environment()
    except DistloopError as failure:
        return f"unclear: {failure}"
    if world.launcher == "none":
        return "none: one rank"
    return f"{world.launcher}: rank {world.rank} of {world.size}, {world.local_rank} of {world.local_size} on this host"


def why() -> str:
    """Return the variables that tell of launchers, the one that counts first."""
    told = [launcher for launcher in LAUNCHERS if launcher.marker in os.environ]
    if not told:
        return f"none of {', '.join(launcher.marker for launcher in LAUNCHERS)} is set"
    first, *others = [f"{launcher.marker} is set by {launcher.name}" for launcher in told]
    return first + (f"; comes before: {', '.join(others)}" if others else "")
