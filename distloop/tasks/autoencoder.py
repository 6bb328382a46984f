"""Unsupervised: digits through a bottleneck and back, compared with PCA (Hinton and Salakhutdinov 2006)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distloop.errors import ConfigError
from distloop.objective import Objective
from distloop.tasks.base import split
from distloop.tasks.checks import check_sizes
from distloop.tasks.digits import TEST_IMAGES, load_digits
from distloop.tasks.sheets import sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS, SHOWN = 64, 12

Batch = tuple[Tensor]


class Coder(nn.Module):
    """Encoder and decoder, each with two hidden layers; between them ``bottleneck`` numbers per image."""

    def __init__(self, bottleneck: int, hidden: int):
        super().__init__()
        self.encoder, self.decoder = _layers(PIXELS, hidden, bottleneck), _layers(bottleneck, hidden, PIXELS)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (samples, 64) to what is left of them, of the same shape."""
        reconstructed: Tensor = self.decoder(self.encoder(images))
        return reconstructed


class Reconstruct:
    """Targets are the inputs; the loss is the squared error, a mean over pixels and samples."""

    def __init__(self, model: Coder):
        self.model: nn.Module = model

    def guess(self, batch: Batch) -> Tensor:
        reconstructed: Tensor = self.model(batch[0])
        return reconstructed

    def targets(self, batch: Batch) -> Tensor:
        return batch[0]

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(guesses, targets)


class Autoencoder:
    """Compress digits to a few numbers each; ``pca/loss`` is the best that a linear code of that size does.

    Args:
        bottleneck: numbers per image; from 1 to 63.
        hidden: units of each hidden layer.
    """

    def __init__(self, bottleneck: int = 8, hidden: int = 256):
        check_sizes(bottleneck=bottleneck, hidden=hidden)
        if bottleneck >= PIXELS:
            raise ConfigError(f"task.bottleneck: {bottleneck} is no bottleneck; an image has {PIXELS} pixels")
        images, _ = load_digits()
        train, test = split(len(images), TEST_IMAGES)
        self.objectives: Mapping[str, Objective] = {"autoencoder": Reconstruct(Coder(bottleneck, hidden))}
        self.train, self.validation = TensorDataset(images[train]), TensorDataset(images[test])
        self.pca = PCA(images[train], bottleneck)

    def collect(self, epoch: int) -> TensorDataset:
        return self.train

    def evaluate(self, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        objective, images, count = self.objectives["autoencoder"], batch[0], float(len(batch[0]))
        loss = objective.loss(objective.guess(batch), objective.targets(batch))
        linear = F.mse_loss(self.pca(images), images.double())
        return {"loss": (loss * count, count), "pca/loss": (linear * count, count)}

    def pictures(self) -> Mapping[str, Callable[[Figure], None]]:
        return {"reconstructions": self._draw}

    def _draw(self, figure: Figure) -> None:
        """Draw test images, what the model makes of them, and what PCA does."""
        images = self.validation.tensors[0][:SHOWN]
        device = next(self.objectives["autoencoder"].model.parameters()).device
        rows = {
            "image": images,
            "autoencoder": self.objectives["autoencoder"].guess((images.to(device),)),
            "PCA": self.pca(images),
        }
        sheet(figure, torch.stack([row.cpu().float().unflatten(1, (8, 8)) for row in rows.values()]), list(rows))


class PCA:
    """Projection on the principal components of ``images``: the linear code with the least squared error on them.

    In double precision, which autocast leaves as it is.
    """

    def __init__(self, images: Tensor, components: int):
        self.mean = images.double().mean(0)
        _, _, directions = torch.linalg.svd(images.double() - self.mean, full_matrices=False)
        self.components = directions[:components]  # shape (components, pixels), orthonormal

    def __call__(self, images: Tensor) -> Tensor:
        mean, components = self.mean.to(images.device), self.components.to(images.device)
        projected: Tensor = mean + (images.double() - mean) @ components.T @ components
        return projected


def _layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, outputs)
    )
