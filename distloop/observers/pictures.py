"""Pictures of a run: its learning curves, drawn when it ends, and what its task draws."""

from __future__ import annotations

import shutil
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
        self._failed = False

    def __call__(self, record: Record) -> None:
        if record.kind not in ("evaluate", "end"):
            return
        try:
            with self._quietly():
                for name, draw in self._pictures().items():
                    if record.kind == "evaluate":
                        self._draw(self._of(name, record.step), draw)
                    else:
                        self._keep(name, int(record.values["kept_step"]), draw)
        except Exception as failure:  # a mistake in a drawing, as much as a full disk, is no reason to end a training
            if not self._failed:
                reason = f"{type(failure).__name__}: {failure}"
                print(f"distloop: the task's pictures cannot be drawn: {reason}; training goes on", file=sys.stderr)
            self._failed = True

    def _of(self, name: str, step: int) -> Path:
        return self._directory / "pictures" / f"{name}-{step:06d}.png"

    def _keep(self, name: str, step: int, draw: Callable[[Any], None]) -> None:
        """Leave the picture of the model that was kept: the one of its evaluation, if it was evaluated."""
        path = self._directory / f"{name}.png"
        if self._of(name, step).exists():
            shutil.copyfile(self._of(name, step), path)
        else:
            self._draw(path, draw)

    def _draw(self, path: Path, draw: Callable[[Any], None]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
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
