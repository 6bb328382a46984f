"""Checkpoints written beside the training: one in flight, and what went wrong with it is known at a later step."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distloop.checkpoints import Checkpoints, Draft, Stored
from distloop.errors import CheckpointError, DistloopError, StorageError

MODEL = "model.safetensors"
PATIENCE = 600.0  # seconds for which rank 0 waits for the others' parts


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the ``last`` so many, those of every ``every``-th step, and that of the best model."""

    last: int = 3
    every: int | None = None


@dataclass
class Contents:
    """What a rank puts into a checkpoint; it is no longer used by anyone else."""

    files: dict[str, list[Stored]]
    own: Any = None  # JSON of this rank's
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)  # by file
    links: dict[str, Path] = field(default_factory=dict)  # finished files, which are removed afterwards
    state: Mapping[str, Any] = field(default_factory=dict)  # on rank 0
    facts: Mapping[str, Any] = field(default_factory=dict)  # on rank 0
    best: int | None = None  # the step of the best model
    trained: set[str] = field(default_factory=set)  # names of the model's file that must be finite


@dataclass(frozen=True)
class Saved:
    """How a save has ended."""

    step: int
    seconds: float
    nbytes: int = 0
    failure: str | None = None


class Saver:
    """Writes a rank's part of checkpoints; on rank 0 it also commits them and deletes those that are not kept.

    No rank talks to another for it: parts are handed over in the directory.

    Args:
        checkpoints: of the run.
        rank, ranks: this one, and how many write.
        token: tells the attempts of a run apart, the same on all ranks.
        keep: which stay.
        background: whether to write in a thread of its own.
        reading: the step of the checkpoint that this attempt began with, which stays too.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        *,
        rank: int,
        ranks: int,
        token: str,
        keep: Keep,
        background: bool = True,
        reading: int | None = None,
    ):
        self._checkpoints, self._rank, self._ranks, self._token = checkpoints, rank, ranks, token
        self._keep, self._background, self._reading = keep, background, reading
        self._thread: threading.Thread | None = None
        self._ended: list[Saved] = []
        self._closing = False

    def miss(self, step: int, failure: str) -> None:
        """Take note that something else of a checkpoint could not be kept."""
        self._ended.append(Saved(step, 0.0, failure=failure))

    def save(self, step: int, contents: Contents) -> None:
        """Begin to write, after what is still being written."""
        self.drain()
        if not self._background:
            self._write(step, contents)
            return
        self._thread = threading.Thread(target=self._write, args=(step, contents), name="checkpoint", daemon=True)
        self._thread.start()

    def drain(self, seconds: float | None = None) -> None:
        """Return when nothing is being written, after so many seconds at the latest."""
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def take(self) -> list[Saved]:
        """Return how the saves have ended that nobody was told of; only rank 0 knows."""
        ended, self._ended = self._ended, []
        return ended

    def close(self, seconds: float | None = None) -> None:
        """Write no more, and wait no longer for parts of ranks that may be gone."""
        self._closing = True
        self.drain(seconds)

    def _write(self, step: int, contents: Contents) -> None:
        begun = time.monotonic()
        failure, nbytes = None, 0
        try:
            nbytes = self._write_part(step, contents, begun)
        except DistloopError as error:
            failure = str(error)
        except OSError as error:
            failure = str(StorageError(f"{error.filename or 'checkpoint'}: {error.strerror}"))
        except Exception as error:  # a thread's own; it must not be lost
            failure = f"{type(error).__name__}: {error}"
        finally:
            for pinned in contents.links.values():
                pinned.unlink(missing_ok=True)
        if self._rank == 0:
            self._ended.append(Saved(step, time.monotonic() - begun, nbytes, failure))

    def _write_part(self, step: int, contents: Contents, begun: float) -> int:
        draft = self._checkpoints.draft(step, self._token)
        try:
            for stored in contents.files.get(MODEL, ()):
                if stored.name in contents.trained and not stored.tensor.isfinite().all():
                    raise CheckpointError(f"{stored.name} has values that are NaN or infinite: it is not worth keeping")
            for name, tensors in contents.files.items():
                draft.write(name, tensors, contents.metadata.get(name))
            for name, source in contents.links.items():
                draft.link(name, source)
            draft.report(self._rank, contents.own)
        except BaseException as error:
            self._give_up(draft, error)
            raise
        return self._commit(draft, contents, begun) if self._rank == 0 else 0

    def _commit(self, draft: Draft, contents: Contents, begun: float) -> int:
        facts = {**contents.facts, "save_seconds": round(time.monotonic() - begun, 3)}
        made = draft.commit(self._ranks, contents.state, facts, timeout=PATIENCE, stop=lambda: self._closing)
        with suppress(OSError, DistloopError):  # what cannot be deleted now will be later
            best = set() if contents.best is None else {contents.best}
            self._checkpoints.retain(last=self._keep.last, every=self._keep.every, best=best, reading=self._reading)
        return sum(file["bytes"] for file in made.manifest["files"].values())

    def _give_up(self, draft: Draft, error: BaseException) -> None:
        with suppress(OSError, DistloopError):
            if self._rank == 0:
                draft.discard()
            else:
                draft.fail(self._rank, str(error))
