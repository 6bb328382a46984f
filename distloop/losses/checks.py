"""What losses ask of their options and of what they are given: one sentence if it is not so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distloop.errors import ConfigError, nearest


def number(
    what: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """Return ``value`` if it is a finite number from ``least`` to ``most``; ``above`` and ``below`` exclude these."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if good and least is not None:
        good = value > least if above else value >= least
    if good and most is not None:
        good = value < most if below else value <= most
    if not good:
        bounds = [] if least is None else [f"{'above' if above else 'of at least'} {least:g}"]
        bounds += [] if most is None else [f"{'below' if below else 'at most'} {most:g}"]
        raise ConfigError(f"{what} must be a number {' and '.join(bounds)}".rstrip() + f", not {value!r}")
    return float(value)


def one_of(what: str, value: Any, *known: str) -> str:
    """Return ``value`` if it is one of the known words."""
    if value not in known:
        raise ConfigError(f"{what}: unknown {value!r}{nearest(value, known)}")
    return str(value)


def class_weights(what: str, value: Any) -> Tensor:
    """Return a tensor of weights, in double precision: the guesses' own is not known yet."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"{what} must be a list of numbers, not {value!r}")
    return torch.tensor([number(f"{what}: an entry", v, 0.0) for v in value], dtype=torch.float64)


def name_of(loss: nn.Module | str) -> str:
    """Return what a loss is called in a sentence."""
    return loss if isinstance(loss, str) else type(loss).__name__


def shape(value: Any) -> str:
    """Return a tensor's shape as text, or what it is instead of a tensor."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def misfit(loss: nn.Module | str, guesses: Any, targets: Any, right: str) -> ConfigError:
    """Return the error of shapes that do not fit."""
    return ConfigError(f"{name_of(loss)}: guesses are {shape(guesses)} and targets {shape(targets)}; {right}")


def full(loss: nn.Module | str, value: Any) -> Tensor:
    """Return a tensor of logits, embeddings and the like, half precision widened to single."""
    if not isinstance(value, Tensor):
        raise ConfigError(f"{name_of(loss)}: a tensor is needed, not {type(value).__name__}")
    return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value


def alike(loss: nn.Module | str, guesses: Any, *others: Any) -> list[Tensor]:
    """Return tensors, widened, that all have the shape of the first."""
    for other in others:
        if not isinstance(guesses, Tensor) or not isinstance(other, Tensor) or other.shape != guesses.shape:
            shapes = ", ".join(shape(x) for x in (guesses, *others))
            raise ConfigError(f"{name_of(loss)}: tensors of one shape are needed, not {shapes}")
    return [full(loss, x) for x in (guesses, *others)]


def classes(loss: nn.Module | str, guesses: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return logits (N, C, d1, ...), widened, and targets (N, d1, ...) that fit them: class indices, as int64."""
    fit = isinstance(guesses, Tensor) and isinstance(targets, Tensor) and guesses.dim() > 1
    if not fit or targets.shape != guesses.shape[:1] + guesses.shape[2:]:
        raise misfit(loss, guesses, targets, "(N, C, ...) need targets (N, ...)")
    if targets.is_floating_point() or targets.is_complex():
        raise ConfigError(f"{name_of(loss)}: targets are {targets.dtype}; class indices are integers")
    return full(loss, guesses), targets.long()


def fitting(loss: nn.Module, weights: Tensor, count: int) -> Tensor:
    """Return class weights if there is one for each class."""
    if len(weights) != count:
        raise ConfigError(f"{name_of(loss)}: {len(weights)} class weights for {count} classes")
    return weights


def several(loss: nn.Module | str, what: str, value: Any, *parts: str) -> list[Any]:
    """Return the parts of a tuple or list that has as many as are named."""
    if not isinstance(value, tuple | list) or len(value) != len(parts):
        given = f"{len(value)} of them" if isinstance(value, tuple | list) else shape(value)
        raise ConfigError(f"{name_of(loss)}: {what} must be ({', '.join(parts)}), not {given}")
    return list(value)
