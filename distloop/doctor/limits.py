"""What the system lets a process have: cores, files, locked memory, processes, huge pages."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distloop.control_groups import MOUNTED, OWN, groups_of
from distloop.cores import Cores
from distloop.doctor.findings import Context, Finding, failed, ok, warning
from distloop.report.machine import in_words

FILES = 1024  # what a rank with loader workers and some tens of peers comes near
PROCESSES = 512
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NETWORKS = Path("/sys/class/infiniband")


def cores(context: Context) -> Finding:
    """Compare the cores of this host with its ranks."""
    found, ranks = Cores.of_this_process(context.world), context.world.local_size
    quota = "" if found.quota is None else f", and the time of {found.quota:g} by {found.group}"
    told = f"{len(found.cores)} cores may be used{quota}, by {ranks} rank{'s' if ranks > 1 else ''} of this host"
    if found.quota is not None and found.quota < ranks:
        return warning("cores", told, "raise the quota (docker run --cpus, limits.cpu), or start fewer ranks")
    if ranks > len(found.cores) > 1:
        return warning("cores", told, "start at most a rank per core")
    if ranks > 1 and len(found.cores) == 1:
        advice = "if the launcher has bound each rank to one core, that is meant; more threads: mpirun --bind-to none"
        return (ok if context.world.by_mpirun else warning)("cores", f"{told}; {advice}")
    return ok("cores", told)


def open_files(context: Context) -> Finding:
    """Look at how many files a process may have open: every peer and every loader worker takes some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{_shown(soft)} may be open at once (hard limit {_shown(hard)})"
    needed = 128 + 8 * context.world.size + 16 * context.config.data.workers
    if soft != resource.RLIM_INFINITY and soft < needed:
        return failed("open files", f"{told}, and this run needs about {needed}", "ulimit -n 65536 before the start")
    if soft != resource.RLIM_INFINITY and soft < FILES:
        return warning("open files", told, "ulimit -n 65536 before the start")
    return ok("open files", told)


def locked_memory(context: Context) -> Finding:
    """Look at how much memory may be locked: network cards and GPUs that read it themselves want that."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "no limit" if soft == resource.RLIM_INFINITY else f"{in_words(soft)} may be locked"
    if soft != resource.RLIM_INFINITY and NETWORKS.exists():
        return warning(
            "locked memory", f"{told}, and there is InfiniBand, which locks what it sends", "ulimit -l unlimited"
        )
    return ok("locked memory", told)


def processes(context: Context) -> Iterator[Finding]:
    """Look at how many processes and threads there may be."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    most, who = soft, "of this user"
    group = _most_of_groups()
    if group is not None and (most == resource.RLIM_INFINITY or group < most):
        most, who = group, "of this control group"
    if most != resource.RLIM_INFINITY and most < PROCESSES:
        yield warning("processes", f"{most} processes and threads {who}", "ulimit -u 4096, or docker run --pids-limit")
    else:
        yield ok("processes", f"{_shown(most)} processes and threads {who}")


def huge_pages(context: Context, file: Path = PAGES) -> Finding:
    """Look whether large tensors may lie on huge pages."""
    found = re.search(r"\[(\w+)\]", file.read_text())
    if found is None or found[1] == "never":
        return warning(
            "huge pages",
            "transparent huge pages are off: optimizers on the CPU are slower",
            f"echo madvise > {file} (as root)",
        )
    return ok("huge pages", f"transparent huge pages: {found[1]}")


def _most_of_groups(own: Path = OWN, mounted: Path = MOUNTED) -> int | None:
    """Return the least of the limits of this process's control groups: they all hold."""
    limits = []
    for group in groups_of("pids", own, mounted):
        with suppress(OSError, ValueError):  # "max"
            limits.append(int((group.folder / "pids.max").read_text()))
    return min(limits, default=None)


def _shown(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
