"""The loss that a configuration names: one of ours, or one of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from distloop.errors import ConfigError, nearest
from distloop.losses.checks import alike, class_weights, classes, fitting, full, misfit, number, several
from distloop.losses.classes import BinaryFocal, CrossEntropyDice, Dice, Focal
from distloop.losses.embeddings import BatchTriplet, Contrastive

OWN: dict[str, type[nn.Module]] = {
    "focal": Focal,
    "binary_focal": BinaryFocal,
    "contrastive": Contrastive,
    "batch_triplet": BatchTriplet,
    "dice": Dice,
    "cross_entropy_dice": CrossEntropyDice,
}
# Left out: a name that torch deprecates, and a layer with parameters of its own.
_TORCH: dict[str, type[nn.Module]] = {
    name: kind
    for name, kind in vars(nn).items()
    if isinstance(kind, type) and issubclass(kind, _Loss) and name not in ("NLLLoss2d", "LinearCrossEntropyLoss")
}


def _functional(name: str) -> type[nn.Module] | None:
    """Return the class for a name of torch.nn.functional: mse_loss is MSELoss, kl_div is KLDivLoss."""
    plain = name.replace("_", "").replace("binarycrossentropy", "bce").removesuffix("loss")
    return next((kind for known, kind in _TORCH.items() if known.lower().removesuffix("loss") == plain), None)


#: Every name that ``make_loss`` knows.
LOSSES: dict[str, type[nn.Module]] = (
    OWN
    | _TORCH
    | {name: kind for name in sorted(vars(nn.functional)) if name.islower() and (kind := _functional(name))}
)

_ELEMENTWISE = (
    *(nn.BCELoss, nn.BCEWithLogitsLoss, nn.HingeEmbeddingLoss, nn.HuberLoss, nn.KLDivLoss, nn.L1Loss, nn.MSELoss),
    *(nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss, nn.PoissonNLLLoss, nn.SmoothL1Loss, nn.SoftMarginLoss),
)
_REDUCTION = ("reduction", "size_average", "reduce")  # the last two are torch's old words for the first
# What torch finds out in the first step only, if ever.
_RANGES: dict[str, Callable[[str, Any], float]] = {
    "label_smoothing": partial(number, least=0.0, most=1.0),
    "beta": partial(number, least=0.0),
    "delta": partial(number, least=0.0, above=True),
    "eps": partial(number, least=0.0, above=True),
}


def make_loss(name: str, options: Mapping[str, Any] | None, source: str) -> nn.Module:
    """Return a new loss, called as ``loss(guesses, targets)``.

    One of torch's takes class weights (``weight``, ``pos_weight``) as a list of numbers, refuses shapes that it would
    broadcast, and where it needs more than two tensors they come in tuples: guesses are (first, second) for
    CosineEmbeddingLoss and MarginRankingLoss, (mean, variance) for GaussianNLLLoss, (anchor, positive, negative) for
    the triplet losses, whose targets go unused; targets are (targets, input_lengths, target_lengths) for CTCLoss.
    KLDivLoss is its ``batchmean`` if nothing else is asked for: torch's own default is no mean over samples.

    Args:
        name: of ours, ``focal``; a class of torch.nn, ``CrossEntropyLoss``; or its function in torch.nn.functional,
            ``cross_entropy``.
        options: keyword arguments of the class.
        source: where they come from; errors begin with it.

    Raises:
        ConfigError: the name is unknown, an option is unknown or out of range, or ``reduction`` is no mean.
    """
    kind = LOSSES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"{source}: unknown loss {name!r}{nearest(name, LOSSES)}")
    given = dict(options or {})
    means = ("batchmean", "mean") if kind is nn.KLDivLoss else ("mean",)
    reduction = given.pop("reduction", means[0])
    if reduction not in means:
        raise ConfigError(f"{source}: {name}: reduction is {reduction!r}, but distloop needs the mean over samples")
    known = {o: p.default for o, p in inspect.signature(kind).parameters.items() if o not in _REDUCTION}
    for option in given:
        if option not in known:
            raise ConfigError(f"{source}: {name} takes no {option!r}{nearest(option, known)}")
    own = kind in OWN.values()
    try:
        for option, value in given.items():
            given[option] = _checked(f"{name}: {option}", option, value, known[option], own)
        loss = kind(**given) if own else kind(reduction=reduction, **given)
    except ConfigError as failure:
        raise ConfigError(f"{source}: {failure}") from failure
    except (ValueError, TypeError) as failure:
        raise ConfigError(f"{source}: {name}: {failure}") from failure
    if own:
        return loss
    loss.register_forward_pre_hook(_prepare)
    return loss


def weigher(loss: Any) -> Callable[[Any], float] | None:
    """Return ``weight(batch)`` for a loss that is a mean over something else than samples, None for all others.

    Focal loss, cross-entropy and NLL are means over the targets that are not ignored, weighted by their classes'
    weights; the batch is a pair of inputs and targets.
    """
    if not isinstance(loss, Focal | nn.CrossEntropyLoss | nn.NLLLoss):
        return None
    weights, ignored = loss.alpha if isinstance(loss, Focal) else loss.weight, loss.ignore_index
    if weights is not None:
        weights = weights.detach().to("cpu", torch.float64)  # where batches are weighed

    def weight(batch: Any) -> float:
        targets: Tensor = batch[1]
        if targets.is_floating_point():  # probabilities: torch's mean is over places, weighted or not
            return float(targets.numel() / targets.shape[1])
        counted = targets.long()[targets.long() != ignored]
        return float(counted.numel() if weights is None else weights.to(counted.device)[counted].sum())

    return weight


def _checked(what: str, option: str, value: Any, default: Any, own: bool) -> Any:
    """Return an option as the loss takes it, of the type that its default has; our own know their ranges."""
    if option in _RANGES:
        return _RANGES[option](what, value)
    if option in ("weight", "pos_weight"):
        return None if value is None else class_weights(what, value)
    if option == "distance_function" and not callable(value):
        raise ConfigError(f"{what} must be a function, which a file cannot hold")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ConfigError(f"{what} must be true or false, not {value!r}")
    if type(default) is int and type(value) is not int:
        raise ConfigError(f"{what} must be a whole number, not {value!r}")
    if isinstance(default, float) and not own:
        number(what, value)
    return value


def _prepare(loss: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Turn (guesses, targets) into the tensors that a loss of torch takes, or say why not."""
    guesses, targets = given
    if isinstance(loss, nn.TripletMarginLoss | nn.TripletMarginWithDistanceLoss):
        return tuple(alike(loss, *several(loss, "guesses", guesses, "anchor", "positive", "negative")))
    if isinstance(loss, nn.MarginRankingLoss):
        return tuple(alike(loss, *several(loss, "guesses", guesses, "first", "second"), targets))
    if isinstance(loss, nn.CosineEmbeddingLoss):
        first, second = alike(loss, *several(loss, "guesses", guesses, "first", "second"))
        if not isinstance(targets, Tensor) or targets.shape != first.shape[:1] or first.dim() != 2:
            raise misfit(loss, first, targets, "(N, D) each need targets (N)")
        return first, second, targets
    if isinstance(loss, nn.GaussianNLLLoss):
        mean, variance = several(loss, "guesses", guesses, "mean", "variance")
        mean, targets = alike(loss, mean, targets)
        return mean, targets, full(loss, variance)
    if isinstance(loss, nn.CTCLoss):
        parts = several(loss, "targets", targets, "targets", "input_lengths", "target_lengths")
        return full(loss, guesses), *parts
    if isinstance(loss, _ELEMENTWISE):
        guesses, targets = alike(loss, guesses, targets)
    elif isinstance(targets, Tensor) and targets.is_floating_point() and isinstance(loss, nn.CrossEntropyLoss):
        guesses, targets = alike(loss, guesses, targets)  # probabilities
    else:
        guesses, targets = classes(loss, guesses, targets)
    _fit_weights(loss, guesses)
    return guesses, targets


def _fit_weights(loss: nn.Module, guesses: Tensor) -> None:
    """Bring class weights to the guesses' device and precision, for good, so that it is done once."""
    for name, weights in loss.named_buffers(recurse=False):
        if not isinstance(loss, _ELEMENTWISE):
            fitting(loss, weights, guesses.shape[1])
        elif len(weights) > 1:  # one for all is as good
            fitting(loss, weights, guesses.shape[-1])
        if weights.device != guesses.device or weights.dtype != guesses.dtype:
            setattr(loss, name, weights.to(guesses.device, guesses.dtype))
