"""A run: the loop's body with everything a user expects around it (log, evaluate, stop, keep the best)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import nn

from distloop.agreement import Agreement, Signals, Stop
from distloop.checkpoint import load_model, make_durable, model_state, refuse_left_out, save_model, write_json
from distloop.errors import DataError, StorageError
from distloop.evaluation import Evaluation
from distloop.heartbeat import Heartbeat
from distloop.keeper import MOST_MISSES, Keeper
from distloop.ledger import Ledger
from distloop.limits import REASONS, Limits, exit_code
from distloop.loop import Collects, Update, train
from distloop.messages import gather_json
from distloop.monitor import Judge
from distloop.records import Observer, Record, Result
from distloop.transports import Transport
from distloop.turns import Turns
from distloop.world import World

PATIENCE = 5.0  # seconds that a failed run leaves a checkpoint that is being written
Report = Callable[[], dict[str, float]]  # what a task tells of its collecting, exact over all ranks


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
        judge: Judge,
        agreement: Agreement,
        ledger: Ledger,
        evaluation: Evaluation | None,
        directory: Path,
        averages: Mapping[str, nn.Module] | None = None,
        report: Report | None = None,
        replicas: Callable[[int], None] | None = None,
        observers: Sequence[Observer] = (),
        progress: Callable[[int], None] | None = None,
    ):
        self.task, self.turns, self.learners, self.world, self.transport = task, turns, turns.learners, world, transport
        self.limits, self.judge, self.directory = limits, judge, directory
        self._agreement, self.ledger, self._evaluation = agreement, ledger, evaluation
        self.observers, self._progress = list(observers), progress
        self.facts: dict[str, str] = {}  # what a user wants to see before the training
        self.on_close = ExitStack()
        models: dict[str, nn.Module] = {learner.name: learner.objective.model for learner in self.learners}
        self.files = {"model.safetensors": models} | ({"averages.safetensors": dict(averages)} if averages else {})
        for kept in self.files.values():
            model_state(kept)  # what cannot be saved is refused now, not after the training
        for learner in self.learners:
            refuse_left_out(learner.name, learner.objective.model, learner.strategy.parameters)
        self._report, self._replicas = report, replicas
        self.keeper: Keeper | None = None  # set by who builds it, if checkpoints are kept
        self.step = self.epoch = self._samples = 0
        self._begun = 0  # epochs
        self.following = (0, 0)  # the next global batch: its epoch, and its place in it
        self._trained = 0  # samples, in this attempt
        self._logged_at = 0
        self._saved_at = -1

    def run(self) -> Result:
        """Train until a limit or a decision ends it; return with the best model loaded."""
        failed = True
        try:
            result = self._run()
            failed = False
            return result
        except BaseException as failure:
            with suppress(Exception):  # whatever else breaks now, the first failure is the one to report
                self._emit("failure", {"error": f"{type(failure).__name__}: {failure}"})
            raise
        finally:
            if self.keeper is not None:
                self.keeper.saver.close(PATIENCE if failed else None)
            for learner in self.learners:
                learner.strategy.close()
            self.on_close.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where it is, in JSON's types; the same on all ranks."""
        return {
            "step": self.step,
            "following": list(self.following),
            "begun": self._begun,
            "samples": self._samples,
            "logged_at": self._logged_at,
            "judge": self.judge.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`; after the learners."""
        self.step, self._samples, self._logged_at = state["step"], state["samples"], state["logged_at"]
        epoch, batch = state["following"]
        self.following, self._begun, self.epoch = (epoch, batch), state["begun"], max(state["begun"] - 1, 0)
        self._saved_at = self.step
        self.judge.load_state_dict(state["judge"])

    def _run(self) -> Result:
        begun = time.monotonic()
        self._emit("start", self.facts)
        reason = self._over() if self.step else None
        self.ledger.restart_clock()
        with Signals(self._agreement):
            if reason is None:
                reason = self._train()
            stopped = self._agreement.now()
            reason = REASONS.get(stopped, reason)
            saved = stopped >= Stop.REQUESTED and self._save(last=True)
            self._log()
            if stopped < Stop.REQUESTED:
                if self._evaluation is not None and self.judge.evaluated_at != self.step:
                    self._evaluate()
                self._save(last=True)
            return self._finish(reason, exit_code(stopped, saved=saved), time.monotonic() - begun)

    def _train(self) -> str:
        for update in train(self.task, self.turns, self._epochs(), self.world):
            last = update.learner is self.turns.last
            self.ledger.add(update, self.step + 1, last=last)
            if last and (stop := self._after_batch(update)):
                return stop
        return "all epochs done"

    def _over(self) -> str | None:
        """Return why there is nothing left to do, if so."""
        return self.limits.reached(self.step) or (self.judge.enough() if self.judge.evaluated_at == self.step else None)

    def _epochs(self) -> Iterable[int]:
        """Yield epoch numbers, for ever if no number of epochs is set."""
        limits, epoch = self.limits, self.following[0]
        while limits.epochs is None or epoch < limits.epochs:
            self.epoch, self._begun, begun = epoch, epoch + 1, self.step
            yield epoch
            if self.step == begun:
                raise DataError(f"epoch {epoch} had no batch: extract(epoch, world) yielded nothing")
            epoch += 1

    def _after_batch(self, update: Update) -> str | None:
        """Log, evaluate, save and decide after all learners' turns on a global batch; return a reason to stop."""
        limits, position = self.limits, update.position
        self.step += 1
        self._samples += position.samples
        self._trained += position.samples
        self.following = (update.epoch + 1, 0) if position.last else (update.epoch, position.batch + 1)
        if (heartbeat := Heartbeat.current()) is not None:
            heartbeat.step(self.step)
        if self._replicas is not None:
            self._replicas(self.step)
        if self._progress is not None:
            self._progress(self.step)
        evaluate = self._evaluation is not None and limits.evaluation_due(self.step, update)
        if evaluate or self.step - self._logged_at >= limits.log_every:
            self._logged_at = self.step
            self._log()
        elif self.step == 1:
            self._log()  # at once, to show that it goes
        if self.keeper is not None and self._trained == position.samples:
            self.keeper.rehearse()  # what cannot be saved is refused now, not after the training
        stop = self._evaluate() if evaluate else None
        agreed = self._agreement()
        stop = REASONS[agreed] if agreed else limits.reached(self.step) or stop
        if stop is None and (limits.save_due(self.step, update) or self._agreement.save_due()):
            self._save()
        self._tell_of_saves()
        return stop

    def _save(self, *, last: bool = False) -> bool:
        """Begin to save; return, if it is the ``last``, when that is done, and whether all is safe."""
        if self.keeper is None:
            return False
        begun = time.monotonic()
        if self._saved_at != self.step:
            self.ledger.check()
            best = self.judge.best if self.judge.monitor.keep_best else None
            self.keeper.save(self.step, best.step if best else None)
            self._saved_at = self.step
        self._agreement.saved()
        self.ledger.leave_out(time.monotonic() - begun)
        if not last:
            return False
        self._agreement.now()  # all ranks have begun
        self.keeper.saver.drain()
        self._tell_of_saves()
        return bool(gather_json(self.transport, self.keeper.misses == 0)[0])

    def _tell_of_saves(self) -> None:
        """Say how saves have ended; ask for an end if none succeeds any more."""
        if self.keeper is None:
            return
        for saved in self.keeper.take():
            values: dict[str, Any] = {"saved_step": saved.step, "seconds": saved.seconds, "bytes": saved.nbytes}
            if saved.failure is not None:
                values = {"saved_step": saved.step, "failure": saved.failure}
            warning = self.keeper.too_slow(saved)
            self._emit("checkpoint", values | ({"warning": warning} if warning else {}))
            if self.keeper.misses >= MOST_MISSES:
                self._agreement.ask(Stop.STORAGE)

    def _log(self) -> None:
        values = self.ledger.close()
        if values is not None:
            self._emit("train", values | (self._report() if self._report is not None else {}))

    def _evaluate(self) -> str | None:
        """Evaluate; return a reason to stop, if there is one. Its time, and that of pictures, is not the training's."""
        assert self._evaluation is not None
        with ExitStack() as stack:
            for learner in self.learners:
                stack.enter_context(learner.strategy.whole())
            self._judge(self._evaluation)
        self.ledger.restart_clock()
        return self.judge.enough()

    def _judge(self, evaluation: Evaluation) -> None:
        """Evaluate and remember the best."""
        for learner in self.learners:
            learner.average_statistics(self.transport)
        metrics = evaluation()
        if not metrics:
            self.judge.evaluated_at = self.step
            return
        better, cost = self.judge(metrics, self.step)
        for learner in self.learners:
            learner.schedule.observe(cost)
        self._emit("evaluate", metrics | {"best": better})
        if better and self.judge.monitor.keep_best:
            self._keep_best()

    def _finish(self, reason: str, exit_code: int, seconds: float) -> Result:
        judge, best = self.judge, self.judge.best
        keeps_best = best is not None and judge.monitor.keep_best
        for learner in self.learners:
            learner.strategy.finish()
        if keeps_best:
            for name, models in self.files.items():
                load_model(self.directory / name, models, self.transport)
        else:
            for learner in self.learners:
                learner.average_statistics(self.transport)
            self._write_models()
        metrics = judge.metrics if judge.evaluated_at == self.step else {}
        result = Result(
            reason=reason,
            steps=self.step,
            epochs=self._begun,
            seconds=seconds,
            samples_per_second=self._trained / max(seconds, 1e-9),
            directory=self.directory,
            metrics=best.metrics if best and keeps_best else metrics,
            last_metrics=judge.metrics,
            best_metric=judge.metric,
            best=best.value if best else None,
            best_step=best.step if best else None,
            kept_step=best.step if best and keeps_best else self.step,
            skipped=max(learner.skipped for learner in self.learners),
            exit_code=exit_code,
        )
        if self.world.rank == 0:
            write_json(self.directory / "result.json", result.as_dict())
            for name in self.files:
                make_durable(self.directory / name)
        self._emit("end", result.as_dict())
        return result

    def _keep_best(self) -> None:
        """Write the models as they are; a disk that is full now may not be so later."""
        try:
            self._write_models()
        except StorageError as failure:
            if self.keeper is None:
                raise
            self.keeper.saver.miss(self.step, str(failure))

    def _write_models(self) -> None:
        """Write the models as they are, on rank 0."""
        if self.world.rank == 0:
            for name, models in self.files.items():
                save_model(self.directory / name, models)

    def _emit(self, kind: str, values: Mapping[str, Any]) -> None:
        record = Record(kind, self.step, self.epoch, values)
        for observer in self.observers:
            if observer(record) is True:
                self._agreement.ask(Stop.ASKED)
