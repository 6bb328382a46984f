"""From a configuration to a run. Only this package and the command line know the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distloop.agreement import Agreement
from distloop.build.facts import facts
from distloop.build.method import Method
from distloop.build.place import Place, make_directory, make_place, write_configuration
from distloop.data import Batches, Loading, Plan, derive_seed
from distloop.errors import DataError
from distloop.evaluation import Evaluation
from distloop.learner import Learner, Objective, autocast, trained_parameters
from distloop.ledger import Ledger
from distloop.observers import make_observers
from distloop.optimizer import Optimizer
from distloop.session import Limits, Monitor, Observer, Session
from distloop.settings import Resolved
from distloop.strategies import STRATEGIES, Options, make
from distloop.tasks import import_object, make_task

Weighers = Mapping[str, Callable[[Any], float]]

__all__ = ["Builder", "Place", "make_place"]


class Fed:
    """A task whose ``collect`` gives what the loop extracts from: the user's data set, in global batches."""

    def __init__(self, task: Any, batches: Callable[[Any], Batches]):
        self._task, self._batches = task, batches
        self._data: Any = None
        self._fed: Any = None
        self._peeked: tuple[int, Any] | None = None

    def collect(self, epoch: int) -> Any:
        """Return the data of ``epoch`` in global batches; the same object as long as the user's is the same."""
        if self._peeked is not None and self._peeked[0] == epoch:
            data, self._peeked = self._peeked[1], None
        else:
            data = self._task.collect(epoch)
        if hasattr(data, "extract"):
            return data
        if data is not self._data:
            self._data, self._fed = data, self._batches(data)
        return self._fed

    def peek(self, epoch: int) -> Any:
        """Return the user's data of ``epoch``; the loop will get the same, collected once."""
        self._peeked = epoch, self._task.collect(epoch)
        return self._peeked[1]


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
        self._method = Method(resolved)
        resolved.choose("strategy.name", STRATEGIES)

    def session(self, place: Place, observers: Sequence[Observer] = ()) -> Session:
        """Build everything; call it on every rank at the same time."""
        config, world, transport = self.config, place.world, place.transport
        torch.manual_seed(config.train.seed)  # the same first weights on every rank
        task = self._task
        if task is None:
            task = make_task(config.task.name, config.task.options, self.resolved.source("task.name"))
        for objective in task.objectives.values():
            objective.model.to(place.device)
        weighers = {name: o.weight for name, o in task.objectives.items() if hasattr(o, "weight")}
        fed = Fed(task, lambda data: self._batches(task, data, place, weighers))
        first = fed.peek(0)
        plan = None if hasattr(first, "extract") else self._plan(first)
        steps = self._steps(plan)
        learners = [self._learner(name, o, steps, place) for name, o in task.objectives.items()]
        # From here on ranks draw different numbers: dropout must not repeat itself on every rank.
        torch.manual_seed(derive_seed("rank", config.train.seed, world.rank))
        directory = make_directory(config, world, transport)
        if world.rank == 0:
            write_configuration(directory, self.resolved)
        built_in, progress = make_observers(
            directory,
            rank=world.rank,
            total_steps=steps,
            progress=config.log.progress,
            tensorboard=config.log.tensorboard,
            picture=config.log.picture,
        )
        named = [import_object(path, self.resolved.source("log.observers")) for path in config.log.observers]
        users = [*named, *observers] if world.rank == 0 else []
        monitor = config.monitor
        return Session(
            fed,
            learners,
            world=world,
            transport=transport,
            limits=self._limits(),
            monitor=Monitor(monitor.metric, monitor.mode, monitor.patience, monitor.min_delta, monitor.keep_best),
            agreement=Agreement(transport, max_seconds=config.train.max_seconds),
            ledger=Ledger(learners, transport, explosion=monitor.explosion),
            evaluation=self._evaluation(task, place),
            directory=directory,
            facts=facts(config, learners, plan, steps, place, directory),
            observers=[*built_in, *users],
            progress=progress,
        )

    @property
    def _epochs(self) -> int | None:
        train = self.config.train
        unlimited = train.epochs is None and train.max_steps is None and train.max_seconds is None
        return 10 if unlimited else train.epochs

    def _limits(self) -> Limits:
        config = self.config
        return Limits(
            epochs=self._epochs,
            max_steps=config.train.max_steps,
            log_every=config.log.every,
            evaluate_steps=config.evaluate.every_steps,
            evaluate_epochs=config.evaluate.every_epochs,
        )

    def _steps(self, plan: Plan | None) -> int | None:
        """Return how many updates the run will make, if that can be told."""
        by_epochs = plan.steps * self._epochs if plan is not None and self._epochs is not None else None
        known = [n for n in (by_epochs, self.config.train.max_steps) if n is not None]
        return min(known) if known else None

    def _plan(self, data: Any) -> Plan:
        return Plan(
            _size(data, "collect(epoch)"), self.config.data.global_batch_size, self.config.data.micro_batch_size
        )

    def _batches(self, task: Any, data: Any, place: Place, weighers: Weighers) -> Batches:
        return Batches(
            data,
            self._plan(data),
            seed=self.config.train.seed,
            shuffle=self.config.data.shuffle,
            device=place.device,
            loading=self._loading(),
            collate=getattr(task, "collate", None),
            weighers=weighers,
            transport=place.transport,
        )

    def _loading(self) -> Loading:
        data = self.config.data
        return Loading(data.workers, data.prefetch, data.pin_memory, data.worker_timeout)

    def _evaluation(self, task: Any, place: Place) -> Evaluation | None:
        samples = getattr(task, "validation", None)
        if samples is None:
            return None
        return Evaluation(
            task,
            samples,
            _size(samples, "validation"),
            batch_size=self.config.evaluate.batch_size,
            models=[objective.model for objective in task.objectives.values()],
            world=place.world,
            transport=place.transport,
            device=place.device,
            collate=getattr(task, "collate", None),
            loading=self._loading(),
            precision=lambda: autocast(place.device, self.config.precision.name),
        )

    def _learner(self, name: str, objective: Objective, steps: int | None, place: Place) -> Learner:
        config, model = self.config, objective.model
        parameters = trained_parameters(name, model)
        options = Options(config.strategy.bucket_mb, config.strategy.unused_parameters)
        strategy = make(config.strategy.name, parameters, place.transport, options)
        _share_buffers(model, place)
        return Learner(
            name,
            objective,
            strategy,
            Optimizer(self._method.rule(), strategy.shards, self._method.decays(parameters)),
            lr=self._method.lr,
            schedule=self._method.schedule(steps),
            transforms=self._method.transforms(),
            precision=config.precision.name,
            unused=config.strategy.unused_parameters,
        )


def _share_buffers(model: nn.Module, place: Place) -> None:
    for buffer in model.buffers():
        place.transport.broadcast(buffer)


def _size(data: Any, what: str) -> int:
    try:
        size = len(data)
    except TypeError:
        raise DataError(f"{what}: a {type(data).__name__} is no map-style data set: it has no length") from None
    if size == 0:
        raise DataError(f"{what}: the data set is empty")
    return size
