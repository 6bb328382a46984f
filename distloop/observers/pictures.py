"""Learning curves as a picture, drawn when the run ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from distloop.observers.text import label
from distloop.records import Record


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
