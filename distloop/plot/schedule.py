"""The learning rate of every update of a run, before it begins: by the very schedule that the run will use."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distloop.build.facts import describe_optimizer
from distloop.build.feeding import Fed
from distloop.build.length import epochs_of, steps_of
from distloop.build.method import Method
from distloop.build.place import Place
from distloop.config import Config
from distloop.errors import DistloopError
from distloop.observers.curves import new_figure, plain
from distloop.plan import Plan
from distloop.plot import save
from distloop.settings import Resolved
from distloop.site import Site
from distloop.tasks import make_task
from distloop.transports import Alone
from distloop.turns import checked_turns
from distloop.world import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDLESS = 1000  # updates to draw of a schedule that has no end, in a run that has none
MOST_POINTS = 20_000


@dataclass(frozen=True)
class Planned:
    """The learning rates of a run to come. Updates count from 1, as in a run's log."""

    optimizers: dict[str, str]  # in the words of the run's start, by learner; "" stands for all of them
    updates: list[int]
    rates: dict[str, list[float]]  # by learner
    steps_per_epoch: int | None
    has_end: bool  # else only so many updates are shown


def plot_schedule(resolved: Resolved, output: Path) -> str:
    """Draw the learning rate of a configuration into ``output``; return what was drawn, in words.

    Raises:
        ConfigError: the configuration is wrong, or does not say how many updates there will be.
        DataError: the task's data cannot be read, and they alone would tell the number of updates.
        StorageError: ``output`` cannot be written.
    """
    planned = plan_rates(resolved)
    save(draw_schedule(resolved.config, planned), output)
    length = f"{planned.updates[-1]} updates"
    if planned.steps_per_epoch is not None:
        length += f" ({planned.steps_per_epoch} per epoch)"
    if not planned.has_end:
        length = f"the first {length} of a run without a set end"
    extent = "; ".join(
        f"{name}{': ' if name else ''}at most {max(rates):.3g}, at last {rates[-1]:.3g}"
        for name, rates in planned.rates.items()
    )
    return f"{output}: learning rate of {length}, {extent}"


def plan_rates(resolved: Resolved) -> Planned:
    """Return the learning rate of each update of the run that a configuration describes."""
    config = resolved.config
    Method(resolved)
    task = _task(resolved)
    plan = _plan(resolved, task)
    steps = steps_of(config, None if plan is None else plan.steps)
    shown = steps or config.schedule.steps or _enough(config)
    updates = sorted({*range(1, shown + 1, -(-shown // MOST_POINTS)), shown})
    names = list(task.objectives) if resolved.learners else [""]
    resolved.check_learners(names)
    every = {} if task is None else checked_turns(task)
    optimizers, rates = {}, {}
    for name in names:
        own, turns = resolved.for_learner(name), every.get(name, 1)
        method = Method(own)
        schedule = method.schedule(None if steps is None else max(1, steps // turns))
        rates[name] = [method.lr * schedule(update // turns - 1 if update >= turns else 0) for update in updates]
        optimizers[name] = describe_optimizer(own.config, method.lr)
    return Planned(optimizers, updates, rates, plan.steps if plan is not None else None, steps is not None)


def draw_schedule(config: Config, planned: Planned) -> Figure:
    """Return the picture of a learning rate, with epochs above where their length is known."""
    c, last = config.schedule, planned.updates[-1]
    figure = new_figure(8.4, 4.2)
    axes = figure.subplots()
    for name, rates in planned.rates.items():
        axes.plot(planned.updates, rates, linewidth=1.8, label=name or None)
    lowest, highest = (f(f(rates) for rates in planned.rates.values()) for f in (min, max))
    axes.set(xlabel="update", ylabel="learning rate")
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)
    if c.name == "step" and lowest < 0.1 * highest:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0.0, 1.08 * highest)
    notes = []
    if c.warmup_steps:
        axes.axvspan(0, min(c.warmup_steps, last), color="black", alpha=0.07, linewidth=0, label="warm-up")
    if c.warmup_steps or len(planned.rates) > 1:
        axes.legend()
    if c.name == "plateau":
        notes.append(
            f"times {c.gamma:g} after more than {c.patience} evaluations without a better, not known beforehand"
        )
    if not planned.has_end:
        notes.append("no end is set")
    sentences = [f"{name}: {text}" if name else text for name, text in planned.optimizers.items()]
    title = [
        *(line for sentence in sentences for line in textwrap.wrap(sentence, 92)),
        *(f"({note})" for note in notes),
    ]
    axes.set_title(plain("\n".join(title)), fontsize="medium")
    if (per_epoch := planned.steps_per_epoch) is not None:
        to_epochs: Any = (lambda update: update / per_epoch, lambda epoch: epoch * per_epoch)
        axes.secondary_xaxis("top", functions=to_epochs).set_xlabel("epoch")
    return figure


def _task(resolved: Resolved) -> Any:
    """Return the task if it is needed to know the number of updates, or whose they are; else None."""
    config = resolved.config
    if epochs_of(config) is None and not resolved.learners:
        return None  # epochs do not end this run: its data need not be there yet
    torch.manual_seed(config.train.seed)  # as in a run: a task may make its data at random
    try:
        return make_task(config.task.name, config.task.options, resolved.source("task.name"), resolved.sources)
    except DistloopError:
        if (config.schedule.steps or config.train.max_steps) and not resolved.learners:
            return None
        raise


def _plan(resolved: Resolved, task: Any) -> Plan | None:
    """Return the arithmetic of an epoch, or None where it is not needed or cannot be told."""
    config = resolved.config
    if task is None or epochs_of(config) is None:
        return None
    place = Place(World(), Alone(), torch.device("cpu"))
    if hasattr(task, "join"):
        task.join(Site(place.world, place.transport, place.device, config.train.seed))
    try:
        plan = getattr(Fed(task, config, place, {}).collect(0), "plan", None)
    except DistloopError:
        if config.schedule.steps or config.train.max_steps:
            return None
        raise
    return plan if isinstance(plan, Plan) else None


def _enough(config: Config) -> int:
    """Return how many updates show a schedule that goes on for ever."""
    c = config.schedule
    return max(4 * c.every if c.name == "step" else ENDLESS, 4 * c.warmup_steps)
