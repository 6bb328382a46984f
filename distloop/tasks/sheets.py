"""Sheets of small images, for the pictures of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sheet(figure: Figure, rows: Mapping[str, Tensor]) -> None:
    """Draw a row of images for each name, dark on light.

    Args:
        rows: by name, images of shape (columns, height, width), grey values in [0, 1], 1 the darkest.
    """
    columns, height, width = next(iter(rows.values())).shape
    figure.set_size_inches(1.2 + 0.6 * columns, 0.75 * len(rows) * height / width)
    for axes, (name, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        strip = F.pad(images.detach().float().cpu(), (1, 1, 1, 1)).transpose(0, 1).flatten(1)
        axes.imshow(strip.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0)
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
