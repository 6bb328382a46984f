"""What a task draws, beside the curves of its run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distloop.evaluation import evaluating
from distloop.observers.curves import new_figure
from distloop.records import Record

Pictures = Mapping[str, Callable[[Any], None]]


class TaskPictures:
    """What a task draws: at each evaluation into ``pictures/NAME-STEP.png``, at the end into ``NAME.png``.

    Drawing leaves no trace in the training, and no mistake in it ends one.

    Args:
        task: has ``pictures()``, which returns by name what draws on a matplotlib figure.
        directory: of the run.
    """

    def __init__(self, task: Any, directory: Path):
        self._task, self._directory = task, directory
        self._failed: set[str] = set()

    def __call__(self, record: Record) -> None:
        if record.kind not in ("evaluate", "end"):
            return
        models = [objective.model for objective in self._task.objectives.values()]
        with evaluating(models), torch.random.fork_rng(devices=[]):
            pictures: Pictures = {}
            with self._told_once("pictures()"):
                pictures = dict(self._task.pictures())
            for name, draw in pictures.items():
                with self._told_once(f"picture {name!r}"):
                    if record.kind == "evaluate":
                        self._draw(self._of(name, record.step), draw)
                    else:
                        self._keep(name, int(record.values["kept_step"]), draw)

    @contextmanager
    def _told_once(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as failure:
            if what not in self._failed:
                reason = f"{type(failure).__name__}: {failure}"
                print(f"distloop: the task's {what} failed: {reason}; training goes on", file=sys.stderr)
            self._failed.add(what)

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
        figure = new_figure(6.4, 4.8)
        draw(figure)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=120)
