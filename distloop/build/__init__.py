"""From a configuration to a run. Only this package and the command line know the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distloop.agreement import Agreement
from distloop.build.contents import fingerprint, samples_in
from distloop.build.facts import facts
from distloop.build.length import epochs_of, steps_of
from distloop.build.method import Method
from distloop.build.place import Place, make_directory, make_place, write_configuration
from distloop.data import Batches, Plan, derive_seed
from distloop.errors import ConfigError, nearest
from distloop.evaluation import Evaluation
from distloop.learner import Learner, Objective, autocast, trained_parameters
from distloop.ledger import Ledger
from distloop.loading import Loading
from distloop.messages import agree_on
from distloop.observers import make_observers
from distloop.optimizer import Optimizer
from distloop.records import Observer
from distloop.session import Limits, Monitor, Session, lower_is_better
from distloop.settings import Resolved
from distloop.strategies import STRATEGIES, Options, Strategy, make
from distloop.strategies.base import agree_on_model
from distloop.tasks import import_object, make_task

Weighers = Mapping[str, Callable[[Any], float]]
Progress = Callable[[int], None]

__all__ = ["Builder", "Place", "make_place"]


class Fed:
    """A task whose ``collect`` gives what the loop extracts from: the user's data set, in global batches.

    Collecting happens under the same seed on every rank, whatever they drew before: a data set that is made at random
    must be the same on all of them.
    """

    def __init__(self, task: Any, batches: Callable[[Any, int], Batches], seed: int):
        self._task, self._batches, self._seed = task, batches, seed
        self._epoch: int | None = None
        self._data: Any = None
        self._size: int | None = None
        self._fed: Any = None

    def collect(self, epoch: int) -> Any:
        """Return the data of ``epoch`` in global batches; collected once, however often it is asked for."""
        if epoch != self._epoch:
            self._epoch = epoch
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive_seed("collect", self._seed, epoch))
                self._enter(self._task.collect(epoch))
        return self._fed

    def _enter(self, data: Any) -> None:
        if hasattr(data, "extract"):
            self._fed = data
            return
        size = samples_in(data, "collect(epoch)")
        if data is not self._data or size != self._size:
            self._data, self._size, self._fed = data, size, self._batches(data, size)


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
        agree_on(transport, self._run_facts(), "the configuration")
        torch.manual_seed(config.train.seed)  # the same first weights on every rank
        task = self._task
        if task is None:
            task = make_task(config.task.name, config.task.options, self.resolved.source("task.name"))
        agree_on(transport, {"objectives": list(task.objectives)}, "the task")
        strategies = {name: self._strategy(name, o, place) for name, o in task.objectives.items()}
        # From here on ranks draw different numbers: dropout must not repeat itself on every rank.
        torch.manual_seed(derive_seed("rank", config.train.seed, world.rank))
        weighers = {name: o.weight for name, o in task.objectives.items() if hasattr(o, "weight")}
        fed = Fed(task, lambda data, size: self._batches(task, data, size, place, weighers), config.train.seed)
        plan = getattr(fed.collect(0), "plan", None)
        steps = steps_of(config, plan)
        learners = [self._learner(name, o, strategies[name], steps) for name, o in task.objectives.items()]
        evaluation = self._evaluation(task, place)
        monitored = self._check_monitor(evaluation)
        directory = make_directory(config, world, transport)
        if world.rank == 0:
            write_configuration(directory, self.resolved)
        shown, progress = self._observers(directory, steps, world.rank)
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
            evaluation=evaluation,
            directory=directory,
            facts=facts(config, learners, plan, steps, place, directory, monitored),
            observers=[*shown, *(observers if world.rank == 0 else ())],
            progress=progress,
        )

    def _observers(self, directory: Path, steps: int | None, rank: int) -> tuple[list[Observer], Progress | None]:
        """Return the supplied observers and those that the configuration names, and what advances the progress bar."""
        log = self.config.log
        supplied, progress = make_observers(
            directory,
            rank=rank,
            total_steps=steps,
            progress=log.progress,
            tensorboard=log.tensorboard,
            picture=log.picture,
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

    def _batches(self, task: Any, data: Any, size: int, place: Place, weighers: Weighers) -> Batches:
        agree_on(place.transport, {"number of samples": size, "contents": fingerprint(data)}, "the data set")
        return Batches(
            data,
            Plan(size, self.config.data.global_batch_size, self.config.data.micro_batch_size),
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
            loading=self._loading(),
            precision=lambda: autocast(place.device, self.config.precision.name),
        )

    def _strategy(self, name: str, objective: Objective, place: Place) -> Strategy:
        """Move a model to its device, make it the same on all ranks, and choose how its gradients are collected."""
        model = objective.model.to(place.device)
        for held in vars(objective).values():  # a loss with class weights, a frozen teacher
            if isinstance(held, nn.Module):
                held.to(place.device)
        if place.world.size > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise ConfigError(
                f"objective {name!r}: SyncBatchNorm waits for every rank at every forward pass, and here a rank may "
                "have fewer of them or none; use GroupNorm or LayerNorm, or BatchNorm"
            )
        parameters = trained_parameters(name, model)
        options = Options(self.config.strategy.bucket_mb, self.config.strategy.unused_parameters)
        strategy = make(self.config.strategy.name, parameters, place.transport, options)
        rest = {key: t for key, t in (*model.named_parameters(), *model.named_buffers()) if key not in parameters}
        agree_on_model(rest, place.transport)
        for tensor in rest.values():
            place.transport.broadcast(tensor.detach())
        return strategy

    def _learner(self, name: str, objective: Objective, strategy: Strategy, steps: int | None) -> Learner:
        return Learner(
            name,
            objective,
            strategy,
            Optimizer(self._method.rule(), strategy.shards, self._method.decays(strategy.parameters)),
            lr=self._method.lr,
            schedule=self._method.schedule(steps),
            transforms=self._method.transforms(),
            precision=self.config.precision.name,
            unused=self.config.strategy.unused_parameters,
        )

    def _check_monitor(self, evaluation: Evaluation | None) -> str | None:
        """Refuse to wait for a metric that will never come; return in words what is watched."""
        monitor, error = self.config.monitor, self.resolved.error
        if evaluation is None:
            waiting = {"monitor.metric": monitor.metric, "monitor.patience": monitor.patience}
            for dotted, value in waiting.items():
                if value is not None:
                    raise error(dotted, "needs validation data, and the task has none")
            if self.config.schedule.name == "plateau":
                raise error("schedule.name", "plateau needs validation data, and the task has none")
            return None
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
        return f"{name}, {'lower' if lower else 'higher'} is better; {kept}"

    def _run_facts(self) -> dict[str, Any]:
        """Return what must be the same on every rank before any of it is used: all that decides what is computed."""
        own = {"log.directory", "log.name", "log.progress", "log.tensorboard", "log.picture", "log.observers"}
        own |= {"world.threads", "data.workers", "data.prefetch", "data.pin_memory", "data.worker_timeout"}
        values = {dotted: value for dotted, value, _ in self.resolved.rows() if dotted not in own}
        return values | {"version of torch": torch.__version__}
