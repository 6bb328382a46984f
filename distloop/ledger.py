"""The exact global loss, without asking the device for it at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distloop.errors import NonFiniteError
from distloop.learner import Learner
from distloop.loop import Update
from distloop.transports import Transport

REMEDY = "a smaller optimizer.lr, schedule.warmup_steps or gradients.clip_norm may help"


class Ledger:
    """Keeps each turn's losses where they were computed, and sums them over ranks when a log line is due.

    Args:
        learners: those that take turns.
        transport: to the other ranks.
        explosion: a loss above this many times the first (or 1, if that is more) is an explosion (None: never).
    """

    def __init__(self, learners: Sequence[Learner], transport: Transport, *, explosion: float | None = 1e3):
        self._learners, self._transport, self._explosion = list(learners), transport, explosion
        self._turns: list[tuple[Update, bool]] = []  # and whether it was applied
        self._skipped = {learner.name: 0 for learner in learners}
        self._first: dict[str, float] = {}
        self._samples = self._steps = 0
        self._since = time.monotonic()

    def add(self, update: Update) -> None:
        """Take note of a learner's turn."""
        learner = update.learner
        applied = learner.skipped == self._skipped[learner.name]
        self._skipped[learner.name] = learner.skipped
        self._turns.append((update, applied))
        if learner is self._learners[-1]:
            self._samples += update.position.samples
            self._steps += 1

    def restart_clock(self) -> None:
        """Leave the time since the last line out of the rate: it went into something else than training."""
        self._samples, self._since = 0, time.monotonic()

    def close(self) -> dict[str, Any] | None:
        """Return the values since the last call, exact over all ranks; None if there was no step.

        ``loss`` is the mean over these steps of the loss of the global batch.

        Raises:
            NonFiniteError: on all ranks alike, if a loss is NaN, infinite, or exploded; names step, learner and rank.
        """
        if not self._turns:
            return None
        turns, self._turns = self._turns, []
        by_rank = self._transport.all_gather(_local_losses([update for update, _ in turns])).wait()
        first_step = self._steps - len(turns) // len(self._learners)
        losses: dict[str, list[float]] = {learner.name: [] for learner in self._learners}
        for i, ((update, applied), loss) in enumerate(zip(turns, by_rank.sum(0).tolist(), strict=True)):
            name = update.learner.name
            self._check(name, loss, first_step + i // len(self._learners) + 1, by_rank[:, i])
            if applied:
                losses[name].append(loss)
        now = time.monotonic()
        rate = self._samples / max(now - self._since, 1e-9)
        self._samples, self._since = 0, now
        values: dict[str, Any] = {}
        for learner in self._learners:
            values |= self._values(learner, losses[learner.name])
        return values | {"samples_per_second": rate}

    def _values(self, learner: Learner, losses: list[float]) -> dict[str, Any]:
        values: dict[str, Any] = {
            "loss": sum(losses) / len(losses) if losses else None,
            "lr": learner.base_lr * learner.schedule(max(learner.step - 1, 0)),
        }
        if learner.gradient_norm is not None:
            values["gradient_norm"] = float(learner.gradient_norm)
        if learner.loss_scale is not None:
            values |= {"loss_scale": learner.loss_scale, "skipped": learner.skipped}
        if len(self._learners) == 1:
            return values
        return {f"{learner.name}/{key}": value for key, value in values.items()}

    def _check(self, name: str, loss: float, step: int, by_rank: Tensor) -> None:
        first = self._first.setdefault(name, abs(loss))
        limit = math.inf if self._explosion is None else self._explosion * max(first, 1.0)
        if abs(loss) <= limit and math.isfinite(loss):
            return
        where = f"step {step}, learner {name!r}"
        remedy = REMEDY if step > 1 else "nothing has been learned yet, so look at the data, the model and the loss"
        if not math.isfinite(loss):
            ranks = (~by_rank.isfinite()).nonzero().flatten().tolist()
            raise NonFiniteError(f"the loss became {loss} at {where}, on rank {ranks[0] if ranks else 0}; {remedy}")
        raise NonFiniteError(
            f"the loss exploded to {loss:.4g} at {where} (it began at {first:.4g}; most of it on rank "
            f"{int(by_rank.abs().argmax())}); {remedy}"
        )


def _local_losses(updates: Sequence[Update]) -> Tensor:
    """Return this rank's part of the global loss of each turn, in double precision; one copy from the device."""
    losses = iter(torch.stack([loss for update in updates for _, loss in update.losses]).double().tolist())
    return torch.tensor([sum(share * next(losses) for share, _ in u.losses) for u in updates], dtype=torch.float64)
