"""The two losses of a generative adversarial network, from the discriminator's logits.

Functions rather than modules: a discriminator is judged on two sets of guesses and no targets. All are means over the
logits, so with as many real as made samples in each micro-batch they stay exact when a global batch is split.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from distloop.losses.checks import full, number, one_of


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return ``-mean log D(real) - mean log(1 - D(fake))``, to be minimised by the discriminator.

    Goodfellow et al. 2014 (equation 1, negated), D being the sigmoid of a logit: binary cross-entropy on targets 1 for
    real and 0 for fake, the two means added. Each may have any shape.

    Args:
        real_logits: the discriminator's answer to samples from the data.
        fake_logits: its answer to the generator's samples, which are to be detached.
        smoothing: at least 0 and below 1; real targets are 1 - ``smoothing``, those of fakes stay 0 (one-sided label
            smoothing, Salimans et al. 2016, section 3.4).

    Raises:
        ConfigError: ``smoothing`` is out of range, or logits are no tensors.
    """
    smoothing = number("discriminator_loss: smoothing", smoothing, 0.0, 1.0, below=True)
    real, fake = full("discriminator_loss", real_logits), full("discriminator_loss", fake_logits)
    # -t log D(x) - (1 - t) log(1 - D(x)) = softplus(-x) + (1 - t) x, which no logit overflows
    return (F.softplus(-real) + smoothing * real).mean() + F.softplus(fake).mean()


def generator_loss(fake_logits: Tensor, kind: str = "non_saturating") -> Tensor:
    """Return what the generator minimises.

    Goodfellow et al. 2014: ``minimax`` is ``mean log(1 - D(fake))`` (equation 1), whose gradient vanishes while the
    discriminator wins; ``non_saturating`` is ``-mean log D(fake)`` (section 3), with the same fixed point.

    Args:
        fake_logits: the discriminator's answer to the generator's samples, not detached; of any shape.
        kind: non_saturating or minimax.

    Raises:
        ConfigError: ``kind`` is neither, or logits are no tensor.
    """
    fake = full("generator_loss", fake_logits)
    if one_of("generator_loss: kind", kind, "non_saturating", "minimax") == "minimax":
        return -F.softplus(fake).mean()
    return F.softplus(-fake).mean()
