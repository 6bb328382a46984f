"""Pictures of a run: its learning curves, drawn when it ends, and what its task draws."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from distloop.observers.text import label
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
        self._series: dict[tuple[str, str], list[tuple[int, float]]] = {}

    def __call__(self, record: Record) -> None:
        if record.kind == "end":
            self._draw(record.values)
        if record.kind not in ("train", "evaluate"):
            return
        for key, value in record.values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._series.setdefault((record.kind, key), []).append((record.step, float(value)))

    def _panels(self) -> dict[str, list[tuple[str, str]]]:
        panels: dict[str, list[tuple[str, str]]] = {}
        for kind, key in self._series:
            last = key.rpartition("/")[2]
            if kind == "evaluate" or last in ("loss", "lr", "gradient_norm"):
                panels.setdefault(last, []).append((kind, key))
        return dict(sorted(panels.items(), key=lambda item: (item[0] != "loss", item[0] == "lr")))

    def _draw(self, result: Any) -> None:
        panels = self._panels()
        if not panels:
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
            FigureCanvasAgg(figure)
            for axes, (panel, series) in zip(
                figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
            ):
                for kind, key in series:
                    steps, values = zip(*self._series[kind, key], strict=True)
                    name = {"train": "training", "evaluate": "evaluation"}[kind]
                    role = key.rpartition("/")[0]
                    mark = "o" if kind == "evaluate" and len(steps) < 40 else ""
                    axes.plot(steps, values, marker=mark, markersize=3, label=f"{role} {name}".strip())
                axes.set_title({"lr": "learning rate"}.get(panel, label(panel)))
                axes.set_xlabel("step")
                axes.grid(alpha=0.3)
                shown = [value for one in series for _, value in self._series[one]]
                if panel.endswith("loss") and min(shown) > 0 and max(shown) > 10 * min(shown):
                    axes.set_yscale("log")
                if result["best_metric"] == panel and result["best"] is not None:
                    axes.plot(result["best_step"], result["best"], "*", color="black", markersize=10, label="best")
                if len(axes.lines) > 1:
                    axes.legend()
            figure.savefig(self._path, dpi=120)
        except OSError as failure:
            print(f"distloop: {self._path}: {failure.strerror}; there is no picture of this run", file=sys.stderr)
