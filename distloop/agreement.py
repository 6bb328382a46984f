"""Stopping together: one rank's signal or clock becomes a decision of all ranks, taken at the same step."""

from __future__ import annotations

import enum
import signal
import time

import torch

from distloop.signals import Caught
from distloop.transports import Rows, Transport


class Stop(enum.IntEnum):
    """Why a run stops at a step. Where ranks ask for different reasons, the highest wins."""

    NO = 0
    ASKED = 1
    TIME = 2
    REQUESTED = 3  # by SIGUSR1 or SIGUSR2: time is running out
    INTERRUPTED = 4
    TERMINATED = 5
    STORAGE = 6  # checkpoints cannot be written


class Agreement:
    """Collects wishes to stop, or to save. Ranks exchange them now and then, and learn of them one step later.

    So nobody waits. How often is itself agreed: about every ``every`` seconds by the slowest rank's clock, which all
    ranks know from the exchange before.

    Args:
        transport: to the other ranks.
        max_seconds: after which to wish for a stop.
        save_seconds: after which to wish for a checkpoint, since the last.
        every: seconds between two exchanges.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        max_seconds: float | None = None,
        save_seconds: float | None = None,
        every: float = 0.25,
    ):
        self._transport, self._every = transport, every
        self._save_seconds, self._saved, self._save_due = save_seconds, time.monotonic(), False
        self._begun = self._last = time.monotonic()
        self._deadline = None if max_seconds is None else self._begun + max_seconds
        self._wish = Stop.NO
        self._pending: Rows | None = None
        self._step = self._last_step = 0
        self._next = 1

    def ask(self, reason: Stop) -> None:
        """Wish to stop. Safe to call in a signal handler."""
        self._wish = max(self._wish, reason)

    def __call__(self) -> Stop:
        """Note that a step is done; return what all ranks decide here. Call at every step on every rank."""
        self._step += 1
        if self._transport.size == 1:
            self._save_due = bool(self._own_save())
            return self._own()
        if self._pending is not None:
            return self._read(self._pending)
        if self._step >= self._next:
            now = time.monotonic()
            seconds_per_step = (now - self._last) / (self._step - self._last_step)
            self._last, self._last_step = now, self._step
            self._pending = self._transport.all_gather(
                torch.tensor([self._own(), seconds_per_step, self._own_save()], dtype=torch.float64)
            )
        return Stop.NO

    def now(self) -> Stop:
        """Decide at once, waiting for the other ranks; for points that every rank reaches anyway."""
        if self._transport.size == 1:
            return self._own()
        agreed = self._read(self._pending) if self._pending is not None else Stop.NO
        rows = self._transport.all_gather(torch.tensor([self._own()], dtype=torch.float64)).wait()
        return max(agreed, Stop(int(rows.max())))

    def save_due(self) -> bool:
        """Return whether all ranks are to save after this step."""
        return self._save_due

    def saved(self) -> None:
        """Take note that all ranks have saved."""
        self._saved, self._save_due = time.monotonic(), False

    def _read(self, pending: Rows) -> Stop:
        self._pending = None
        wishes, seconds, saves = pending.wait().amax(0).tolist()
        self._save_due = self._save_due or bool(saves)
        self._next = self._step + min(max(1, int(self._every / max(seconds, 1e-9))), 1000)
        return Stop(int(wishes))

    def _own_save(self) -> float:
        return float(self._save_seconds is not None and time.monotonic() - self._saved >= self._save_seconds)

    def _own(self) -> Stop:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.ask(Stop.TIME)
        return self._wish


class Signals(Caught):
    """While entered, signals ask for a stop; the second SIGINT or SIGTERM ends at once."""

    def __init__(self, agreement: Agreement):
        super().__init__(lambda number: agreement.ask(WISHES[signal.Signals(number)]))


WISHES = {
    signal.SIGINT: Stop.INTERRUPTED,
    signal.SIGTERM: Stop.TERMINATED,
    signal.SIGUSR1: Stop.REQUESTED,
    signal.SIGUSR2: Stop.REQUESTED,
}
