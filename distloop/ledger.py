"""The exact global loss, without asking the device for it at every step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distloop.collectives.tree import own_leaves
from distloop.errors import NonFiniteError
from distloop.learner import Learner
from distloop.leaves import by_leaf
from distloop.loop import Update
from distloop.transports import Transport

REMEDY = "a smaller optimizer.lr, schedule.warmup_steps or gradients.clip_norm may help"
LEAST_IDLE = 0.01  # what is less is not worth a column


class _Turn(NamedTuple):
    learner: str
    losses: Sequence[tuple[float, Tensor]]  # this rank's (share of the global batch, loss)
    applied: bool
    step: int


class Ledger:
    """Keeps each turn's losses where they were computed, and sums them over ranks when a log line is due.

    Args:
        learners: those that take turns.
        transport: to the other ranks.
        collecting: returns the seconds that this rank spent collecting data since it was asked last.
        explosion: a loss above this many times the first (or 1, if that is more) is an explosion (None: never).
    """

    def __init__(
        self,
        learners: Sequence[Learner],
        transport: Transport,
        *,
        collecting: Callable[[], float] = float,
        explosion: float | None = 1e3,
    ):
        self._collecting = collecting
        self._learners, self._transport, self._explosion = list(learners), transport, explosion
        self._turns: list[_Turn] = []
        self._skipped = {learner.name: 0 for learner in learners}
        self._may_skip = {learner.name: learner.may_skip for learner in learners}
        self._first: dict[str, float] = {}
        self._samples = 0
        self._since = time.monotonic()

    def add(self, update: Update, step: int, *, last: bool) -> None:
        """Take note of a learner's turn on the ``step``-th global batch; ``last``: nobody else takes one on it."""
        learner = update.learner
        applied = learner.skipped == self._skipped[learner.name]
        self._skipped[learner.name] = learner.skipped
        self._turns.append(_Turn(learner.name, update.losses, applied, step))
        if last:
            self._samples += update.position.samples

    def restart_clock(self) -> None:
        """Leave the time since the last line out of the rate: it went into something else than training."""
        self._samples, self._since = 0, time.monotonic()
        self._collecting()

    def leave_out(self, seconds: float) -> None:
        """Leave so much time out of the rate."""
        self._since += seconds

    def close(self) -> dict[str, Any] | None:
        """Return the values since the last call, exact over all ranks; None if there was no step.

        ``loss`` is the mean over these steps of the loss of the global batch. ``idle``, where it matters, is the part
        of the ranks' time that was lost to waiting for the busiest of them, supposing that a rank's time for a step
        goes with its share of the global batch; collecting is timed.

        Raises:
            NonFiniteError: on all ranks alike, if a loss is NaN, infinite, or exploded; names step, learner and rank.
        """
        if not self._turns:
            return None
        turns, self._turns = self._turns, []
        parts = self._local_losses(turns)  # (turns, parts of a global batch)
        own = torch.cat([parts.view(-1), _local_shares(turns), torch.tensor([self._collecting()]).double()])
        rows = self._transport.all_gather(own).wait()
        by_part, busy, collecting = rows.split([parts.numel(), len(turns), 1], dim=1)
        by_part = by_part.view(-1, *parts.shape)
        by_rank = by_part.sum(2)
        losses: dict[str, list[float]] = {learner.name: [] for learner in self._learners}
        for i, (turn, loss) in enumerate(zip(turns, by_part.sum(0).sum(1).tolist(), strict=True)):
            name = turn.learner
            self._check(turn, loss, by_rank[:, i])
            if turn.applied:
                losses[name].append(loss)
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        values: dict[str, Any] = {}
        for learner in self._learners:
            values |= self._values(learner, losses[learner.name])
        values["samples_per_second"] = self._samples / seconds
        self._samples, self._since = 0, now
        idle = _idle(busy, collecting, seconds)
        return values | ({"idle": idle} if idle >= LEAST_IDLE else {})

    def check(self) -> None:
        """Look at the losses since the last line, before something that is not worth keeping is kept.

        Raises:
            NonFiniteError: as :meth:`close`.
        """
        if self._turns:
            by_rank = self._transport.all_gather(self._local_losses(self._turns).sum(1)).wait()
            for i, turn in enumerate(self._turns):
                self._check(turn, float(by_rank[:, i].sum()), by_rank[:, i])

    def state_dict(self) -> dict[str, Any]:
        """Return what the next line depends on, of this rank."""
        names = [learner.name for learner in self._learners]
        rows = [(names.index(turn.learner), turn.applied, turn.step, len(turn.losses)) for turn in self._turns]
        shares = [share for turn in self._turns for share, _ in turn.losses]
        losses = [loss.double().cpu() for turn in self._turns for _, loss in turn.losses]
        return {
            "learners": names,
            "turns": torch.tensor(rows, dtype=torch.int64).view(-1, 4),
            "shares": torch.tensor(shares, dtype=torch.float64),
            "losses": torch.stack(losses) if losses else torch.zeros(0, dtype=torch.float64),
            "first": self._first,
        }

    def load_states(self, states: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Go on from the states of all ranks of then; after the learners."""
        size, every_state = ranks, list(states)
        known = {learner.name: learner.strategy for learner in self._learners}
        self._first = dict(every_state[0]["first"])
        self._skipped = {learner.name: learner.skipped for learner in self._learners}
        self._turns = []
        for name, applied, step, pairs in _together(every_state):
            every = [pair for own in pairs for pair in own]
            mine = pairs[rank] if len(pairs) == size else every[rank::size]
            if leaves := known[name].leaves:
                leaf = own_leaves(rank, leaves, size)
                mine = every[leaf.start : leaf.stop]
            device = next(iter(known[name].parameters.values())).device
            losses = [(share, torch.tensor(loss, dtype=torch.float64, device=device)) for share, loss in mine]
            self._turns.append(_Turn(name, losses, applied, step))

    def _local_losses(self, turns: Sequence[_Turn]) -> Tensor:
        """Return this rank's part of the global loss of each turn, in double precision; one copy from the device."""
        pairs = [turn.losses for turn in turns]
        each = [loss for own in pairs for _, loss in own]
        losses = iter(torch.stack(each).double().tolist() if each else ())
        own = [torch.tensor([share * next(losses) for share, _ in row], dtype=torch.float64) for row in pairs]
        leaves = self._learners[0].strategy.leaves  # as all learners have
        return torch.stack([by_leaf(row, leaves, self._transport) for row in own])

    def _values(self, learner: Learner, losses: list[float]) -> dict[str, Any]:
        values: dict[str, Any] = {
            "loss": sum(losses) / len(losses) if losses else None,
            "lr": learner.base_lr * learner.schedule(max(learner.step - 1, 0)),
        }
        if learner.gradient_norm is not None:
            values["gradient_norm"] = float(learner.gradient_norm)
        if learner.loss_scale is not None:
            values |= {"loss_scale": learner.loss_scale, "skipped": learner.skipped}
        elif learner.may_skip:
            values["skipped"] = learner.skipped
        if len(self._learners) == 1:
            return values
        return {f"{learner.name}/{key}": value for key, value in values.items()}

    def _check(self, turn: _Turn, loss: float, by_rank: Tensor) -> None:
        name, step = turn.learner, turn.step
        if not turn.applied and self._may_skip[name]:
            return
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


def _together(states: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool, int, list[list[tuple[float, float]]]]]:
    """Yield the turns of all ranks: learner, whether it was applied, step, and (share, loss) pairs by rank."""
    pairs = [iter(zip(s["shares"].tolist(), s["losses"].tolist(), strict=True)) for s in states]
    for rows in zip(*(state["turns"].tolist() for state in states), strict=True):
        learner, applied, step, _ = rows[0]
        by_rank = [list(islice(own, row[3])) for own, row in zip(pairs, rows, strict=True)]
        yield states[0]["learners"][learner], bool(applied), step, by_rank


def _local_shares(turns: Sequence[_Turn]) -> Tensor:
    """Return this rank's share of the global batch of each turn."""
    return torch.tensor([sum(share for share, _ in turn.losses) for turn in turns], dtype=torch.float64)


def _idle(shares: Tensor, collecting: Tensor, seconds: float) -> float:
    """Return the part of the ranks' time lost to waiting; ``shares`` is (ranks, turns), ``collecting`` (ranks, 1)."""
    busiest = shares.amax(0)
    in_steps = float(1.0 - shares.mean(0).sum() / busiest.sum()) if busiest.any() else 0.0
    most, mean = float(collecting.max()), float(collecting.mean())
    return min((most - mean + in_steps * max(seconds - most, 0.0)) / seconds, 1.0)
