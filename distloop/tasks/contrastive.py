"""Metric learning: images of the same digit shall be near each other (Hadsell et al. 2006; Schroff et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distloop import losses
from distloop.errors import ConfigError
from distloop.objective import Objective
from distloop.tasks.base import split
from distloop.tasks.checks import check_positive, check_sizes
from distloop.tasks.digits import FEATURES, TEST_IMAGES, convolutions, load_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIGITS = 10


class ComparePairs:
    """Batches are (anchor, other, same): two images each, and 1 where they show the same digit, else 0."""

    def __init__(self, model: nn.Module, margin: float):
        self.model, self._loss = model, losses.Contrastive(margin)

    def guess(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return embed_all(self.model, batch[:2])

    def targets(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return batch[2]

    def loss(self, guesses: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        loss: Tensor = self._loss(guesses, targets)
        return loss


class CompareTriplets:
    """Batches are (anchor, positive, negative); that the positive is the nearer one is the target of every triplet."""

    def __init__(self, model: nn.Module, margin: float):
        self.model, self._loss = model, nn.TripletMarginLoss(margin)

    def guess(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return embed_all(self.model, batch)

    def targets(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        return None

    def loss(self, guesses: tuple[Tensor, Tensor, Tensor], targets: None) -> Tensor:
        loss: Tensor = self._loss(*guesses)
        return loss


class Contrastive:
    """Learn an embedding of digits from pairs or triplets, which are samples like any other.

    They are drawn before an epoch is cut into batches, not found within a batch, so that the loss is a mean over
    samples and the gradient does not depend on how batches are split.

    Args:
        loss: ``contrastive`` (pairs, half of them of the same digit) or ``triplet``.
        margin: distance beyond which different digits are left alone; of triplets, by how much it shall be larger.
        dimensions: of the embedding.
        hidden: units of the hidden layer.
        samples: pairs or triplets in an epoch, drawn anew for each.
    """

    def __init__(
        self,
        loss: Literal["contrastive", "triplet"] = "contrastive",
        margin: float = 1.0,
        dimensions: int = 8,
        hidden: int = 128,
        samples: int = 4096,
    ):
        if loss not in ("contrastive", "triplet"):
            raise ConfigError(f"task.loss: {loss!r} is neither contrastive nor triplet")
        check_positive(margin=margin)
        check_sizes(dimensions=dimensions, hidden=hidden, samples=samples)
        images, labels = load_digits()
        train, test = split(len(labels), TEST_IMAGES)
        order = train[labels[train].argsort(stable=True)]
        self.images, self.labels = images[order], labels[order]  # for training; sorted by digit, to draw from
        self.validation = TensorDataset(images[test], labels[test])
        model = nn.Sequential(convolutions(), nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, dimensions))
        objective = ComparePairs(model, margin) if loss == "contrastive" else CompareTriplets(model, margin)
        self.objectives: Mapping[str, Objective] = {"embedding": objective}
        self.loss, self.samples = loss, samples

    def collect(self, epoch: int) -> TensorDataset:
        """Return an epoch's pairs or triplets, drawn at random: the runtime makes all ranks draw the same."""
        anchor = torch.randint(len(self.labels), (self.samples,))
        if self.loss == "triplet":
            positive, negative = (draw_other(self.labels, anchor, torch.full_like(anchor, same)) for same in (1, 0))
            return TensorDataset(self.images[anchor], self.images[positive], self.images[negative])
        same = torch.arange(self.samples) % 2
        other = draw_other(self.labels, anchor, same)
        return TensorDataset(self.images[anchor], self.images[other], same.float())

    def evaluate(self, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, float]]:
        """Return how many test images have the digit of the training image nearest to them: embedded, and as pixels."""
        images, labels = batch
        model, train = self.objectives["embedding"].model, self.images.to(images.device)
        embedded = nearest_label(model(images), model(train), self.labels)
        plain = nearest_label(images, train, self.labels)
        count = float(len(labels))
        return {
            "neighbour_accuracy": ((embedded == labels).sum(), count),
            "pixels/neighbour_accuracy": ((plain == labels).sum(), count),
        }

    def pictures(self) -> Mapping[str, Callable[[Figure], None]]:
        return {"embedding": self._draw}

    def _draw(self, figure: Figure) -> None:
        """Draw the test images' embeddings, seen along their two principal directions, coloured by digit."""
        images, labels = self.validation.tensors
        model = self.objectives["embedding"].model
        points = model(images.to(next(model.parameters()).device)).float().cpu()
        points = points - points.mean(0)
        directions = torch.linalg.svd(points, full_matrices=False)[2][:2]
        flat = F.pad(points @ directions.T, (0, 2 - len(directions)))  # an embedding may have one dimension
        axes = figure.subplots()
        for digit in range(DIGITS):
            x, y = flat[labels == digit].T
            axes.scatter(x.numpy(), y.numpy(), s=14, label=str(digit), color=f"C{digit}")
        axes.set_title("embedded test images, first two principal components")
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(alpha=0.3)
        axes.legend(title="digit", loc="center left", bbox_to_anchor=(1.0, 0.5))


def embed_all(model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the embeddings of each part, from one pass of the model through all of them."""
    embeddings: Tensor = model(torch.cat(parts))
    return embeddings.chunk(len(parts))


def draw_other(labels: Tensor, anchor: Tensor, same: Tensor) -> Tensor:
    """Return for each anchor the index of another sample: of the same label where ``same`` is 1, else of another.

    Args:
        labels: of shape (n,), sorted, each at least twice; ``anchor`` holds indices into it.
    """
    counts = torch.bincount(labels)
    begins = counts.cumsum(0) - counts
    begin, count = begins[labels[anchor]], counts[labels[anchor]]
    # Counted from its first sample round to it again, a label's samples come first, then all others. From the anchor
    # on, 1 to count - 1 steps among its own lead to any of them but itself.
    part = torch.rand(len(anchor), dtype=torch.float64)
    own = (anchor - begin + 1 + (part * (count - 1)).long()) % count
    others = count + (part * (len(labels) - count)).long()
    return (begin + torch.where(same == 1, own, others)) % len(labels)


def nearest_label(queries: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Return the label of the point nearest to each query (Euclidean), of shape (queries,)."""
    # In double precision, where what is near zero is not lost to rounding.
    return labels.to(queries.device)[torch.cdist(queries.double(), points.double()).argmin(1)]
