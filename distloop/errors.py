"""Errors that a user can cause or must act on: one sentence each, with the process's exit code.

The exit codes are part of the interface: a job script may branch on them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # 128 + SIGINT
TERMINATED = 143  # 128 + SIGTERM
REQUEUE = 75  # EX_TEMPFAIL: checkpointed, to be started again


class DistloopError(Exception):
    """Base of every error that is reported as one sentence instead of a traceback.

    ``everywhere`` says that all ranks find the same, so that one of them need say it.
    """

    exit_code = 1

    def __init__(self, message: str, *, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


@contextmanager
def found_by_all() -> Iterator[None]:
    """Mark errors raised inside as found by all ranks alike: they come from what every rank is given."""
    try:
        yield
    except DistloopError as failure:
        failure.everywhere = True
        raise


class ConfigError(DistloopError):
    """The configuration, the command line or the user's task is wrong."""

    exit_code = 2


class WorldError(DistloopError):
    """The environment (ranks, devices, backends, network) is not what was asked for."""

    exit_code = 3


class DataError(DistloopError):
    """A data set is empty, missing or cannot be read."""

    exit_code = 4


class RankDiedError(DistloopError):
    """Another rank of this run is gone."""

    exit_code = 10


class RankHungError(DistloopError):
    """Another rank of this run has not been heard from for longer than the timeout."""

    exit_code = 11


class MismatchError(DistloopError):
    """Ranks disagree about the model or about a collective."""

    exit_code = 12


class NonFiniteError(DistloopError):
    """The loss became NaN, infinite, or exploded."""

    exit_code = 13


class CheckpointError(DistloopError):
    """A checkpoint is damaged, or what should go into one cannot."""

    exit_code = 20


class NoCheckpointError(CheckpointError):
    """There are checkpoints, and none of them is valid."""


class StorageError(DistloopError):
    """The run directory or a file in it cannot be written."""

    exit_code = 21


class BusyError(DistloopError):
    """Another job works in this run directory."""

    exit_code = 22


def by_exit_code(code: int) -> type[DistloopError]:
    """Return the kind of error that ends with this exit code: another rank has said which it met."""
    kinds = {kind.exit_code: kind for kind in DistloopError.__subclasses__()}
    return kinds.get(code, DistloopError)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known name, or all names if none is close."""
    names = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(sorted(names))})" if names else ""
