"""What a user wants to see before training starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distloop.build.length import epochs_of
from distloop.build.method import lr_scale
from distloop.build.place import Place
from distloop.config import Config
from distloop.learner import Learner
from distloop.plan import Plan
from distloop.settings import Resolved
from distloop.uneven import UnevenBatches


def facts(
    resolved: Resolved,
    learners: Sequence[Learner],
    data: Any,
    steps: int | None,
    place: Place,
    directory: Path,
    monitored: str | None,
) -> dict[str, str]:
    """Return one line each about task, world, strategy, batch, length, optimizer and place of the results.

    ``data`` is what the first epoch extracts from.
    """
    config = resolved.config
    world, strategy = place.world, config.strategy.name
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks started by {world.launcher}"
    lines = {
        "task": f"{config.task.name}: " + ", ".join(_describe(learner) for learner in learners),
        "world": f"{ranks} on {place.device.type}",
        **({"threads": place.threads} if place.threads else {}),
        "strategy": _strategy(learners, place, strategy),
    }
    plan = getattr(data, "plan", None)
    if plan is not None:
        lines["batch"] = _batch(plan, world.size)
    elif isinstance(data, UnevenBatches):
        lines["batch"] = _uneven(data, config.data.global_batch_size)
    lines["length"] = _length(steps, epochs_of(config))
    for learner in learners:
        described = describe_optimizer(resolved.for_learner(learner.name).config, learner.base_lr)
        kernel = learner.optimizer.rule.describe()
        name = f"for {learner.name}" if resolved.learners else "optimizer"
        lines[name] = f"{described}; {kernel}" if kernel else described
    if monitored is not None:
        lines["monitor"] = monitored
    lines["precision"] = config.precision.name
    split = world.size > 1 or (plan is not None and plan.accumulation(1) > 1)
    modules = (module for learner in learners for module in learner.objective.model.modules())
    if split and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        part, cut = ("leaf", "train.leaves") if config.train.deterministic else ("micro-batch", "how batches are split")
        lines["note"] = f"BatchNorm normalises each {part} by itself, so results depend on {cut}"
    warm_up = max(resolved.for_learner(learner.name).config.schedule.warmup_steps for learner in learners)
    if steps is not None and 0 < steps <= warm_up:
        lines["note"] = f"the run ends within its warm-up of {warm_up} steps, below the full learning rate"
    return lines | {"results": str(directory)}


def _strategy(learners: Sequence[Learner], place: Place, name: str) -> str:
    about = list(dict.fromkeys(learner.strategy.about for learner in learners if learner.strategy.about))
    if place.world.size == 1 and not about:
        return f"none needed for one rank ({name} with more)"
    how = {re.sub(r"^\d+ \w+ by ", "", line): None for learner in learners for line in learner.strategy.plan}
    buckets = sum(len(learner.strategy.plan) for learner in learners)
    text = ", ".join([name, *about])
    if how:
        text += f", {buckets} bucket{'s' if buckets > 1 else ''} by {', '.join(how)}"
    return "; ".join([text, *place.notes])


def _length(steps: int | None, epochs: int | None) -> str:
    if steps is not None:
        return f"{steps} steps"
    return "until stopped" if epochs is None else f"{epochs} epochs, of as many steps as what is collected makes"


def _uneven(data: UnevenBatches, global_batch_size: int) -> str:
    counts = ", ".join(map(str, data.counts[:8])) + (", ..." if len(data.counts) > 8 else "")
    passes = f" x {data.passes} passes" if data.passes > 1 else ""
    return (
        f"{global_batch_size} samples; in the first epoch the ranks collected {counts}{passes}, for {data.steps} steps"
    )


def _describe(learner: Learner) -> str:
    count = sum(p.numel() for p in learner.strategy.parameters.values())
    return f"{learner.name} with {count:,} parameters"


def _batch(plan: Plan, ranks: int) -> str:
    if plan.leaves:
        largest = -(-min(plan.global_batch_size, plan.samples) // plan.leaves)
        return (
            f"{plan.global_batch_size} samples = {plan.leaves} leaves of at most {largest}, on {ranks} "
            f"rank{'s' if ranks > 1 else ''}; {plan.samples} samples in {plan.steps} steps per epoch"
        )
    micro = plan.micro_batch_size or -(-min(plan.global_batch_size, plan.samples) // ranks)
    accumulation = plan.accumulation(ranks)
    return (
        f"{plan.global_batch_size} samples = {ranks} rank{'s' if ranks > 1 else ''} x {accumulation} "
        f"micro-batch{'es' if accumulation > 1 else ''} of at most {micro}; "
        f"{plan.samples} samples in {plan.steps} steps per epoch"
    )


def describe_optimizer(config: Config, lr: float) -> str:
    """Return optimizer, learning rate, schedule and weight decay in words."""
    c, schedule = config.optimizer, config.schedule
    text = f"{c.name}, lr {lr:.4g}"
    scale = lr_scale(c, config.data.global_batch_size)
    if c.lr_scaling != "none":
        text += f" = {c.lr:.4g} x {scale:.4g} ({c.lr_scaling} scaling from batch {c.reference_batch_size})"
    text += f", {schedule.name.replace('_', '-')}"
    if schedule.warmup_steps:
        text += f" with {schedule.warmup_steps} steps of warm-up"
    if c.weight_decay:
        text += f", weight decay {c.weight_decay:g} " + (
            "on all" if c.decay_biases_and_norms else "not on biases and norms"
        )
    return text
