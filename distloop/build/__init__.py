"""From a configuration to a run. Only this package and the command line know the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distloop.agreement import Agreement
from distloop.build.contents import fingerprint, samples_in
from distloop.build.deterministic import hold_to_leaves, leaves_of
from distloop.build.facts import facts
from distloop.build.feeding import Fed, make_loading
from distloop.build.length import epochs_of, steps_of
from distloop.build.method import Method
from distloop.build.models import (
    make_strategy,
    moving_averages,
    options_from,
    refuse_shared_parameters,
    refuse_what_runs_models,
)
from distloop.build.place import Place, make_directory, make_place, write_configuration
from distloop.data import derive_seed
from distloop.errors import nearest
from distloop.evaluation import Evaluation
from distloop.learner import Learner, Objective, autocast
from distloop.ledger import Ledger
from distloop.messages import agree_on
from distloop.observers import make_observers
from distloop.optimizer import Optimizer
from distloop.records import Observer
from distloop.session import Limits, Monitor, Session, lower_is_better
from distloop.settings import Resolved
from distloop.site import Site
from distloop.strategies import STRATEGIES, Strategy, cuts_parameters, has_copies, options_of
from distloop.strategies import check as check_strategy
from distloop.tasks import import_object, make_task
from distloop.turns import Turns, checked_turns

Progress = Callable[[int], None]

__all__ = ["Builder", "Place", "check", "make_place"]


def check(resolved: Resolved) -> None:
    """Check a configuration's names, and that the chosen methods read the keys that were given.

    Raises:
        ConfigError: it contradicts itself.
    """
    resolved.choose("strategy.name", STRATEGIES)
    name = resolved.config.strategy.name
    for one in (resolved, *resolved.learners.values()):
        method = Method(one)
        if cuts_parameters(name):
            method.refuse_whole_parameters(name)
    resolved.refuse_unread("strategy", name, {"name"} | options_of(name))
    if resolved.config.precision.weights == "half":
        if not has_copies(name):
            raise resolved.error("precision.weights", f"{name} has no fp32 copies of half-precision weights")
        if resolved.config.precision.name == "fp32":
            raise resolved.error("precision.weights", "half is a half of what? set precision.name to bf16 or fp16")
    check_strategy(name, options_from(resolved.config))


class Builder:
    """Checks a configuration, and builds the session that it describes.

    Args:
        resolved: the configuration, with the source of each value for error messages.
        task: a task object, in place of the one that the configuration names.

    Raises:
        ConfigError: the configuration contradicts itself. No rank has been talked to then.
    """

    def __init__(self, resolved: Resolved, task: Any = None):
        self.resolved, self.config = resolved, resolved.config
        self._task = task
        check(resolved)

    def session(self, place: Place, observers: Sequence[Observer] = ()) -> Session:
        """Build everything; call it on every rank at the same time."""
        config, world, transport = self.config, place.world, place.transport
        agree_on(transport, self._run_facts(), "the configuration")
        torch.manual_seed(config.train.seed)  # the same first weights on every rank
        task = self._given_or_named()
        objectives: Mapping[str, Objective] = task.objectives
        agree_on(transport, {"objectives": list(objectives), "turns": checked_turns(task)}, "the task")
        self.resolved.check_learners(objectives)
        refuse_shared_parameters(objectives)
        strategies = self._strategies(task, place)
        # From here on ranks draw different numbers: dropout must not repeat itself on every rank.
        torch.manual_seed(derive_seed("rank", config.train.seed, world.rank))
        site = Site(world, transport, place.device, config.train.seed)
        if hasattr(task, "join"):
            task.join(site)
        weighers = {name: o.weight for name, o in objectives.items() if hasattr(o, "weight")}
        in_step = any(one.in_step for one in strategies.values())
        fed = Fed(task, config, place, weighers, site, in_step=in_step)
        first = fed.collect(0)
        steps = steps_of(config, getattr(first, "plan", None))
        turns = self._turns(task, strategies, steps)
        evaluation = self._evaluation(task, place)
        monitored = self._check_monitor(evaluation)
        directory = make_directory(config, world, transport)
        if world.rank == 0:
            write_configuration(directory, self.resolved)
        shown, progress = self._observers(task, directory, steps, world.rank)
        return Session(
            fed,
            turns,
            world=world,
            transport=transport,
            limits=self._limits(),
            monitor=self._monitor(),
            agreement=Agreement(transport, max_seconds=config.train.max_seconds),
            ledger=Ledger(turns.learners, transport, collecting=fed.take_seconds, explosion=config.monitor.explosion),
            evaluation=evaluation,
            directory=directory,
            averages=moving_averages(objectives),
            report=fed.report if hasattr(task, "report") else None,
            facts=facts(self.resolved, turns.learners, first, steps, place, directory, monitored),
            observers=[*shown, *(observers if world.rank == 0 else ())],
            progress=progress,
        )

    def _strategies(self, task: Any, place: Place) -> dict[str, Strategy]:
        strategies = {
            name: make_strategy(name, objective, place, self.config, Method(self.resolved.for_learner(name)))
            for name, objective in task.objectives.items()
        }
        refuse_what_runs_models(task, strategies)
        return strategies

    def _given_or_named(self) -> Any:
        """Return the task object that was given, or a new one of the configured name."""
        if self._task is not None:
            return self._task
        c, sources = self.config.task, self.resolved.sources
        return make_task(c.name, c.options, self.resolved.source("task.name"), sources)

    def _observers(
        self, task: Any, directory: Path, steps: int | None, rank: int
    ) -> tuple[list[Observer], Progress | None]:
        """Return the supplied observers and those that the configuration names, and what advances the progress bar."""
        log = self.config.log
        supplied, progress = make_observers(
            directory,
            rank=rank,
            total_steps=steps,
            progress=log.progress,
            tensorboard=log.tensorboard,
            picture=log.picture,
            task=task,
        )
        named = [import_object(path, self.resolved.source("log.observers")) for path in log.observers]
        return [*supplied, *(named if rank == 0 else [])], progress

    def _limits(self) -> Limits:
        config = self.config
        return Limits(
            epochs=epochs_of(config),
            max_steps=config.train.max_steps,
            log_every=config.log.every,
            evaluate_steps=config.evaluate.every_steps,
            evaluate_epochs=config.evaluate.every_epochs,
        )

    def _evaluation(self, task: Any, place: Place) -> Evaluation | None:
        samples = getattr(task, "validation", None)
        size = 0 if samples is None else samples_in(samples, "validation")
        facts = {"number of validation samples": size, "contents": fingerprint(samples)}
        agree_on(place.transport, facts, "the validation data")
        if samples is None:
            return None
        for metric in getattr(task, "metrics", {}).values():
            if hasattr(metric, "to"):  # torchmetrics keep their sums where their inputs are
                metric.to(place.device)
        return Evaluation(
            task,
            samples,
            size,
            batch_size=self.config.evaluate.batch_size,
            models=[objective.model for objective in task.objectives.values()],
            world=place.world,
            transport=place.transport,
            device=place.device,
            collate=getattr(task, "collate", None),
            loading=make_loading(self.config),
            precision=lambda: autocast(place.device, self.config.precision.name),
            leaves=leaves_of(self.config),
            seed=self.config.train.seed,
        )

    def _monitor(self) -> Monitor:
        c = self.config.monitor
        return Monitor(c.metric, c.mode, c.patience, c.min_delta, c.keep_best, c.target)

    def _turns(self, task: Any, strategies: Mapping[str, Strategy], steps: int | None) -> Turns:
        """Return the learners in the order of their turns; ``steps`` is the number of global batches, if known."""
        every = checked_turns(task)
        learners = []
        for name, objective in task.objectives.items():
            own = None if steps is None else max(1, steps // every.get(name, 1))
            learners.append(self._learner(name, objective, strategies[name], own))
        hold_to_leaves(learners, task, self.config.train.seed)
        return Turns(learners, every)

    def _learner(self, name: str, objective: Objective, strategy: Strategy, steps: int | None) -> Learner:
        method = Method(self.resolved.for_learner(name))
        return Learner(
            name,
            objective,
            strategy,
            Optimizer(method.rule(on_host=strategy.on_host), strategy.shards, method.decays(strategy.parameters)),
            lr=method.lr,
            schedule=method.schedule(steps),
            transforms=[] if strategy.updates_itself else method.transforms(),
            precision=self.config.precision.name,
            unused=self.config.strategy.unused_parameters,
        )

    def _check_monitor(self, evaluation: Evaluation | None) -> str | None:
        """Refuse to wait for a metric that will never come; return in words what is watched."""
        monitor, error = self.config.monitor, self.resolved.error
        if evaluation is None:
            waiting = {f"monitor.{key}": getattr(monitor, key) for key in ("metric", "patience", "target")}
            for dotted, value in waiting.items():
                if value is not None:
                    raise error(dotted, "needs validation data, and the task has none")
            for one in (self.resolved, *self.resolved.learners.values()):
                if one.config.schedule.name == "plateau":
                    raise one.error("schedule.name", "plateau needs validation data, and the task has none")
            return None
        if monitor.target is not None and monitor.metric is None:
            raise error("monitor.target", "of which metric? set monitor.metric as well")
        # One batch is evaluated now, so that a mistake in it shows before the training and not after an epoch of it.
        names = evaluation.names()
        if monitor.metric is not None and monitor.metric not in names:
            hint = nearest(monitor.metric, names)
            raise error("monitor.metric", f"evaluation of the first batch returns no metric {monitor.metric!r}{hint}")
        if not names:
            return None
        name = monitor.metric or names[0]
        lower = monitor.mode == "min" if monitor.mode else lower_is_better(name)
        kept = "the best model is kept" if monitor.keep_best else "the last model is kept"
        enough = "" if monitor.target is None else f", {monitor.target:g} is enough"
        return f"{name}, {'lower' if lower else 'higher'} is better{enough}; {kept}"

    def _run_facts(self) -> dict[str, Any]:
        """Return what must be the same on every rank before any of it is used: all that decides what is computed."""
        own = {"log.directory", "log.name", "log.progress", "log.tensorboard", "log.picture", "log.observers"}
        own |= {"world.threads", "data.workers", "data.prefetch", "data.pin_memory", "data.worker_timeout"}
        values = {dotted: value for dotted, value, _ in self.resolved.rows() if dotted not in own}
        return values | {"version of torch": torch.__version__}
