"""Sheets of small images, for the pictures of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = 0.06  # per pixel


def sheet(figure: Figure, images: Tensor, names: Sequence[str] = ()) -> None:
    """Draw images side by side, dark on light.

    Args:
        figure: to draw on.
        images: of shape (rows, columns, height, width), grey values in [0, 1], 1 the darkest.
        names: of the rows.
    """
    padded = F.pad(images.detach().float().cpu(), (1, 1, 1, 1))
    rows, columns, height, width = padded.shape
    figure.set_size_inches(columns * width * INCHES + (1.2 if names else 0.0), rows * height * INCHES)
    axes = figure.subplots()
    axes.imshow(padded.transpose(1, 2).flatten(0, 1).flatten(1).numpy(), cmap="gray_r", vmin=0.0, vmax=1.0)
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * height - 0.5 for row in range(len(names))], names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
