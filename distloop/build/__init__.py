"""From a configuration to a run. Only this package and the command line know the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from distloop.agreement import Agreement
from distloop.build import run_directory
from distloop.build.deterministic import hold_to_leaves
from distloop.build.differences import compare
from distloop.build.evaluating import describe_monitor, make_evaluation
from distloop.build.facts import facts
from distloop.build.feeding import Fed
from distloop.build.idle import idle
from distloop.build.keeping import make_keeper, resumed_facts
from distloop.build.length import epochs_of, steps_of
from distloop.build.method import Method
from distloop.build.models import (
    make_strategy,
    moving_averages,
    options_from,
    refuse_shared_parameters,
    refuse_what_runs_models,
)
from distloop.build.place import Place, make_place
from distloop.build.run_directory import RunDirectory
from distloop.data import derive_seed
from distloop.errors import found_by_all
from distloop.evaluation import Evaluation
from distloop.learner import Learner
from distloop.ledger import Ledger
from distloop.limits import Limits
from distloop.messages import agree_on
from distloop.monitor import Judge, Monitor
from distloop.objective import Objective
from distloop.observers import make_observers
from distloop.optimizer import Optimizer
from distloop.records import Observer
from distloop.replicas import compare as compare_replicas
from distloop.resumed import Resumed
from distloop.session import Session
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
    for learner in (resolved, *resolved.learners.values()):
        method = Method(learner)
        if cuts_parameters(name):
            method.refuse_whole_parameters(name)
    resolved.refuse_unread("strategy", name, {"name"} | options_of(name))
    for one in idle(resolved.config):
        resolved.refuse_idle(one.key, one.chooser, one.reader)
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
        """Build everything, or what a checkpoint says of it; call it on every rank at the same time."""
        with ExitStack() as stack:
            directory = run_directory.find(self.config, place.world, place.transport)
            if directory is not None:
                stack.callback(directory.close)
            session = self._session(place, directory, observers, stack)
            session.on_close = stack.pop_all()
        return session

    def _session(
        self, place: Place, directory: RunDirectory | None, observers: Sequence[Observer], stack: ExitStack
    ) -> Session:
        resumed = None if directory is None or directory.checkpoint is None else Resumed(directory.checkpoint)
        notes: list[str] = []
        if resumed is not None:
            with found_by_all():
                known = resumed.checkpoint.state["described"]["configuration"]
                notes = compare(self.resolved, known, resumed.checkpoint.path)
        task, strategies, fed = self._begin(place)
        if resumed is None:
            fed.collect(0)
        else:
            fed.steps = resumed.own_facts("data")["steps"]
        turns = self._turns(task, strategies, steps_of(self.config, fed.steps))
        evaluation = make_evaluation(task, place, self.config)
        monitored = describe_monitor(self.resolved, evaluation)
        if directory is None:
            directory = run_directory.make(self.config, place.world, place.transport)
            stack.callback(directory.close)
        session = self._make_session(task, turns, fed, evaluation, place, directory.path, observers)
        keeper = make_keeper(session, task, fed, place, directory, self.resolved)
        if resumed is not None:
            keeper.restore(resumed)
            if self.config.monitor.keep_best and not keeper.has_best(resumed):
                session.judge.best = None  # it was not kept, so it cannot be returned to
        if self.config.checkpoint.enabled:
            session.keeper = keeper
        if place.world.rank == 0:
            run_directory.write_configuration(directory.path, self.resolved)
        epochs, (epoch, start) = epochs_of(self.config), session.following
        fed.begin(epoch, start)
        first = fed.collect(epoch) if epochs is None or epoch < epochs else None
        steps = steps_of(self.config, fed.steps)
        session.facts = facts(self.resolved, turns.learners, first, steps, place, directory.path, monitored)
        session.facts |= resumed_facts(resumed, [*directory.notes, *notes, *fed.notes], place)
        if resumed is not None:
            keeper.restore_random(resumed)
        return session

    def _begin(self, place: Place) -> tuple[Any, dict[str, Strategy], Fed]:
        """Make the task, the same on all ranks, what collects its gradients, and what feeds it."""
        config, world, transport = self.config, place.world, place.transport
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
        return task, strategies, Fed(task, config, place, weighers, site, in_step=in_step)

    def _make_session(
        self,
        task: Any,
        turns: Turns,
        fed: Fed,
        evaluation: Evaluation | None,
        place: Place,
        directory: Path,
        observers: Sequence[Observer],
    ) -> Session:
        config, world = self.config, place.world
        shown, progress = self._observers(task, directory, steps_of(config, fed.steps), world.rank)
        save_seconds = config.checkpoint.every_seconds if config.checkpoint.enabled else None
        return Session(
            fed,
            turns,
            world=world,
            transport=place.transport,
            limits=self._limits(),
            judge=Judge(self._monitor()),
            agreement=Agreement(place.transport, max_seconds=config.train.max_seconds, save_seconds=save_seconds),
            ledger=Ledger(
                turns.learners,
                place.transport,
                collecting=fed.take_seconds,
                explosion=config.monitor.explosion,
            ),
            evaluation=evaluation,
            directory=directory,
            averages=moving_averages(task.objectives),
            replicas=compare_replicas(turns.learners, place.transport, config.monitor.replicas_every),
            report=fed.report if hasattr(task, "report") else None,
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
            save_steps=config.checkpoint.every_steps,
            save_epochs=config.checkpoint.every_epochs,
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
