"""Ranks end with their launcher, also if that is killed: else they would hold ports, memory and the run directory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from distloop.ending import leave
from distloop.errors import TERMINATED

PR_SET_PDEATHSIG = 1


def has_launcher(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether this process's parent is a launcher that stays for as long as its ranks.

    A shell or script that sets the variables itself may leave its ranks behind on purpose.
    """
    env = os.environ if environment is None else environment
    return "TORCHELASTIC_RUN_ID" in env or "SLURM_STEP_ID" in env


class Launcher:
    """The parent of this process, whom it is not to outlive."""

    def __init__(self) -> None:
        self.pid = os.getppid()

    def is_gone(self) -> bool:
        """Return whether it has ended: who took its place is another process."""
        return os.getppid() != self.pid or (self.pid == 1 and not _starts_ranks(1))


def follow_launcher() -> None:
    """Have the kernel end this process with its launcher, if it has one; for the main thread, early."""
    if not has_launcher():
        return
    launcher = Launcher()
    # torchrun starts ranks in its main thread. Of others it is not known, and the kernel looks at that thread.
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if launcher.is_gone():  # before the kernel was asked, so it says nothing
        leave(TERMINATED)


def _starts_ranks(pid: int) -> bool:
    """Return whether a process may be a launcher: in a container it can be the first process, as the reaper is."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # nothing is known
    return any(name in words for name in (b"python", b"torchrun", b"slurmstepd"))
