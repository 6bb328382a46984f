"""What one process can know of another on its host."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path

GET_INFO = 0xC040FF0B  # PIDFD_GET_INFO of Linux 6.15, for the first 64 bytes
INFO_EXIT = 8

STATES = {
    "T": "its process is stopped (SIGSTOP)",
    "t": "its process is stopped by a debugger",
    "D": "its process waits for a device or a file system that does not answer (state D)",
}


class Process:
    """Another process, told from a later one of the same number."""

    def __init__(self, pid: int):
        self.pid = pid
        self.handle = os.pidfd_open(pid)  # OSError where it is not there, or the system has no such thing

    def state(self) -> str:
        """Return in words why it may be silent although it lives."""
        state = _stat(self.pid)[0]
        return STATES.get(state, f"its process lives (state {state}), but native code holds its interpreter (the GIL)")

    def ending(self) -> str | None:
        """Return in words how it ended, if that can be known; whoever started it may have asked before."""
        status: int | None = None
        fields = _stat(self.pid)
        if fields[0] in "ZX" and len(fields) > 49:
            status = int(fields[49])
        if status is None:
            buffer = bytearray(64)
            struct.pack_into("Q", buffer, 0, INFO_EXIT)
            with suppress(OSError):
                fcntl.ioctl(self.handle, GET_INFO, buffer)
                if struct.unpack_from("Q", buffer)[0] & INFO_EXIT:
                    status = struct.unpack_from("i", buffer, 60)[0]
        if status is None:
            return None
        if os.WIFSIGNALED(status):
            return f"was killed by signal {os.WTERMSIG(status)}"
        return f"left with exit code {os.WEXITSTATUS(status)}"

    def kill(self) -> None:
        if sys.platform == "linux":
            with suppress(OSError):
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def close(self) -> None:
        os.close(self.handle)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; the name before it may have spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["?"]
