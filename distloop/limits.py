"""When a run logs, evaluates, saves and ends, and what its end means to whoever started it."""

from __future__ import annotations

from dataclasses import dataclass

from distloop.agreement import Stop
from distloop.errors import INTERRUPTED, REQUEUE, TERMINATED, StorageError
from distloop.loop import Update

REASONS = {
    Stop.ASKED: "an observer asked for it",
    Stop.TIME: "max_seconds reached",
    Stop.REQUESTED: "asked for by SIGUSR1 or SIGUSR2",
    Stop.INTERRUPTED: "interrupted (Ctrl-C)",
    Stop.TERMINATED: "terminated (SIGTERM)",
    Stop.STORAGE: "checkpoints cannot be written",
}


@dataclass(frozen=True)
class Limits:
    """When to end, evaluate, log and save; a step is one global batch, counted from 1."""

    epochs: int | None = None
    max_steps: int | None = None
    log_every: int = 50
    evaluate_steps: int | None = None
    evaluate_epochs: int | None = 1
    save_steps: int | None = None
    save_epochs: int | None = None

    def reached(self, step: int) -> str | None:
        """Return why there is to be no other step, if so."""
        return None if self.max_steps is None or step < self.max_steps else f"max_steps {self.max_steps} reached"

    def evaluation_due(self, step: int, update: Update) -> bool:
        """Return whether to evaluate after this step."""
        if self.evaluate_steps:
            return step % self.evaluate_steps == 0
        return _epoch_due(update, self.evaluate_epochs)

    def save_due(self, step: int, update: Update) -> bool:
        """Return whether to save after this step, whatever the clock says."""
        by_steps = self.save_steps is not None and step % self.save_steps == 0
        return by_steps or _epoch_due(update, self.save_epochs)


def exit_code(stopped: Stop, *, saved: bool) -> int:
    """Return what a job script is told: a run that was stopped and saved asks to be started again."""
    if stopped < Stop.REQUESTED:
        return 0
    if stopped is Stop.STORAGE:
        return StorageError.exit_code
    return REQUEUE if saved else INTERRUPTED if stopped is Stop.INTERRUPTED else TERMINATED


def _epoch_due(update: Update, every: int | None) -> bool:
    """Return whether an epoch has ended after which there is something to do, if that is on every ``every``-th."""
    return bool(every and update.position.last and (update.epoch + 1) % every == 0)
