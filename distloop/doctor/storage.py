"""Where runs write, and the memory that processes of a host share."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from distloop import native
from distloop.doctor.findings import Context, Finding, failed, ok, warning
from distloop.report.machine import in_words

DEV = Path("/dev/shm")  # noqa: S108 (it is what is looked at)
LEAST_SHARED, LEAST_FREE = 1 << 30, 1 << 30  # bytes
SLOW = 0.1  # seconds of an fsync
NETWORK = {"nfs", "nfs4", "lustre", "cifs", "smb3", "ceph", "gpfs", "beegfs", "9p", "glusterfs", "afs", "orangefs"}
MEMORY = {"tmpfs", "ramfs"}


def shared_memory(context: Context) -> Iterator[Finding]:
    """Look at /dev/shm, through which loader workers and NCCL pass data, and at what ranks share memory by."""
    usage = shutil.disk_usage(DEV)
    told = f"{in_words(usage.total)} in {DEV}, {in_words(usage.free)} free"
    advice = "docker run --shm-size 8g or --ipc host; loader workers die of a bus error without"
    if not os.access(DEV, os.W_OK):
        yield failed("shared memory", f"{DEV} cannot be written to", advice)
    elif usage.free < LEAST_SHARED:
        yield warning("shared memory", told, advice)
    else:
        yield ok("shared memory", told)
    try:
        os.close(os.memfd_create("distloop-doctor"))
        native.load("shared_memory")
    except native.UnavailableError as reason:
        yield warning("ranks' memory", f"ranks of one host cannot share memory: {reason}", "sockets are used instead")
    except (OSError, AttributeError) as failure:
        yield warning("ranks' memory", f"ranks of one host cannot share memory: {failure}", "sockets are used instead")
    else:
        yield ok("ranks' memory", "memfd and the C helper are there")


def disk(context: Context) -> Iterator[Finding]:
    """Write a file where runs are kept, and look at what kind of place that is."""
    wanted = Path(context.config.log.directory).absolute()
    place = next(folder for folder in [wanted, *wanted.parents] if folder.exists())
    try:
        seconds = _write(place)
    except OSError as failure:
        advice = "choose another folder with --log.directory"
        yield failed("run directory", f"{wanted} cannot be written to ({failure.strerror})", advice)
        return
    usage, kind = shutil.disk_usage(place), file_system(place)
    told = f"{wanted} is on {kind}, {in_words(usage.free)} free, 1 MiB and fsync took {1e3 * seconds:.1f} ms"
    if usage.free < LEAST_FREE:
        yield warning("run directory", told, "make room, or choose another with --log.directory")
    elif kind in MEMORY:
        yield warning("run directory", told, "checkpoints in memory are lost with the host: --log.directory elsewhere")
    elif seconds > SLOW:
        yield warning("run directory", told, "checkpoints are written in the background, but will take their time")
    elif context.several_hosts and kind not in NETWORK and not kind.startswith("fuse"):
        yield warning("run directory", told, "all hosts must see it: use a file system that they share")
    else:
        yield ok("run directory", told)


def file_system(place: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system that a folder is on."""
    best, kind = "", "unknown"
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        if place.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def _write(place: Path) -> float:
    """Return the seconds that writing a file for good takes."""
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile(prefix=".distloop-doctor-", dir=place) as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun
