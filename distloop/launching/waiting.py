"""A job of mpirun, waited for: SIGTERM would have it kill ranks that are to save, so it gets SIGUSR1 instead."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from distloop.agent_signals import ASKING, ENDING, ONE, catches

PATIENCE = 2.0  # seconds in which an mpirun that has begun knows SIGUSR1, which would end it before
PERIOD = 0.02


class _Told:
    """What this process was told by signals, for the job that it waits for."""

    def __init__(self) -> None:
        self._job: subprocess.Popen[bytes] | None = None
        self._asked = False
        self._ordered = 0.0
        self._ends = False

    def take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in ENDING:
            self._ends = bool(self._ordered) and now - self._ordered > ONE
            self._ordered = self._ordered or now
        self._asked = True
        self._pass()

    def of(self, job: subprocess.Popen[bytes]) -> None:
        self._job = job
        self._pass()

    def _pass(self) -> None:
        if self._job is None or not self._asked:
            return
        deadline = time.monotonic() + PATIENCE
        while not (self._ends or catches(self._job.pid, signal.SIGUSR1) or time.monotonic() > deadline):
            time.sleep(PERIOD)
        self._job.send_signal(signal.SIGTERM if self._ends else signal.SIGUSR1)


def wait_for(command: Sequence[str]) -> int:
    """Run mpirun in a session of its own, and return its exit code.

    The first signal to this process asks the ranks to stop. SIGINT, SIGTERM or SIGHUP once more ends the job.
    """
    # Who caught signals before ends this process without the job, from a thread that would still hear of them.
    signal.set_wakeup_fd(-1)
    told = _Told()
    for number in (*ENDING, *ASKING):
        signal.signal(number, told.take)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as job:
        told.of(job)
        code = job.wait()
    return code if code >= 0 else 128 - code
