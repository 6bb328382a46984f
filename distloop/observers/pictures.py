"""Pictures of a run: its learning curves, drawn when it ends, and what its task draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from distloop.observers.curves import Curves, draw
from distloop.records import Record

Pictures = Callable[[], Mapping[str, Callable[[Any], None]]]


class TaskPictures:
    """What a task draws: at each evaluation into ``pictures/NAME-STEP.png``, at the end into ``NAME.png``.

    Args:
        pictures: the task's; returns by name what draws on a matplotlib figure.
        directory: of the run.
        quietly: a context in which drawing leaves no trace in the training.
    """

    def __init__(self, pictures: Pictures, directory: Path, quietly: Callable[[], AbstractContextManager[None]]):
        self._pictures, self._directory, self._quietly = pictures, directory, quietly

    def __call__(self, record: Record) -> None:
        if record.kind not in ("evaluate", "end"):
            return
        try:
            with self._quietly():
                for name, draw in self._pictures().items():
                    self._draw(record, name, draw)
        except OSError as failure:
            print(f"distloop: {self._directory}: {failure.strerror}; a picture is missing", file=sys.stderr)

    def _draw(self, record: Record, name: str, draw: Callable[[Any], None]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        path = self._directory / f"{name}.png"
        if record.kind == "evaluate":
            path = self._directory / "pictures" / f"{name}-{record.step:06d}.png"
            path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)


class LearningCurves:
    """One panel for the losses, one for each other evaluated metric, one for the learning rate."""

    def __init__(self, path: Path):
        self._path = path
        self.curves = Curves()

    def __call__(self, record: Record) -> None:
        self.curves.add(record, time.time())
        if record.kind != "end" or not self.curves.series:
            return
        try:
            draw([self.curves]).savefig(self._path, dpi=120)
        except OSError as failure:
            print(f"distloop: {self._path}: {failure.strerror}; there is no picture of this run", file=sys.stderr)
