"""The checkpoints of one run: which there are, the newest valid one, and which to keep."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from distloop.checkpoints.disk import Disk, gone, storing, words
from distloop.checkpoints.draft import Draft
from distloop.checkpoints.names import TOKEN, step_name, step_of
from distloop.checkpoints.reading import Checkpoint, examine
from distloop.errors import CheckpointError, NoCheckpointError, StorageError

TEMPORARY, TRASH, QUARANTINE = ".tmp-", ".trash-", "quarantine"


class Checkpoints:
    """The checkpoints in ``run/checkpoints/``; the directory is made when something is written.

    Args:
        directory: ``run/checkpoints/``.
        disk: the file system, or a test's.
    """

    def __init__(self, directory: Path, disk: Disk | None = None):
        self.directory, self.disk = directory, disk or Disk()
        # Those that newest() found damaged: name of the directory, and the reason.
        self.damaged: list[tuple[str, str]] = []
        self._known: set[int] = set()  # steps whose content this process has written or verified

    def draft(self, step: int, token: str) -> Draft:
        """Begin a checkpoint. Every rank does, with the same arguments.

        Args:
            step: after which it is taken.
            token: what no attempt before had: letters, digits, underscore, hyphen.

        Raises:
            StorageError: the directory cannot be made.
        """
        if not TOKEN.fullmatch(token) or step_of(step_name(step)) != step:
            raise CheckpointError(f"a checkpoint of step {step} and token {token!r} has no name")
        path = self.directory / f"{TEMPORARY}{step:08d}-{token}"
        with storing(path):
            self._make(self.directory)
            self.disk.make_directory(path, exist_ok=True)
        return Draft(self, step, path)

    def steps(self) -> list[int]:
        """Return the steps there are checkpoints of, valid or not, in order."""
        found = [step_of(name) for name in self._names()]
        return sorted(step for step in found if step is not None)

    def path(self, step: int) -> Path:
        return self.directory / step_name(step)

    def newest(self, *, set_aside: bool = True) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None if there has never been one.

        Damaged ones that are newer are moved to ``quarantine/``, each with a file that says why, and listed in
        :attr:`damaged`. If none is valid nothing is moved: the next start is to find the same.

        Args:
            set_aside: move damaged ones; without, only list them.

        Raises:
            NoCheckpointError: there are some, and none of them is valid.
        """
        self.damaged = []
        for step in reversed(self.steps()):
            try:
                found = self.open(self.path(step))
            except CheckpointError as failure:
                self.damaged.append((step_name(step), str(failure)))
                continue
            if set_aside:
                self.damaged = [(name, self._try_aside(name, reason)) for name, reason in self.damaged]
            return found
        strange = [name for name in self._names() if name.startswith("step-") and step_of(name) is None]
        self.damaged += [(name, f"{self.directory / name}: is not named as a checkpoint is") for name in strange]
        if self.damaged:
            reasons = "; ".join(reason for _, reason in self.damaged[:3])
            more = f"; and {len(self.damaged) - 3} more" if len(self.damaged) > 3 else ""
            raise NoCheckpointError(f"{self.directory}: none of its checkpoints is valid: {reasons}{more}")
        return None

    def open(self, path: Path, *, contents: bool = True) -> Checkpoint:
        """Return the checkpoint in a directory, fully verified.

        Args:
            path: its directory.
            contents: hash all files; a rank may leave that out where another has done it, and compare ``digest``.

        Raises:
            CheckpointError: it is damaged; names file and reason.
            StorageError: it cannot be read, for a reason that says nothing about it.
        """
        found = examine(path, self.disk, contents=contents)
        if contents and path.absolute() == self.path(found.step).absolute():
            self.knows(found.step)
        return found

    def set_aside(self, step: int, reason: str) -> Path:
        """Move a checkpoint to ``quarantine/`` and say there why; return where it is now.

        Raises:
            StorageError: it cannot be moved.
        """
        aside, name = self.directory / QUARANTINE, step_name(step)
        self._known.discard(step)
        with storing(self.path(step)):
            self._make(aside)
            times = 1
            while os.path.lexists(aside / name):
                times += 1
                name = f"{step_name(step)}.{times}"
            self.disk.rename(self.path(step), aside / name)
            self.disk.sync_directory(aside)
            self.disk.sync_directory(self.directory)
        with suppress(OSError):  # it is aside, which is what matters
            self.disk.write(aside / f"{name}.reason.txt", [reason.encode("utf-8", "replace") + b"\n"])
        return aside / name

    def clean(self) -> None:
        """Remove what attempts that are dead have left. The caller holds the run's lock.

        Raises:
            StorageError: it cannot be removed.
        """
        for name in self._names():
            if name.startswith((TEMPORARY, TRASH)):
                with storing(self.directory / name):
                    self.disk.remove_tree(self.directory / name)

    def retain(self, *, last: int, every: int | None, best: set[int], reading: int | None) -> list[int]:
        """Remove checkpoints that need not be kept, and return their steps.

        The newest valid one is never removed, nor what is newer and damaged; without a valid one nothing is.

        Args:
            last: keep so many valid ones, the newest.
            every: keep those of steps that this divides.
            best: keep these.
            reading: keep this one.

        Raises:
            StorageError: one cannot be removed.
        """
        steps = self.steps()
        valid = next((step for step in reversed(steps) if self._holds(step)), None)
        if valid is None:
            return []
        older = [step for step in steps if step < valid]
        keep = best | {reading}
        room = last - 1
        for step in reversed(older):
            if room > 0 and self._fits(step):
                keep, room = keep | {step}, room - 1
        doomed = [step for step in older if step not in keep and not (every and step % every == 0)]
        for step in doomed:
            trash = self.directory / f"{TRASH}{step:08d}-{os.getpid()}"
            with storing(self.path(step)):
                self.disk.rename(self.path(step), trash)
                # Or the disk might lose a part of it and not the name.
                self.disk.sync_directory(self.directory)
            self._known.discard(step)
            gone(self.disk, trash)
        return doomed

    def knows(self, step: int) -> None:
        """Note that this process has written or verified the content of a checkpoint."""
        self._known.add(step)

    def _holds(self, step: int) -> bool:
        """Return whether a checkpoint is valid; content that this process has seen is not hashed again."""
        with suppress(CheckpointError, StorageError):
            if step in self._known:
                examine(self.path(step), self.disk, contents=False)
            else:
                self.open(self.path(step))
            return True
        return False

    def _fits(self, step: int) -> bool:
        with suppress(CheckpointError, StorageError):
            examine(self.path(step), self.disk, contents=False)
            return True
        return False

    def _try_aside(self, name: str, reason: str) -> str:
        step = step_of(name)
        assert step is not None
        try:
            self.set_aside(step, reason)
        except StorageError as failure:
            return f"{reason} (it stays where it is: {failure})"
        return reason

    def _names(self) -> list[str]:
        try:
            return self.disk.names(self.directory)
        except OSError as failure:
            raise StorageError(f"{self.directory}: cannot be read: {words(failure)}") from failure

    def _make(self, directory: Path) -> None:
        """Make a directory, with a name that lasts."""
        if not directory.is_dir():
            self.disk.make_directory(directory, exist_ok=True)
            self.disk.sync_directory(directory.parent)
