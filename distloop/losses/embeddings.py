"""Losses on distances between embeddings: pairs, and triplets found in a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distloop.errors import ConfigError
from distloop.losses.checks import alike, full, misfit, number, one_of, several


class Contrastive(nn.Module):
    """Pull the two of a pair together or push them apart: mean of ``t d**2 / 2 + (1 - t) max(0, margin - d)**2 / 2``.

    Hadsell, Chopra and LeCun 2006 (equation 4); ``d`` is the Euclidean distance. A target is 1 for a pair of the SAME
    kind and 0 for a pair of different ones (the paper's Y is the other way round). At distance 0 the push, which has no
    direction there, is 0.

    Args:
        margin: above 0.

    Shapes: guesses are a pair of embeddings, (N, D) each, targets are (N).
    """

    def __init__(self, margin: float = 1.0):
        super().__init__()
        self.margin = number("Contrastive: margin", margin, 0.0, above=True)

    def forward(self, guesses: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        a, b = alike(self, *several(self, "guesses", guesses, "embeddings", "other embeddings"))
        if a.dim() != 2 or not isinstance(targets, Tensor) or targets.shape != a.shape[:1]:
            raise misfit(self, a, targets, "(N, D) each need targets (N)")
        distance: Tensor = torch.linalg.vector_norm(a - b, dim=1)  # its slope at 0 is 0, not NaN
        pull, push = distance.square(), F.relu(self.margin - distance).square()
        return (targets * pull + (1 - targets) * push).mean() / 2


class BatchTriplet(nn.Module):
    """Triplets found in the batch: mean of ``max(0, margin + d(a, p) - d(a, n))``, p of a's label and n of another.

    - ``hard``: for each anchor its farthest p and its nearest n (Hermans, Beyer and Leibe 2017, batch hard);
    - ``semi_hard``: for each pair (a, p) the nearest n with ``d(a, p) < d(a, n) < d(a, p) + margin``; pairs without one
      do not count (Schroff, Kalenichenko and Philbin 2015, section 3.2);
    - ``all``: every triplet (Hermans et al., batch all).

    A micro-batch is mined ALONE: split differently, other triplets are found, so that the gradient depends on the world
    size. Without a triplet the loss is 0. ``all`` and ``semi_hard`` take memory of order N**3.

    Args:
        margin: above 0, or ``soft``: softplus(d(a, p) - d(a, n)) takes the place of the maximum (Hermans et al.).
        mining: hard, semi_hard or all.
        distance: euclidean, squared (Euclidean), or cosine (1 - cosine). All have finite slopes at distance 0.

    Shapes: guesses (embeddings) are (N, D), targets (labels) are (N).
    """

    def __init__(self, margin: float | str = 0.2, mining: str = "hard", distance: str = "euclidean"):
        super().__init__()
        self.margin = None if margin == "soft" else number("BatchTriplet: margin", margin, 0.0, above=True)
        self.mining = one_of("BatchTriplet: mining", mining, "hard", "semi_hard", "all")
        self.distance = one_of("BatchTriplet: distance", distance, "euclidean", "squared", "cosine")
        if self.margin is None and mining == "semi_hard":
            raise ConfigError(
                "BatchTriplet: semi_hard mining looks inside the margin, so that must be a number, not soft"
            )

    def forward(self, guesses: Tensor, targets: Tensor) -> Tensor:
        guesses = full(self, guesses)
        if guesses.dim() != 2 or not isinstance(targets, Tensor) or targets.shape != guesses.shape[:1]:
            raise misfit(self, guesses, targets, "(N, D) need targets (N)")
        distances = self._distances(guesses)
        different = targets[:, None] != targets
        same = ~different & ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)
        if self.mining == "hard":
            far = distances.masked_fill(~same, -math.inf).amax(1)
            near = distances.masked_fill(~different, math.inf).amin(1)
            found = same.any(1) & different.any(1)
        else:
            far, near = distances[:, :, None], distances[:, None, :]
            found = same[:, :, None] & different[:, None, :]
            if self.margin is not None and self.mining == "semi_hard":
                inside = found & (near > far) & (near < far + self.margin)
                far, near, found = distances, near.where(inside, math.inf).amin(2), inside.any(2)
        gap = (far - near).where(found, 0.0)
        terms = F.softplus(gap) if self.margin is None else F.relu(self.margin + gap)
        return terms.where(found, 0.0).sum() / found.sum().clamp(min=1)

    def _distances(self, x: Tensor) -> Tensor:
        if self.distance == "cosine":  # of unit vectors, 1 - cosine is half the squared distance
            x = F.normalize(x, dim=1)
        # By differences: through a matrix product, small distances lose their digits. The slope at 0 is 0.
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        return {"euclidean": distances, "squared": distances**2, "cosine": distances**2 / 2}[self.distance]
