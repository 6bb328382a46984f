"""Which launcher started this process, and what tells so."""

from __future__ import annotations

from distloop.errors import DistloopError
from distloop.world import World


def found() -> str:
    """Return the launcher and this process's place, or what is wrong with its variables."""
    try:
        world = World.from_environment()
    except DistloopError as failure:
        return f"unclear: {failure}"
    if world.launcher == "none":
        return "none: one rank"
    told = f"{world.launcher}: rank {world.rank} of {world.size}"
    if not world.host_known:
        return f"{told}, it does not say which of them share a host"
    return f"{told}, {world.local_rank} of {world.local_size} on this host"


def why() -> str:
    """Return what tells so."""
    try:
        return World.from_environment().because
    except DistloopError:
        return "the variables contradict each other, or some are missing"
