"""Generative learning: digits out of noise, by two networks that learn against each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distloop.averages import MovingAverage
from distloop.errors import ConfigError
from distloop.losses import discriminator_loss, generator_loss
from distloop.objective import Objective
from distloop.optimizer import Adam, Group
from distloop.site import Site
from distloop.tasks.base import split
from distloop.tasks.checks import check_choice, check_range, check_sizes
from distloop.tasks.digits import TEST_IMAGES, convolutions, load_digits
from distloop.tasks.sheets import sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = tuple[Tensor, Tensor, Tensor]  # images (n, 64), noise for the discriminator's turn, noise for the generator's
Sums = dict[str, tuple[Tensor, float]]
CLASSES = 10
GROUPS = 4  # of the group norm
JUDGE_EPOCHS, JUDGE_LR = 20, 2e-3
SHOWN = 8  # samples in a row of the sheet, and rows
COVERED = 0.02  # a class is covered if at least this part of the samples, a fifth of its due, is of it


class Discriminator:
    """Tells images from what the generator makes; its targets are 1 and 0, which its loss has written into it."""

    def __init__(self, model: nn.Module, generator: nn.Module, smoothing: float):
        self.model, self.generator, self.smoothing = model, generator, smoothing

    def guess(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, noise, _ = batch
        with torch.no_grad():
            made = self.generator(noise)
        return self.model(images), self.model(made)

    def targets(self, batch: Batch) -> None:
        return None

    def loss(self, guesses: tuple[Tensor, Tensor], targets: None) -> Tensor:
        return discriminator_loss(*guesses, smoothing=self.smoothing)


class Generator:
    """Makes images that the discriminator takes for real; a moving average of it makes better ones."""

    def __init__(self, model: nn.Module, discriminator: nn.Module, kind: str, decay: float):
        self.model, self.discriminator, self.kind = model, discriminator, kind
        self.average = MovingAverage(model, decay) if decay else None

    def guess(self, batch: Batch) -> Any:
        return self.discriminator(self.model(batch[2]))

    def targets(self, batch: Batch) -> None:
        return None

    def loss(self, guesses: Tensor, targets: None) -> Tensor:
        return generator_loss(guesses, self.kind)

    def updated(self) -> None:
        if self.average is not None:
            self.average.update(self.model)

    def best(self) -> nn.Module:
        """Return what to make images with."""
        return self.average or self.model


class GAN:
    """Digits out of noise, by a deep convolutional GAN (Radford, Metz and Chintala 2016) of the size of the images.

    Group norm stands where the paper has batch norm: what it does to an image does not depend on the others, and so not
    on how a batch is split. The noise of an epoch is part of its data, the same on any number of ranks.

    A classifier that has learned the real digits judges the samples: ``confidence``, the mean of its largest
    probability; ``classes``, how many of the ten are at least 2 % of the samples; and ``score``, exp of the mean KL
    divergence between its answer to a sample and its mean answer (the inception score of Salimans et al. 2016, section
    4, with this classifier): 10 if every sample is beyond doubt and all classes are equally many, 1 at worst. What it
    says of real images that it has not seen stands beside, as ``real/score`` and ``real/confidence``.

    Args:
        noise: numbers that an image is made of.
        width: channels of the last layer but one.
        loss: of the generator, ``non_saturating`` or ``minimax``.
        discriminator_updates: per update of the generator (k of algorithm 1 in Goodfellow et al. 2014).
        smoothing: real images are called 1 - smoothing (Salimans et al. 2016, section 3.4).
        average: decay of the generator's moving average; 0 for none.
        samples: judged at each evaluation.
    """

    def __init__(
        self,
        noise: int = 32,
        width: int = 32,
        loss: str = "non_saturating",
        discriminator_updates: int = 1,
        smoothing: float = 0.1,
        average: float = 0.99,
        samples: int = 1000,
    ):
        check_sizes(noise=noise, discriminator_updates=discriminator_updates, samples=samples, width=width)
        check_range(0.0, 1.0, smoothing=smoothing, average=average, below=True)
        if width % GROUPS:
            raise ConfigError(f"task.width: {width} must be divisible by {GROUPS}, the groups of the group norm")
        check_choice("loss", loss, ("non_saturating", "minimax"))
        images, _ = load_digits()
        train, test = split(len(images), TEST_IMAGES)
        self._images, self._noise = images[train], noise
        made, told = generator(noise, width), discriminator(width)
        self._generator = Generator(made, told, loss, average)
        self.objectives: Mapping[str, Objective] = {
            "discriminator": Discriminator(told, made, smoothing),
            "generator": self._generator,
        }
        self.turns = {"generator": discriminator_updates}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._shown = torch.randn(SHOWN**2, noise)
            self.validation = TensorDataset(torch.randn(samples, noise))
        self._unseen = images[test]

    def join(self, site: Site) -> None:
        """Let rank 0 make the judge, and give it to all."""
        self._judge = judge(epochs=JUDGE_EPOCHS if site.world.rank == 0 else 0).to(site.device)
        for parameter in self._judge.parameters():
            site.transport.broadcast(parameter.detach())
        real = verdict(means(judged(self._judge(self._unseen.to(site.device)))))
        self._real = {f"real/{name}": real[name] for name in ("score", "confidence")}

    def collect(self, epoch: int) -> TensorDataset:
        """Return the images, with noise for both turns."""
        noise = torch.randn(2, len(self._images), self._noise)
        return TensorDataset(self._images, *noise)

    def evaluate(self, batch: tuple[Tensor]) -> Sums:
        """Return what :meth:`summarise` needs of samples made of noise."""
        return judged(self._judge(self._generator.best()(batch[0])))

    def summarise(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return score, confidence and the number of covered classes, and the former two of real images."""
        return verdict(metrics) | self._real

    def pictures(self) -> Mapping[str, Callable[[Figure], None]]:
        return {"samples": self._draw}

    def _draw(self, figure: Figure) -> None:
        """Draw samples, always of the same noise."""
        made = self._generator.best()(self._shown.to(next(self._generator.model.parameters()).device))
        sheet(figure, made.view(SHOWN, SHOWN, 8, 8))


def judged(scores: Tensor) -> Sums:
    """Return sums over images of confidence, negative entropy, and each class's part, from scores (n, 10)."""
    answers, count = scores.float().softmax(-1), float(len(scores))
    found: Sums = {
        "confidence": (answers.amax(-1).sum(), count),
        "negative_entropy": (torch.xlogy(answers, answers).sum(), count),
    }
    chosen = answers.argmax(-1)
    for label in range(CLASSES):
        found[f"answer/{label}"] = answers[:, label].sum(), count
        found[f"share/{label}"] = (chosen == label).sum(), count
    return found


def means(sums: Sums) -> dict[str, float]:
    """Return each sum over its count."""
    return {name: float(total) / count for name, (total, count) in sums.items()}


def verdict(means: Mapping[str, float]) -> dict[str, float]:
    """Return score, confidence and the number of covered classes from the means of :func:`judged`."""
    answer = [means[f"answer/{label}"] for label in range(CLASSES)]
    entropy = -sum(p * math.log(p) for p in answer if p > 0)
    return {
        "score": math.exp(means["negative_entropy"] + entropy),
        "confidence": means["confidence"],
        "classes": float(sum(means[f"share/{label}"] >= COVERED for label in range(CLASSES))),
    }


def generator(noise: int, width: int) -> nn.Sequential:
    """Return a network from noise (n, noise) to images (n, 64) with values in [0, 1]."""
    return _initialised(
        nn.Sequential(
            nn.Linear(noise, 2 * width * 4),
            nn.Unflatten(1, (2 * width, 2, 2)),
            nn.GroupNorm(GROUPS, 2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(GROUPS, width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.Flatten(),
            nn.Sigmoid(),
        )
    )


def discriminator(width: int) -> nn.Sequential:
    """Return a network from images (n, 64) to logits (n, 1)."""
    return _initialised(
        nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(GROUPS, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * 4, 1),
        )
    )


def _initialised(model: nn.Sequential) -> nn.Sequential:
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)  # Radford et al. 2016, section 4
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def judge(epochs: int, batch_size: int = 64) -> nn.Module:
    """Return a classifier of digits that has learned the training images, by a plain loop of a second or two."""
    images, labels = load_digits()
    train, _ = split(len(labels), TEST_IMAGES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(convolutions(16), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, CLASSES))
        weights = list(model.parameters())
        group = Group(list(range(len(weights))), [w.detach() for w in weights], weight_decay=0.0)
        for chosen in (part for _ in range(epochs) for part in train[torch.randperm(len(train))].split(batch_size)):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            Adam().update(group, list(torch.autograd.grad(loss, weights)), JUDGE_LR, None)
    return model.eval().requires_grad_(False)
