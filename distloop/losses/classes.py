"""Losses on class scores: focal loss, and the overlap of segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distloop.losses.checks import alike, class_weights, classes, fitting, misfit, number


class Focal(nn.Module):
    """Cross-entropy that counts the well-classified less: mean of ``-alpha[t] (1 - p[t])**gamma log p[t]``.

    Lin et al. 2017 (equation 5), with a softmax over classes. The mean is F.cross_entropy's, over the targets that are
    not ``ignore_index``, weighted by ``alpha``: ``gamma`` 0 is F.cross_entropy. Where targets are ignored or weighted,
    the objective's weight must count the same: ``weigher``.

    Args:
        gamma: at least 0.
        alpha: a weight for each class.
        ignore_index: the target that does not count.

    Shapes: guesses (logits) are (N, C) or (N, C, d1, ...), targets (class indices) are (N) or (N, d1, ...).
    """

    alpha: Tensor | None

    def __init__(self, gamma: float = 2.0, alpha: Sequence[float] | None = None, ignore_index: int = -100):
        super().__init__()
        self.gamma, self.ignore_index = number("Focal: gamma", gamma, 0.0), ignore_index
        self.register_buffer("alpha", None if alpha is None else class_weights("Focal: alpha", alpha), persistent=False)

    def forward(self, guesses: Tensor, targets: Tensor) -> Tensor:
        guesses, targets = classes(self, guesses, targets)
        valid = targets != self.ignore_index
        chosen = targets.where(valid, 0)
        log_p = F.log_softmax(guesses, 1).gather(1, chosen.unsqueeze(1)).squeeze(1).masked_fill(~valid, 0.0)
        weights = valid.to(log_p)
        if self.alpha is not None:
            self.alpha = fitting(self, self.alpha, guesses.shape[1]).to(guesses.device)
            weights = weights * self.alpha.to(log_p)[chosen]
        # At p = 1 a power below 1 has an infinite slope, which times log p = 0 would be NaN: the clamp stops it.
        rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
        return -(weights * rest**self.gamma * log_p).sum() / weights.sum()


class BinaryFocal(nn.Module):
    """The same for yes or no: mean of ``-a (1 - q)**gamma log q``, q being the probability given to the target.

    Lin et al. 2017 (equation 5), with a sigmoid; ``a`` is ``alpha`` where the target is 1 and ``1 - alpha`` where it is
    0, or 1 throughout without ``alpha``. The defaults are the paper's, which divides by the number of anchors assigned
    to an object; this mean is over all elements. ``gamma`` 0 without ``alpha`` is F.binary_cross_entropy_with_logits.

    Args:
        gamma: at least 0.
        alpha: from 0 to 1, or None.

    Shapes: guesses (logits) and targets (0 or 1) are alike.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = 0.25):
        super().__init__()
        self.gamma = number("BinaryFocal: gamma", gamma, 0.0)
        self.alpha = None if alpha is None else number("BinaryFocal: alpha", alpha, 0.0, 1.0)

    def forward(self, guesses: Tensor, targets: Tensor) -> Tensor:
        guesses, targets = alike(self, guesses, targets)
        away = guesses * (1 - 2 * targets)
        # 1 - q = sigmoid(away), raised to a power through its logarithm: finite slopes for any gamma.
        terms = torch.exp(-self.gamma * F.softplus(-away)) * F.softplus(away)
        if self.alpha is not None:
            terms = terms * (self.alpha * targets + (1 - self.alpha) * (1 - targets))
        return terms.mean()


class Dice(nn.Module):
    """Overlap of segments: 1 - the mean over samples and classes of ``(2 sum p g + s) / (sum p**2 + sum g**2 + s)``.

    Milletari, Navab and Ahmadi 2016 (section 3), for several classes: p is the softmax, g is 1 at the target's class,
    and the sums are over the places of ONE sample. Dice is no mean over places; taken for each sample, then averaged
    over samples, it stays exact when a global batch is split over ranks, which Dice of a whole batch does not.

    Args:
        smooth: s, above 0; a class that is absent and not guessed counts as 1.
        squared: the paper's squares in the denominator; or the plain sums that others use.
        background: whether class 0 counts.
        ignore_index: the target of places that do not count.

    Shapes: guesses (logits) are (N, C, d1, ...), C at least 2; targets (class indices) are (N, d1, ...).
    """

    def __init__(self, smooth: float = 1.0, squared: bool = True, background: bool = True, ignore_index: int = -100):
        super().__init__()
        self.smooth = number(f"{type(self).__name__}: smooth", smooth, 0.0, above=True)
        self.squared, self.background, self.ignore_index = squared, background, ignore_index

    def forward(self, guesses: Tensor, targets: Tensor) -> Tensor:
        guesses, targets = classes(self, guesses, targets)
        if guesses.dim() < 3 or guesses.shape[1] < 2:
            raise misfit(self, guesses, targets, "(N, C, d1, ...), C at least 2, are needed")
        valid = targets != self.ignore_index
        truth = F.one_hot(targets.where(valid, 0), guesses.shape[1]).movedim(-1, 1)
        p, g = (x.flatten(2) for x in (guesses.softmax(1) * valid.unsqueeze(1), truth * valid.unsqueeze(1)))
        size = (p.square() if self.squared else p).sum(2) + g.sum(2)
        dice = (2 * (p * g).sum(2) + self.smooth) / (size + self.smooth)
        return 1 - dice[:, 0 if self.background else 1 :].mean()


class CrossEntropyDice(Dice):
    """Cross-entropy and Dice in one sum, ``cross_entropy CE + dice Dice`` (nnU-Net: Isensee et al. 2021).

    Dice has plain sums in its denominator, as there. Both are taken for each sample, over its places that are not
    ``ignore_index``, then averaged over samples, so that one weight, the number of samples, is right for both. If
    nothing is ignored the first is F.cross_entropy.

    Args:
        cross_entropy: weight of the first, at least 0.
        dice: weight of the second, at least 0.
        smooth, background, ignore_index: as ``Dice`` has them.

    Shapes: those of ``Dice``.
    """

    def __init__(
        self,
        cross_entropy: float = 1.0,
        dice: float = 1.0,
        smooth: float = 1.0,
        background: bool = True,
        ignore_index: int = -100,
    ):
        super().__init__(smooth, False, background, ignore_index)
        self.cross_entropy = number("CrossEntropyDice: cross_entropy", cross_entropy, 0.0)
        self.dice = number("CrossEntropyDice: dice", dice, 0.0)

    def forward(self, guesses: Tensor, targets: Tensor) -> Tensor:
        dice = super().forward(guesses, targets)
        guesses, targets = classes(self, guesses, targets)
        terms = F.cross_entropy(guesses, targets, ignore_index=self.ignore_index, reduction="none").flatten(1)
        counted = (targets != self.ignore_index).flatten(1).sum(1).clamp(min=1)
        return self.cross_entropy * (terms.sum(1) / counted).mean() + self.dice * dice
