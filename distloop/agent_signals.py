"""Signals that an agent passes on to its ranks, from a thread: its main thread may wait in C++ for other hosts."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distloop.agent_codes import telling
from distloop.agent_store import StoreWatch
from distloop.ending import leave

ENDING = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
ASKING = {signal.SIGUSR1: signal.SIGUSR1, signal.SIGUSR2: signal.SIGUSR2}
PERIOD = 0.1  # seconds between two looks for ranks that have not been told
ONE = 0.5  # seconds in which signals that end count as one: a scheduler may send it in two ways
PATIENCE = 2.0  # seconds for which an agent whose ranks have ended may end by itself


class Passing:
    """Catches signals, from now on to the end of the process; for the main thread.

    Attributes:
        processes: the ranks there are.
        told: whether any signal has come.
        code: the exit code of the signal to end that has come, or 0.
        cut_off: whether the ranks were ended because other hosts cannot be reached.
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told, self.code, self.cut_off = False, 0, False
        self._store: StoreWatch | None = None
        self._wishes: list[signal.Signals] = []
        self._passed: set[tuple[int, int]] = set()
        self._ordered = self._seen = 0.0
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        for number in (*ENDING, *ASKING):
            signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def watch(self, store: Any) -> None:
        """Watch the store that the agents of several hosts have in common, if there are any, in place of one before."""
        if self._store is not None:
            self._store.end()
        self._store = None if store is None else StoreWatch(store, self._lost)

    def _lost(self) -> None:
        alive = [process for process in self.processes if process.returncode is None]
        self.cut_off = bool(alive)
        self._kill(alive)

    def _watch(self) -> None:
        while True:
            select.select([self._pipe[0]], [], [], PERIOD if self._wishes else None)
            with suppress(BlockingIOError):
                for number in os.read(self._pipe[0], 64):
                    self._take(number)
            self._pass()

    def _take(self, number: int) -> None:
        now = time.monotonic()
        self.told = True
        passed = signal.Signals((ENDING | ASKING).get(signal.Signals(number), number))
        if number in ENDING:
            if self.code and now - self._ordered > ONE:
                self._kill(self.processes)
                leave(128 + passed)
            if not self.code:
                self._ordered = self._seen = now
            self.code = self.code or 128 + passed
        if passed in (*ENDING, *ASKING) and passed not in self._wishes:
            self._wishes.append(passed)

    def _pass(self) -> None:
        codes = {process.pid: process.poll() for process in self.processes}  # the main thread may not get to ask
        alive = [pid for pid, code in codes.items() if code is None]
        for pid in alive:
            for number in self._wishes:
                # A rank that still starts does not know SIGUSR1, and would be killed by it.
                if (pid, number) not in self._passed and (number in ENDING or catches(pid, number)):
                    self._passed.add((pid, number))
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
        if alive:
            self._seen = time.monotonic()
        elif self.code and time.monotonic() - self._seen > (PATIENCE if self.processes else 0):
            leave(telling(code or 0 for code in codes.values()) if codes else self.code)

    def _kill(self, processes: Iterable[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # each is the first of a session


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, as far as can be told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return not masks or bool(int(masks[0], 16) >> (number - 1) & 1)
