"""A run: the loop's body with everything a user expects around it (log, evaluate, stop, keep the best)."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distloop.agreement import Agreement, Signals, Stop
from distloop.checkpoint import load_model, make_durable, model_state, save_model, write_json
from distloop.errors import INTERRUPTED, TERMINATED, ConfigError, DataError, nearest
from distloop.evaluation import Evaluation
from distloop.heartbeat import Heartbeat
from distloop.ledger import Ledger
from distloop.loop import Collects, Update, train
from distloop.records import Observer, Record, Result
from distloop.transports import Transport
from distloop.turns import Turns
from distloop.world import World

Report = Callable[[], dict[str, float]]  # what a task tells of its collecting, exact over all ranks


@dataclass(frozen=True)
class Limits:
    """When to end, evaluate and log; a step is one global batch, counted from 1."""

    epochs: int | None = None
    max_steps: int | None = None
    log_every: int = 50
    evaluate_steps: int | None = None
    evaluate_epochs: int | None = 1


@dataclass(frozen=True)
class Monitor:
    """Which metric tells whether a model is better, and how long to wait for that."""

    metric: str | None = None  # None: the first that evaluation returns
    mode: str | None = None  # None: min for a loss, else max
    patience: int | None = None
    min_delta: float = 0.0
    keep_best: bool = True
    target: float | None = None  # good enough: stop


class Session:
    """One run of a task, from the first step to the saved model."""

    def __init__(
        self,
        task: Collects,
        turns: Turns,
        *,
        world: World,
        transport: Transport,
        limits: Limits,
        monitor: Monitor,
        agreement: Agreement,
        ledger: Ledger,
        evaluation: Evaluation | None,
        directory: Path,
        facts: Mapping[str, str],
        averages: Mapping[str, nn.Module] | None = None,
        report: Report | None = None,
        observers: Sequence[Observer] = (),
        progress: Callable[[int], None] | None = None,
    ):
        self.task, self.turns, self.learners, self.world, self.transport = task, turns, turns.learners, world, transport
        self.limits, self.monitor, self.directory = limits, monitor, directory
        self._agreement, self._ledger, self._evaluation = agreement, ledger, evaluation
        self._facts, self._observers, self._progress = facts, list(observers), progress
        models: dict[str, nn.Module] = {learner.name: learner.objective.model for learner in self.learners}
        self._files = {"model.safetensors": models} | ({"averages.safetensors": dict(averages)} if averages else {})
        for kept in self._files.values():
            model_state(kept)  # what cannot be saved is refused now, not after the training
        self._report = report
        self.step = self.epoch = self._samples = 0
        self._evaluated_at = -1
        self._logged_at = 0
        self._best: tuple[float, int] | None = None
        self._evaluations_without_better = 0
        self._metrics: dict[str, float] = {}  # of the last evaluation
        self._best_metrics: dict[str, float] = {}
        self._watched: tuple[str, float] | None = None  # metric's name, and +1 if lower is better

    def run(self) -> Result:
        """Train until a limit or a decision ends it; return with the best model loaded."""
        try:
            return self._run()
        except BaseException as failure:
            with suppress(Exception):  # whatever else breaks now, the first failure is the one to report
                self._emit("failure", {"error": f"{type(failure).__name__}: {failure}"})
            raise
        finally:
            for learner in self.learners:
                learner.strategy.close()

    def _run(self) -> Result:
        begun = time.monotonic()
        self._emit("start", self._facts)
        reason = "all epochs done"
        self._ledger.restart_clock()
        with Signals(self._agreement):
            for update in train(self.task, self.turns, self._epochs(), self.world):
                last = update.learner is self.turns.last
                self._ledger.add(update, self.step + 1, last=last)
                if last and (stop := self._after_batch(update)):
                    reason = stop
                    break
            stopped = self._agreement.now()
            if stopped in _REASONS:
                reason = _REASONS[stopped]
            self._log()
            if stopped < Stop.INTERRUPTED and self._evaluation is not None and self._evaluated_at != self.step:
                self._evaluate()
            return self._finish(reason, stopped, time.monotonic() - begun)

    def _epochs(self) -> Iterable[int]:
        """Yield epoch numbers, for ever if no number of epochs is set."""
        limits, epoch = self.limits, 0
        while limits.epochs is None or epoch < limits.epochs:
            self.epoch, begun = epoch, self.step
            yield epoch
            if self.step == begun:
                raise DataError(f"epoch {epoch} had no batch: extract(epoch, world) yielded nothing")
            epoch += 1

    def _after_batch(self, update: Update) -> str | None:
        """Log, evaluate and decide after all learners' turns on a global batch; return a reason to stop."""
        limits = self.limits
        self.step += 1
        self._samples += update.position.samples
        if (heartbeat := Heartbeat.current()) is not None:
            heartbeat.step(self.step)
        if self._progress is not None:
            self._progress(self.step)
        evaluate = self._evaluation is not None and self._evaluation_due(update)
        if evaluate or self.step - self._logged_at >= limits.log_every:
            self._logged_at = self.step
            self._log()
        elif self.step == 1:
            self._log()  # at once, to show that it goes
        stop = self._evaluate() if evaluate else None
        agreed = self._agreement()
        if agreed:
            return _REASONS[agreed]
        if limits.max_steps is not None and self.step >= limits.max_steps:
            return f"max_steps {limits.max_steps} reached"
        return stop

    def _evaluation_due(self, update: Update) -> bool:
        limits = self.limits
        if limits.evaluate_steps:
            return self.step % limits.evaluate_steps == 0
        return bool(
            limits.evaluate_epochs and update.position.last and (update.epoch + 1) % limits.evaluate_epochs == 0
        )

    def _log(self) -> None:
        values = self._ledger.close()
        if values is not None:
            self._emit("train", values | (self._report() if self._report is not None else {}))

    def _evaluate(self) -> str | None:
        """Evaluate; return a reason to stop, if there is one. Its time, and that of pictures, is not the training's."""
        stop = self._evaluate_and_judge()
        self._ledger.restart_clock()
        return stop

    def _evaluate_and_judge(self) -> str | None:
        """Evaluate, remember the best, and return a reason to stop if patience is over."""
        assert self._evaluation is not None
        self._evaluated_at = self.step
        with ExitStack() as stack:
            for learner in self.learners:
                stack.enter_context(learner.strategy.whole())
            return self._judge(self._evaluation)

    def _judge(self, evaluation: Evaluation) -> str | None:
        for learner in self.learners:
            learner.average_statistics(self.transport)
        self._metrics = evaluation()
        if not self._metrics:
            return None
        name, sign = self._watched = self._choose_metric()
        value = self._metrics[name]
        for learner in self.learners:
            learner.schedule.observe(sign * value)
        best = math.inf if self._best is None else sign * self._best[0]
        target = self.monitor.target
        reached = target is not None and sign * value <= sign * target
        better = sign * value < best - (0.0 if self._best is None else self.monitor.min_delta) or reached
        self._emit("evaluate", self._metrics | {"best": better})
        if better:
            self._best, self._best_metrics, self._evaluations_without_better = (value, self.step), self._metrics, 0
            if self.monitor.keep_best:
                self._save()
            return f"{name} reached monitor.target, which is {target:g}" if reached else None
        self._evaluations_without_better += 1
        patience = self.monitor.patience
        if patience is not None and self._evaluations_without_better > patience:
            return f"no better {name} in {patience + 1} evaluations"
        return None

    def _choose_metric(self) -> tuple[str, float]:
        name = self.monitor.metric or (self._watched[0] if self._watched else next(iter(self._metrics)))
        if name not in self._metrics:
            raise ConfigError(
                f"monitor.metric: this evaluation returned no metric {name!r}{nearest(name, self._metrics)}"
            )
        lower = self.monitor.mode == "min" if self.monitor.mode else lower_is_better(name)
        return name, 1.0 if lower else -1.0

    def _finish(self, reason: str, stopped: Stop, seconds: float) -> Result:
        keeps_best = self._best is not None and self.monitor.keep_best
        for learner in self.learners:
            learner.strategy.finish()
        if keeps_best:
            for name, models in self._files.items():
                load_model(self.directory / name, models, self.transport)
        else:
            for learner in self.learners:
                learner.average_statistics(self.transport)
            self._save()
        result = Result(
            reason=reason,
            steps=self.step,
            epochs=self.epoch + 1,
            seconds=seconds,
            samples_per_second=self._samples / max(seconds, 1e-9),
            directory=self.directory,
            metrics=self._best_metrics if keeps_best else self._metrics if self._evaluated_at == self.step else {},
            last_metrics=self._metrics,
            best_metric=self._watched[0] if self._watched else None,
            best=self._best[0] if self._best else None,
            best_step=self._best[1] if self._best else None,
            kept_step=self._best[1] if self._best and keeps_best else self.step,
            skipped=max(learner.skipped for learner in self.learners),
            exit_code={Stop.INTERRUPTED: INTERRUPTED, Stop.TERMINATED: TERMINATED}.get(stopped, 0),
        )
        if self.world.rank == 0:
            write_json(self.directory / "result.json", result.as_dict())
            for name in self._files:
                make_durable(self.directory / name)
        self._emit("end", result.as_dict())
        return result

    def _save(self) -> None:
        """Write the models as they are, on rank 0."""
        if self.world.rank == 0:
            for name, models in self._files.items():
                save_model(self.directory / name, models)

    def _emit(self, kind: str, values: Mapping[str, Any]) -> None:
        record = Record(kind, self.step, self.epoch, values)
        for observer in self._observers:
            if observer(record) is True:
                self._agreement.ask(Stop.ASKED)


_REASONS = {
    Stop.ASKED: "an observer asked for it",
    Stop.TIME: "max_seconds reached",
    Stop.INTERRUPTED: "interrupted (Ctrl-C)",
    Stop.TERMINATED: "terminated (SIGTERM)",
}


LOWER_IS_BETTER = ("loss", "error", "bits_per", "perplexity", "nll", "entropy", "distance", "divergence")
LOWER_IS_BETTER_ABBREVIATED = {
    "mae",
    "mse",
    "rmse",
    "mape",
    "wer",
    "cer",
    "per",
    "ppl",
    "bpc",
    "bpb",
    "fid",
    "eer",
    "ece",
    "ber",
    "bler",
}


def lower_is_better(name: str) -> bool:
    """Return whether a metric of this name is a cost, as far as names tell; ``monitor.mode`` settles it."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return any(word in name.lower() for word in LOWER_IS_BETTER) or bool(words & LOWER_IS_BETTER_ABBREVIATED)
