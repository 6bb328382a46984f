"""Handwritten digits: 1,797 real images of 8x8 pixels, ten classes (Alpaydin and Kaynak 1998, from scikit-learn)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distloop.errors import ConfigError
from distloop.losses import make_loss, weigher
from distloop.tasks.base import Supervised, accuracy, split
from distloop.tasks.checks import check_choice, check_range, check_sizes

TEST_IMAGES = 360  # a fifth
SUITABLE = ("cross_entropy", "CrossEntropyLoss", "focal", "multi_margin_loss", "MultiMarginLoss")  # for class scores
FEATURES = 64 * 4 * 4  # of an image, after the convolutions


def load_digits() -> tuple[Tensor, Tensor]:
    """Return images of shape (1797, 64), grey values in [0, 1], and labels of shape (1797,)."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ConfigError("task digits takes its images from scikit-learn: pip install 'distloop[digits]'") from None
    digits = load()
    return torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.int64)


class Digits(Supervised):
    """Classify digits with a small network.

    Args:
        model: ``cnn`` (two convolutions) or ``mlp`` (one hidden layer).
        hidden: units of the hidden layer.
        dropout: part of the hidden units that are dropped in training.
        loss: ``cross_entropy``, ``focal`` or ``multi_margin_loss``; see :mod:`distloop.losses`.
        loss_options: its arguments.
    """

    def __init__(
        self,
        model: Literal["cnn", "mlp"] = "cnn",
        hidden: int = 128,
        dropout: float = 0.0,
        loss: str = "cross_entropy",
        loss_options: Mapping[str, Any] | None = None,
    ):
        check_choice("model", model, ("cnn", "mlp"))
        check_range(0.0, 1.0, dropout=dropout, below=True)
        check_sizes(hidden=hidden)
        check_choice("loss", loss, SUITABLE)
        if not isinstance(loss_options or {}, Mapping):
            raise ConfigError(f"task.loss_options: {loss_options!r} must be a mapping, such as {{gamma: 3}}")
        learned = make_loss(loss, loss_options, "task.loss_options")
        weighted = {"weight", "alpha", "ignore_index"} & {*(loss_options or ())}  # not a plain mean over samples
        images, labels = load_digits()
        train, test = split(len(labels), TEST_IMAGES)
        features, inputs = (convolutions(), FEATURES) if model == "cnn" else (nn.Sequential(), 64)
        super().__init__(
            nn.Sequential(features, nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 10)),
            learned,
            TensorDataset(images[train], labels[train]),
            TensorDataset(images[test], labels[test]),
            metrics={"accuracy": accuracy},
            weight=weigher(learned) if weighted else None,
            name="classifier",
        )


def convolutions(channels: int = 32) -> nn.Sequential:
    """Return layers that map images of shape (samples, 64) to features of shape (samples, 32 * channels)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
