"""One job at a time in a run directory: a lock that the system takes back when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from distloop.checkpoints.disk import words
from distloop.errors import BusyError, StorageError

PATIENCE = 1.0  # seconds to wait for a holder that is about to end
UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """The lock of a run directory, taken when this is made; it ends with :meth:`release` or with the process.

    Attributes:
        note: why it keeps nobody out, where the file system has no locks; None otherwise.

    Args:
        directory: of the run.
        job: what the scheduler calls this job.

    Raises:
        BusyError: another process has it; says which.
        StorageError: the lock's file cannot be made.
    """

    def __init__(self, directory: Path, *, job: str | None = None):
        self.path = directory / "lock"
        self.note: str | None = None
        self._descriptor: int | None = None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as failure:
            raise StorageError(f"{self.path}: cannot be made: {words(failure)}") from failure
        try:
            self._take(descriptor)
            self._descriptor = descriptor
            self._sign(job)
        except BaseException:
            self._descriptor = None
            os.close(descriptor)
            raise
        _held.add(self)

    def release(self) -> None:
        """Let the next one in; again does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take(self, descriptor: int) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    holder = _said(os.pread(descriptor, 4096, 0))
                    raise BusyError(f"{self.path.parent}: another job works here: {holder}") from None
            except OSError as failure:
                if failure.errno not in UNSUPPORTED:
                    raise StorageError(f"{self.path}: cannot be locked: {words(failure)}") from failure
                self.note = f"{self.path}: {words(failure)}: nothing keeps a second job out of this directory"
                return
            time.sleep(0.02)

    def _sign(self, job: str | None) -> None:
        assert self._descriptor is not None
        said = {"host": socket.gethostname(), "pid": os.getpid(), "job": job}
        said["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(said).encode() + b"\n", 0)
        except OSError as failure:
            raise StorageError(f"{self.path}: cannot be written: {words(failure)}") from failure

    def _forget(self) -> None:
        """In a process forked from the holder: a lock belongs to all who have its file open."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _said(data: bytes) -> str:
    """Return who has the lock, as its file says."""
    try:
        said = json.loads(data)
        job = f", job {said['job']}" if said["job"] else ""
        return f"process {int(said['pid'])} on {said['host']}{job}, since {said['time']}"
    except (ValueError, TypeError, KeyError):
        return "it has not said who it is"


def _after_fork() -> None:
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_after_fork)
