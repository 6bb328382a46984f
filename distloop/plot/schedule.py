"""The learning rate of every update of a run, before it begins: by the very schedule that the run will use."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distloop.build import Fed
from distloop.build.facts import describe_optimizer
from distloop.build.length import epochs_of, steps_of
from distloop.build.method import Method
from distloop.config import Config
from distloop.data import Batches, Plan
from distloop.errors import DistloopError
from distloop.observers.curves import new_figure, plain
from distloop.plot import save
from distloop.settings import Resolved
from distloop.tasks import make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDLESS = 1000  # updates to draw of a schedule that has no end, in a run that has none
MOST_POINTS = 20_000


@dataclass(frozen=True)
class Planned:
    """The learning rates of a run to come. Updates count from 1, as in a run's log."""

    optimizer: str  # in the words of the run's start
    updates: list[int]
    rates: list[float]
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
    return f"{output}: learning rate of {length}, at most {max(planned.rates):.3g}, at last {planned.rates[-1]:.3g}"


def plan_rates(resolved: Resolved) -> Planned:
    """Return the learning rate of each update of the run that a configuration describes."""
    method, config = Method(resolved), resolved.config
    plan = _plan(resolved)
    steps = steps_of(config, plan)
    schedule = method.schedule(steps)
    shown = steps or config.schedule.steps or _enough(config)
    updates = sorted({*range(1, shown + 1, -(-shown // MOST_POINTS)), shown})
    rates = [method.lr * schedule(update - 1) for update in updates]
    sentence = describe_optimizer(config, method.lr)
    return Planned(sentence, updates, rates, plan.steps if plan is not None else None, steps is not None)


def draw_schedule(config: Config, planned: Planned) -> Figure:
    """Return the picture of a learning rate, with epochs above where their length is known."""
    c, last = config.schedule, planned.updates[-1]
    figure = new_figure(8.4, 4.2)
    axes = figure.subplots()
    axes.plot(planned.updates, planned.rates, linewidth=1.8)
    axes.set(xlabel="update", ylabel="learning rate")
    axes.grid(alpha=0.3)
    axes.margins(x=0.02)
    if c.name == "step" and min(planned.rates) < 0.1 * max(planned.rates):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0.0, 1.08 * max(planned.rates))
    notes = []
    if c.warmup_steps:
        axes.axvspan(0, min(c.warmup_steps, last), color="black", alpha=0.07, linewidth=0, label="warm-up")
        axes.legend()
    if c.name == "plateau":
        notes.append(
            f"times {c.gamma:g} after more than {c.patience} evaluations without a better, not known beforehand"
        )
    if not planned.has_end:
        notes.append("no end is set")
    title = [*textwrap.wrap(planned.optimizer, 92), *(f"({note})" for note in notes)]
    axes.set_title(plain("\n".join(title)), fontsize="medium")
    if (per_epoch := planned.steps_per_epoch) is not None:
        to_epochs: Any = (lambda update: update / per_epoch, lambda epoch: epoch * per_epoch)
        axes.secondary_xaxis("top", functions=to_epochs).set_xlabel("epoch")
    return figure


def _plan(resolved: Resolved) -> Plan | None:
    """Return the arithmetic of an epoch, or None where it is not needed or cannot be told."""
    config = resolved.config
    if epochs_of(config) is None:
        return None  # epochs do not end this run: its data need not be there yet
    torch.manual_seed(config.train.seed)  # as in a run: a task may make its data at random
    try:
        task = make_task(config.task.name, config.task.options, resolved.source("task.name"))
        fed = Fed(task, lambda data, size: Batches(data, _cut(size, config)), config.train.seed)
        plan = getattr(fed.collect(0), "plan", None)
    except DistloopError:
        if config.schedule.steps or config.train.max_steps:
            return None
        raise
    return plan if isinstance(plan, Plan) else None


def _cut(samples: int, config: Config) -> Plan:
    return Plan(samples, config.data.global_batch_size, config.data.micro_batch_size)


def _enough(config: Config) -> int:
    """Return how many updates show a schedule that goes on for ever."""
    c = config.schedule
    return max(4 * c.every if c.name == "step" else ENDLESS, 4 * c.warmup_steps)
