"""Sheets of small images, for the pictures of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def sheet(figure: Any, images: Tensor, titles: Sequence[str] = ()) -> None:
    """Draw images side by side on a matplotlib figure.

    Args:
        figure: to draw on.
        images: of shape (rows, columns, height, width), grey values in [0, 1].
        titles: of the rows.
    """
    rows, columns, height, width = images.shape
    scale = 0.06
    label = 1.2 if titles else 0.0
    figure.set_size_inches(columns * (width + 1) * scale + label, rows * (height + 1) * scale)
    padded = images.new_ones((rows, columns, height + 1, width + 1))
    padded[:, :, :height, :width] = images.clamp(0.0, 1.0)
    axes = figure.subplots()
    axes.imshow(padded.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * (height + 1) - 1 for row in range(len(titles))], titles)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
