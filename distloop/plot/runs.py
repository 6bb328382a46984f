"""Run directories as learning curves, named by what tells their configurations apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distloop.errors import ConfigError, DataError
from distloop.observers.curves import Curves, draw, panels
from distloop.observers.history import RECORDS, read_records
from distloop.observers.text import label
from distloop.plot import save
from distloop.yaml_file import read_sections

MOST_SETTINGS = 8  # in a legend
FIRST = ("ranks", "task", "optimizer", "schedule", "data", "train", "gradients", "strategy")  # the others after these
OWN = ("log.",)  # differs between any two runs, and changes nothing in them


@dataclass
class Run:
    """A run directory, as far as it has come."""

    path: Path
    curves: Curves
    settings: dict[str, Any]

    @property
    def state(self) -> str:
        return {"end": "", "failure": " (failed)"}.get(self.curves.ended, " (not finished)")


def plot_runs(paths: Sequence[str], output: Path, *, x: str, metrics: Sequence[str], smooth: int) -> str:
    """Draw the curves of run directories into ``output``; return what was drawn, in words.

    Raises:
        ConfigError: a path is no run directory, or no run has one of ``metrics``.
        DataError: there is nothing to draw, or it cannot be read.
        StorageError: ``output`` cannot be written.
    """
    read = [read_run(Path(path)) for path in dict.fromkeys(paths)]
    runs = [run for run in read if run.curves.series]
    if not runs:
        raise DataError(f"{read[0].path / RECORDS}: has no record of training or evaluation, so there is no curve yet")
    name_by_differences(runs)
    curves = [run.curves for run in runs]
    chosen = panels(curves, metrics)
    save(draw(curves, x=x, metrics=metrics, smooth=smooth, title=curves[0].name if len(runs) == 1 else ""), output)
    what = ", ".join({"lr": "learning rate"}.get(panel, label(panel)) for panel in chosen)
    empty = [str(run.path) for run in read if not run.curves.series]
    without = f"; without {', '.join(empty)}, which has no record to draw" if empty else ""
    return f"{output}: {what} of {len(runs)} run{'s' if len(runs) > 1 else ''}{without}"


def read_run(path: Path) -> Run:
    """Read the records and the configuration of a run directory, finished or not.

    Raises:
        ConfigError: it is no run directory.
        DataError: its records cannot be read.
    """
    if not (path / RECORDS).is_file():
        inner = sorted(file.parent.name for file in path.glob(f"*/{RECORDS}"))
        reason = "there is no such folder" if not path.exists() else f"is no run directory, it has no {RECORDS}"
        raise ConfigError(f"{path}: {reason}" + (f" (in it are: {', '.join(inner[:5])})" if inner else ""))
    curves, settings = Curves(), {}
    for record, moment in read_records(path / RECORDS):
        curves.add(record, moment)
        if record.kind == "start":  # "2 ranks started by torchrun on cpu": the configuration does not know how many
            settings["ranks"] = str(record.values.get("world", "")).partition(" ")[0]
    if (path / "config.yaml").is_file():
        sections = read_sections(path / "config.yaml")
        settings |= {f"{name}.{key}": value for name, keys in sections.items() for key, (value, _) in keys.items()}
    return Run(path, curves, {key: value for key, value in settings.items() if not key.startswith(OWN)})


def name_by_differences(runs: Sequence[Run]) -> None:
    """Name each run's curves by its directory, how it stands, and the settings in which the runs differ."""
    names = [run.path.resolve().name for run in runs]
    differing = differences([run.settings for run in runs])
    for run, name in zip(runs, names, strict=True):
        settings = [f"{shown} {_short(run.settings[key])}" for key, shown in differing.items() if key in run.settings]
        if len(settings) > MOST_SETTINGS:
            settings[MOST_SETTINGS:] = [f"and {len(settings) - MOST_SETTINGS} more"]
        own = name if names.count(name) == 1 else str(run.path)
        run.curves.name = own + run.state + (": " if settings else "") + ", ".join(settings)


def differences(settings: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the dotted keys whose values are not the same everywhere, with the shortest name that tells them apart."""
    keys = sorted({key for one in settings for key in one}, key=_rank)
    # As JSON, which tells 1 from true; a missing key from null.
    values = {key: {json.dumps(one[key], default=str) if key in one else "" for one in settings} for key in keys}
    differing = [key for key in keys if len(values[key]) > 1]
    short = {key: key.removesuffix(".name") if key.endswith(".name") else key.rpartition(".")[2] for key in differing}
    return {key: label(name if list(short.values()).count(name) == 1 else key) for key, name in short.items()}


def _rank(key: str) -> tuple[int, bool, str]:
    section = key.partition(".")[0]
    return FIRST.index(section) if section in FIRST else len(FIRST), not key.endswith(".name"), key


def _short(value: Any) -> str:
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:g}"
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
