"""What checkpoints, their files and their tensors may be called. No name that was read leads out of its directory."""

from __future__ import annotations

import re

from distloop.errors import CheckpointError

MANIFEST, COMMIT, STATE = "MANIFEST.json", "COMMIT", "state.json"
SUFFIX = ".safetensors"
STEP = re.compile(r"step-([0-9]{8,18})")
TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")
FILE = re.compile(r"[a-z0-9][a-z0-9._-]{0,119}")
CUT = re.compile(r"(.+)\[([0-9]{1,19}):([0-9]{1,19})\]", re.DOTALL)
PART = re.compile(r"part-([0-9]{5,9})\.(json|failed)")
LONGEST = 1024  # characters of a tensor's name


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's directory, or None if it is none's."""
    found = STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def is_file(name: object) -> bool:
    """Return whether this may be the name of a file of a checkpoint, apart from those that every checkpoint has."""
    return (
        isinstance(name, str)
        and FILE.fullmatch(name) is not None
        and ".." not in name
        and not name.startswith("part-")
        and name not in (STATE, MANIFEST.lower(), COMMIT.lower())
    )


def check_file(name: str) -> None:
    if not is_file(name):
        raise CheckpointError(f"{name!r} is no name for a checkpoint's file: a-z, 0-9, dot, underscore, hyphen")


def is_tensor(name: object) -> bool:
    """Return whether a tensor may be called this; what looks like a cut is not a name."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= LONGEST
        and name.isprintable()
        and name != "__metadata__"
        and CUT.fullmatch(name) is None
    )


def cut_key(name: str, start: int, stop: int) -> str:
    """Return what elements ``start`` to ``stop`` of a tensor are called in a file."""
    return f"{name}[{start}:{stop}]"


def claims_to_be_data(name: str) -> bool:
    """Return whether a file that no manifest lists would be taken for a part of the checkpoint."""
    return name.endswith((SUFFIX, ".json")) or PART.fullmatch(name) is not None
