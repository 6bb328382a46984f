"""Every file operation that a checkpoint's safety rests on, in one place: a test can record, cut and fail each."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from distloop.errors import CheckpointError, StorageError

ALONE = 2**18  # bytes from which on a thread of its own hashes them
AHEAD = 2**25  # bytes after which the disk is to begin with them
CHUNK = 2**22  # bytes that are hashed and written at a time: in the cache still when the second does it
# What says that a file is not what it should be. Anything else (permissions, too many open files) says nothing of it.
DAMAGE = {errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODATA}
NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES}


class Disk:
    """The file system. Methods raise ``OSError``; who calls them says what it means."""

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write a new file and return when its content is on the disk; its name is after :meth:`sync_directory`.

        Returns:
            number of bytes and sha256, taken of what was given while it was written.
        """
        digest, total, begun = _Digest(), 0, 0
        descriptor = self.create(path)
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), CHUNK):
                    chunk = view[start : start + CHUNK]
                    digest.update(chunk)
                    self.put(descriptor, chunk)
                    total += len(chunk)
                    if total // AHEAD != begun:
                        begun = total // AHEAD
                        self.begin(descriptor, total)
            self.sync(descriptor)
        finally:
            digest.close()
            os.close(descriptor)
        return total, digest.hex()

    def create(self, path: Path) -> int:
        """Return a descriptor of a file that was not there."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def put(self, descriptor: int, data: memoryview) -> None:
        """Write all of ``data``."""
        while len(data):
            data = data[os.write(descriptor, data) :]

    def begin(self, descriptor: int, size: int) -> None:
        """Have the disk begin with what has been written, and do not wait for it."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)

    def sync(self, descriptor: int) -> None:
        """Return when the content of an open file is on the disk."""
        os.fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)  # noqa: PTH104 - as the system calls it

    def sync_directory(self, path: Path) -> None:
        """Return when the names in a directory are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_directory(self, path: Path, *, exist_ok: bool = False) -> None:
        try:
            path.mkdir()
        except FileExistsError:
            if not exist_ok or path.is_symlink() or not path.is_dir():
                raise

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a directory with all in it; of a symbolic link, the link."""
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)

    def link_or_copy(self, source: Path, target: Path) -> None:
        """Make ``target`` the same file as ``source``, or one of the same content, on the disk in either case."""
        with self.reading(source) as descriptor:
            try:
                self.link(source, target)
            except OSError as failure:
                if failure.errno not in NO_LINKS:
                    raise
                self.write(target, _chunks(descriptor))
            else:
                self.sync(descriptor)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        """Open a regular file; a link is not followed, and a pipe not waited for."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EBADF, "is not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, path: Path, most: int) -> bytes:
        """Return a file's content.

        Raises:
            ValueError: it has more than ``most`` bytes.
        """
        with self.reading(path) as descriptor:
            found = os.fstat(descriptor).st_size
            if found > most:
                raise ValueError(f"has {found} bytes; at most {most} are read")
            return b"".join(iter(lambda: os.read(descriptor, CHUNK), b""))

    def read_at(self, path: Path, start: int, into: memoryview) -> None:
        """Fill ``into`` with a file's bytes from ``start`` on.

        Raises:
            ValueError: the file ends before.
        """
        with self.reading(path) as descriptor:
            done = 0
            while done < len(into):
                step = os.preadv(descriptor, [into[done : done + 2**30]], start + done)
                if not step:
                    raise ValueError(f"ends at byte {start + done}; {len(into) - done} more should follow")
                done += step

    def size_and_digest(self, path: Path) -> tuple[int, str]:
        """Return a file's number of bytes and its sha256."""
        digest, total = hashlib.sha256(), 0
        with self.reading(path) as descriptor:
            for chunk in _chunks(descriptor):
                digest.update(chunk)
                total += len(chunk)
        return total, digest.hexdigest()

    def size(self, path: Path) -> int:
        with self.reading(path) as descriptor:
            return os.fstat(descriptor).st_size

    def names(self, path: Path) -> list[str]:
        """Return what is in a directory, sorted; nothing if there is none."""
        try:
            return sorted(inner.name for inner in path.iterdir())
        except FileNotFoundError:
            return []


class _Digest:
    """A sha256 that is taken of large chunks beside what the caller does with them."""

    def __init__(self) -> None:
        self._digest, self._threads = hashlib.sha256(), ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def update(self, chunk: memoryview) -> None:
        """Take a chunk; it must not change until the next one is taken, or the result."""
        self._settle()
        if len(chunk) >= ALONE:
            with suppress(RuntimeError):  # while the interpreter ends there are no new threads
                self._pending = self._threads.submit(self._digest.update, chunk)
                return
        self._digest.update(chunk)

    def hex(self) -> str:
        self._settle()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._threads.shutdown()

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _chunks(descriptor: int) -> Iterator[memoryview]:
    """Return the content of an open file; each chunk is valid until the next."""
    buffer = memoryview(bytearray(2**20))
    while found := os.readv(descriptor, [buffer]):
        yield buffer[:found]


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Say of which file or directory a failure to write is.

    Raises:
        StorageError: with the system's words.
    """
    try:
        yield
    except OSError as failure:
        raise StorageError(f"{failure.filename or path}: cannot be written: {words(failure)}") from failure


@contextmanager
def checking(path: Path) -> Iterator[None]:
    """Say of which file it is that it cannot be read.

    Raises:
        CheckpointError: it is missing, not a file, or the disk cannot give it.
        StorageError: it cannot be read for a reason that says nothing about what is in it.
    """
    try:
        yield
    except FileNotFoundError as failure:
        raise CheckpointError(f"{path}: is missing") from failure
    except OSError as failure:
        if failure.errno == errno.ELOOP:
            raise CheckpointError(f"{path}: is a symbolic link; a regular file is expected") from failure
        if failure.errno in DAMAGE:
            raise CheckpointError(f"{path}: cannot be read: {words(failure)}") from failure
        raise StorageError(f"{path}: cannot be read: {words(failure)}") from failure
    except ValueError as failure:
        raise CheckpointError(f"{path}: {failure}") from failure


def words(failure: OSError) -> str:
    """Return what the system says of a failure."""
    return failure.strerror or str(failure)


def gone(disk: Disk, path: Path) -> None:
    """Remove a directory if it can be; what stays is for the next start to remove."""
    for _ in range(3):  # who still writes into it makes removing fail
        with suppress(OSError):
            disk.remove_tree(path)
            return
        if not os.path.lexists(path):
            return
