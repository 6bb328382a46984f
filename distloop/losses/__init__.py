"""Losses of the field that torch has none of, and the loss that a configuration names.

Each is called as ``loss(guesses, targets)`` and returns a mean over samples. The mean of a global batch is then the
mean of its parts' means, weighted by their shares, so a split over ranks leaves the gradient as it is. Where it is over
something else the docstring says so, and ``weigher`` counts it. Half-precision guesses are widened first.

Every one raises a ConfigError if an option is out of range, or if shapes do not fit: nothing is broadcast.
"""

from distloop.losses.adversarial import discriminator_loss, generator_loss
from distloop.losses.classes import BinaryFocal, CrossEntropyDice, Dice, Focal
from distloop.losses.embeddings import BatchTriplet, Contrastive
from distloop.losses.named import LOSSES, make_loss, weigher

__all__ = [
    "BatchTriplet",
    "BinaryFocal",
    "Contrastive",
    "CrossEntropyDice",
    "Dice",
    "Focal",
    "LOSSES",
    "discriminator_loss",
    "generator_loss",
    "make_loss",
    "weigher",
]
