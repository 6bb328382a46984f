"""Supplied tasks, and how tasks are found by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from distloop.errors import ConfigError, DistloopError, nearest

TASKS = {
    "digits": "distloop.tasks.digits:Digits",
    "byte_lm": "distloop.tasks.byte_lm:ByteLM",
    "masked_lm": "distloop.tasks.masked_lm:MaskedLM",
    "autoencoder": "distloop.tasks.autoencoder:Autoencoder",
    "gan": "distloop.tasks.gan:GAN",
    "contrastive": "distloop.tasks.contrastive:Contrastive",
    "dqn": "distloop.tasks.dqn:DQN",
    "actor_critic": "distloop.tasks.actor_critic:ActorCritic",
    "dyna": "distloop.tasks.dyna:Dyna",
    "modem": "distloop.tasks.modem:Communication",
}


def import_object(path: str, what: str) -> Any:
    """Return the object at ``package.module:Name``.

    Raises:
        ConfigError: there is no such module or name.
    """
    module_name, _, name = path.partition(":")
    if not module_name or module_name.startswith(".") or not name:
        raise ConfigError(f"{what}: {path!r} is not of the form package.module:Name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as failure:
        missing = getattr(failure, "name", None)
        if missing and not module_name.startswith(missing):
            raise ConfigError(
                f"{what}: {module_name} cannot be imported: it needs {missing!r}, which is missing"
            ) from failure
        raise ConfigError(f"{what}: module {module_name!r} cannot be imported: {failure}") from failure
    except SyntaxError as failure:
        raise ConfigError(f"{what}: {failure.filename}:{failure.lineno}: {failure.msg}") from failure
    except DistloopError:
        raise
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}"
        raise ConfigError(f"{what}: importing {module_name} failed: {reason}; --traceback shows where") from failure
    if not hasattr(module, name):
        public = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        raise ConfigError(f"{what}: module {module_name!r} has no {name!r}{nearest(name, public)}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{what}: {path} is a {type(found).__name__}, which cannot be called")
    return found


def make_task(name: str, options: Mapping[str, Any], source: str, sources: Mapping[str, str] | None = None) -> Any:
    """Return a new task; ``sources`` says by dotted key where its options came from.

    Raises:
        ConfigError: the task is unknown, does not take an option, or lacks what a task must have; ``source`` says where
            its name came from.
    """
    make = find_task(name, source)
    check_options(make, name, options, source, sources)
    try:
        task = make(**options)
    except ConfigError as failure:
        option = str(failure).partition(":")[0]  # as in "task.width: 0 is too small"
        if sources is None or option not in sources:
            raise
        raise ConfigError(f"{sources[option]}: {failure}") from failure
    except DistloopError:
        raise
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}"
        raise ConfigError(f"{source}: task {name} cannot be made: {reason}; --traceback shows where") from failure
    check_task(task, source)
    return task


def find_task(name: str, source: str) -> Any:
    """Return what makes a task, by the name of a supplied one or as package.module:Class.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TASKS and ":" not in name:
        raise ConfigError(f"{source}: task.name: unknown task {name!r}{nearest(name, TASKS)}, or package.module:Class")
    return import_object(TASKS.get(name, name), f"{source}: task.name")


def check_options(
    make: Any, name: str, options: Mapping[str, Any], source: str, sources: Mapping[str, str] | None = None
) -> None:
    """Refuse options that what makes a task does not take, and their lack where it needs them."""
    known = inspect.signature(make).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for option in options:
        if option not in known and not anything:
            given = (sources or {}).get(f"task.{option}", source)
            raise ConfigError(f"{given}: task.{option}: {name} takes no {option!r}{nearest(option, known)}")
    for key, parameter in known.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and key not in options:
            raise ConfigError(f"{source}: task.{key}: {name} needs a value for it")


def _check_callable(holder: Any, names: Sequence[str], what: str) -> None:
    for name in names:
        if hasattr(holder, name) and not callable(getattr(holder, name)):
            raise ConfigError(f"{what}: {name} is a {type(getattr(holder, name)).__name__}, not a method")


def check_task(task: Any, source: str) -> None:
    """Raise a ConfigError if ``task`` lacks what a task must have."""
    from torch import nn

    kind = type(task).__name__
    if not callable(getattr(task, "collect", None)):
        raise ConfigError(f"{source}: task {kind} has no method collect(epoch), which returns the data of an epoch")
    objectives = getattr(task, "objectives", None)
    if not isinstance(objectives, Mapping) or not objectives:
        raise ConfigError(f"{source}: task {kind} has no objectives: a mapping of at least one name to an objective")
    for name, objective in objectives.items():
        for needed in ("model", "guess", "targets", "loss"):
            if not hasattr(objective, needed):
                raise ConfigError(
                    f"{source}: objective {name!r} of task {kind} lacks {needed!r} of model, guess, targets, loss"
                )
        if not isinstance(objective.model, nn.Module):
            found = type(objective.model).__name__
            raise ConfigError(f"{source}: the model of objective {name!r} is a {found}, not a torch.nn.Module")
        _check_callable(objective, ("guess", "targets", "loss", "weight", "updated"), f"{source}: objective {name!r}")
    _check_callable(task, ("join", "report", "summarise", "pictures"), f"{source}: task {kind}")
    if getattr(task, "validation", None) is not None and not callable(getattr(task, "evaluate", None)):
        raise ConfigError(f"{source}: task {kind} has validation data but no method evaluate(batch)")
