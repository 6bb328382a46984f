"""The method of optimisation that a configuration describes: rule, schedule, clipping, learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from distloop import optimizer as optimizers
from distloop import schedules, transforms
from distloop.build.idle import idle
from distloop.config import OptimizerSection, ScheduleSection
from distloop.layers import LEARNERS, PER_LEARNER
from distloop.settings import Resolved
from distloop.strategies import Recipe, options_of
from distloop.tasks import import_object

# Which keys each method reads, beside the common ones; another method's key is refused where it is given.
OPTIMIZERS = {
    "sgd": {"momentum", "nesterov"},
    "rmsprop": {"momentum", "eps", "alpha"},
    "adam": {"betas", "eps"},
    "adamw": {"betas", "eps"},
}
SCHEDULES: dict[str, set[str]] = {
    "constant": set(),
    "step": {"every", "gamma"},
    "linear": {"steps", "final"},
    "cosine": {"steps", "final"},
    "one_cycle": {"steps", "peak", "start_div", "final_div"},
    "plateau": {"gamma", "patience", "threshold"},
}
# Those of torch.optim that look at every element by itself: LBFGS, Muon, Adafactor and SparseAdam do not.
ELEMENT_WISE = {"SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop"}
EVERY_OPTIMIZER = {"name", "lr", "weight_decay", "decay_biases_and_norms", "lr_scaling", "reference_batch_size"}
EVERY_SCHEDULE = {"name", "warmup_steps", "warmup_start"}


class Method:
    """Makes the parts of a learner that say how gradients become updates.

    Raises:
        ConfigError: a name is unknown, or a key is given that the chosen method does not read.
    """

    def __init__(self, resolved: Resolved):
        self._resolved, self._config = resolved, resolved.config
        c = self._config.optimizer
        if ":" not in c.name:
            resolved.choose("optimizer.name", OPTIMIZERS, "or package.module:Class")
        resolved.refuse_unread("optimizer", c.name, EVERY_OPTIMIZER | OPTIMIZERS.get(c.name, {"options"}))
        name = self._config.schedule.name
        resolved.refuse_unread("schedule", name, EVERY_SCHEDULE | SCHEDULES[name])
        if c.nesterov and not c.momentum:
            raise resolved.error("optimizer.nesterov", "needs optimizer.momentum above 0")
        self.scale = lr_scale(c, self._config.data.global_batch_size)
        self.lr = c.lr * self.scale

    def refuse_whole_parameters(self, strategy: str) -> None:
        """Raise ConfigError unless the optimizer looks at every element by itself."""
        name = self._config.optimizer.name
        path, _, kind = name.partition(":")
        if not kind or (path.startswith("torch.optim") and kind in ELEMENT_WISE):
            return
        made = import_object(name, f"{self._resolved.source('optimizer.name')}: optimizer.name")
        if getattr(made, "element_wise", False):
            return
        raise self._resolved.error(
            "optimizer.name",
            f"under {strategy} a rank updates cuts of parameters, and {kind} may need all of one; "
            f"{', '.join(OPTIMIZERS)} work, torch.optim:CLASS for CLASS of {', '.join(sorted(ELEMENT_WISE))}, and "
            "a class with the attribute element_wise = True",
        )

    def rule(self, *, on_host: bool = False) -> optimizers.Rule:
        """Return the optimizer's rule; ``on_host``: for values on the CPU that are not the model's own."""
        c = self._config.optimizer
        if c.name == "sgd":
            return optimizers.SGD(c.momentum, c.nesterov)
        if c.name == "rmsprop":
            return optimizers.RMSProp(c.alpha, c.eps, c.momentum)
        if c.name in ("adam", "adamw") and on_host:
            from distloop.cpu_adam import cpu_adam

            kernel = self._config.strategy.cpu_adam
            return cpu_adam(kernel, (c.betas[0], c.betas[1]), c.eps, decoupled=c.name == "adamw")
        if c.name in ("adam", "adamw"):
            return optimizers.Adam((c.betas[0], c.betas[1]), c.eps, decoupled=c.name == "adamw")
        make = import_object(c.name, f"{self._resolved.source('optimizer.name')}: optimizer.name")
        if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
            raise self._resolved.error("optimizer.name", f"{c.name} is not a torch.optim.Optimizer class")
        closure = inspect.signature(make.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise self._resolved.error(
                "optimizer.name", f"{c.name} evaluates the loss several times per step; none here can"
            )
        for taken in ("lr", "weight_decay"):
            if taken in c.options:
                raise self._resolved.error("optimizer.options", f"{taken} is set by optimizer.{taken}")
        if c.weight_decay and "weight_decay" not in inspect.signature(make).parameters:
            raise self._resolved.error("optimizer.weight_decay", f"{c.name} has no weight decay")
        torch_optimizer: Callable[..., torch.optim.Optimizer] = make
        try:
            torch_optimizer([nn.Parameter(torch.zeros(1))], lr=c.lr, **c.options)
        except (TypeError, ValueError) as failure:
            raise self._resolved.error("optimizer.options", f"{c.name} refuses them: {failure}") from failure
        return optimizers.Torch(torch_optimizer, c.options)

    def decays(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Return the weight decay of each parameter; biases and the scales of norms have fewer than two dimensions."""
        c = self._config.optimizer
        return {n: c.weight_decay if p.dim() >= 2 or c.decay_biases_and_norms else 0.0 for n, p in parameters.items()}

    def recipe(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Recipe:
        """Return all this as plain data, for strategies that update by themselves."""
        c, clip, precision = self._config.optimizer, self._config.gradients, self._config.precision
        constants = {
            "sgd": {"momentum": c.momentum, "nesterov": c.nesterov},
            "rmsprop": {"alpha": c.alpha, "eps": c.eps, "momentum": c.momentum},
        }
        return Recipe(
            model,
            c.name,
            constants.get(c.name, {"betas": (c.betas[0], c.betas[1]), "eps": c.eps}),
            self.decays(parameters),
            clip_norm=clip.clip_norm,
            clip_value=clip.clip_value,
            loss_scale=precision.loss_scale if precision.name == "fp16" else None,
            growth_interval=precision.growth_interval,
        )

    def schedule(self, steps: int | None) -> schedules.Schedule:
        """Return the schedule; ``steps`` is the number of updates in the run, if it is known."""
        c = self._config.schedule
        shape = self._shape(c, steps)
        if not c.warmup_steps:
            return shape
        # A scaled learning rate starts from the unscaled one (Goyal et al. 2017, section 2.2).
        start = c.warmup_start if c.warmup_start is not None else 1.0 / self.scale if self.scale > 1.0 else 0.0
        return schedules.WarmUp(shape, c.warmup_steps, start)

    def transforms(self) -> list[transforms.Transform]:
        """Return what happens to gradients before they are applied, in order."""
        c, precision = self._config.gradients, self._config.precision
        chain: list[transforms.Transform] = []
        if precision.name == "fp16":
            chain.append(transforms.LossScale(precision.loss_scale, precision.growth_interval))
        elif self._config.monitor.nonfinite == "skip":
            chain.append(transforms.SkipNonFinite(self._config.monitor.most_skipped))
        if c.clip_norm is not None:
            chain.append(transforms.ClipByNorm(c.clip_norm))
        if c.clip_value is not None:
            chain.append(transforms.ClipByValue(c.clip_value))
        return chain

    def _shape(self, c: ScheduleSection, steps: int | None) -> schedules.Schedule:
        if c.name == "step":
            return schedules.Step(c.every, c.gamma)
        if c.name == "plateau":
            return schedules.Plateau(gamma=c.gamma, patience=c.patience, threshold=c.threshold)
        if c.name == "constant":
            return schedules.Constant()
        end = c.steps or steps
        if end is None:
            raise self._resolved.error(
                "schedule.name", f"{c.name} must know its end: set schedule.steps or train.max_steps"
            )
        if c.name == "one_cycle":
            return schedules.OneCycle(end, c.peak, c.start_div, c.final_div)
        return schedules.Linear(end, c.final) if c.name == "linear" else schedules.Cosine(end, c.final)


def as_read(resolved: Resolved) -> dict[str, Any]:
    """Return the configuration as it can be read again: without the keys that the chosen methods do not read.

    What a file said beside one optimizer may have been overruled with the optimizer's name. A learner's own sections
    hold what it does otherwise than what stands for all.
    """
    sections = _read_keys(resolved)
    for name, one in resolved.learners.items():
        own: dict[str, dict[str, Any]] = {}
        for section in PER_LEARNER:
            fields = type(getattr(resolved.config, section)).model_fields
            given = {key: sections[section].get(key, fields[key].get_default()) for key in fields}
            keys = _read_keys(one)[section].items()
            own[section] = {key: value for key, value in keys if value != given[key]}
        del sections[LEARNERS][name]
        if own := {section: values for section, values in own.items() if values}:
            sections[LEARNERS][name] = own
    return sections


def _read_keys(resolved: Resolved) -> dict[str, Any]:
    sections = resolved.nested()
    optimizer, schedule = sections["optimizer"]["name"], sections["schedule"]["name"]
    read = {
        "optimizer": EVERY_OPTIMIZER | OPTIMIZERS.get(optimizer, {"options"}),
        "schedule": EVERY_SCHEDULE | SCHEDULES[schedule],
        "strategy": {"name"} | options_of(sections["strategy"]["name"]),
    }
    for section, keys in read.items():
        sections[section] = {key: value for key, value in sections[section].items() if key in keys}
    for one in idle(resolved.config):
        section, _, key = one.key.partition(".")
        del sections[section][key]
    return sections


def lr_scale(c: OptimizerSection, global_batch_size: int) -> float:
    """Return the factor on the learning rate for this batch size.

    ``linear`` is Goyal et al. 2017, section 2.1; ``sqrt`` keeps the update's variance (Krizhevsky 2014, section 5).
    """
    ratio = global_batch_size / c.reference_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[c.lr_scaling]
