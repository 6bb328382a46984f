"""How a task is evaluated, and what of that is watched."""

from __future__ import annotations

from typing import Any

from distloop.build.contents import fingerprint, samples_in
from distloop.build.deterministic import leaves_of
from distloop.build.feeding import make_loading
from distloop.build.place import Place
from distloop.config import Config
from distloop.errors import nearest
from distloop.evaluation import Evaluation
from distloop.learner import autocast
from distloop.messages import agree_on
from distloop.monitor import lower_is_better
from distloop.settings import Resolved


def make_evaluation(task: Any, place: Place, config: Config) -> Evaluation | None:
    """Return what evaluates the task on its validation data, if it has any."""
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
        batch_size=config.evaluate.batch_size,
        models=[objective.model for objective in task.objectives.values()],
        world=place.world,
        transport=place.transport,
        device=place.device,
        collate=getattr(task, "collate", None),
        loading=make_loading(config),
        precision=lambda: autocast(place.device, config.precision.name),
        leaves=leaves_of(config),
        seed=config.train.seed,
    )


def describe_monitor(resolved: Resolved, evaluation: Evaluation | None) -> str | None:
    """Refuse to wait for a metric that will never come; return in words what is watched."""
    monitor, error = resolved.config.monitor, resolved.error
    if evaluation is None:
        waiting = {f"monitor.{key}": getattr(monitor, key) for key in ("metric", "patience", "target")}
        for dotted, value in waiting.items():
            if value is not None:
                raise error(dotted, "needs validation data, and the task has none")
        for one in (resolved, *resolved.learners.values()):
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
