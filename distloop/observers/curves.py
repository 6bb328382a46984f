"""Learning curves of one or several runs in one picture: what is drawn of a run's records, and how.

matplotlib is imported when something is drawn. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from distloop.errors import ConfigError, nearest
from distloop.observers.text import label
from distloop.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"train": "training", "evaluate": "evaluation"}
ALWAYS = ("loss", "lr", "gradient_norm")  # of training; the rest of it is drawn on demand
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
COLUMNS = 4  # panels beside each other
FEW = 40  # points that are marked one by one
PER_INCH = 11.5  # characters of a legend
ROOM = 1.6  # inches beside it, for what kinds of lines there are

Series = tuple[str, str]  # kind and key
Panels = dict[str, list[Series]]


class Point(NamedTuple):
    """A value, and when it was: in updates, in epochs, in seconds since the start."""

    step: int
    epoch: float
    seconds: float
    value: float


class Curves:
    """What a run has told so far, as points by kind and key."""

    def __init__(self, name: str = ""):
        self.name = name
        self.series: dict[Series, list[Point]] = {}
        self.best: tuple[str, int] | None = None  # metric and step
        self.ended = ""  # end, failure, or nothing yet
        self._begun: float | None = None
        self._steps_per_epoch: int | None = None

    def add(self, record: Record, moment: float) -> None:
        """Take note of a record of ``moment``, in seconds."""
        self._begun = moment if self._begun is None else self._begun
        values = record.values
        if record.kind == "start":
            self.ended = ""  # it may have been resumed
            told = re.search(r"in (\d+) steps per epoch", str(values.get("batch")))
            self._steps_per_epoch = int(told[1]) if told else None
        if record.kind in ("end", "failure"):
            self.ended = record.kind
        if record.kind == "end" and values.get("best_step") is not None:
            self.best = str(values["best_metric"]), int(values["best_step"])
        if record.kind not in KINDS:
            return
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                # Where the length of an epoch is not known, an epoch is over when it is counted.
                epoch = record.step / self._steps_per_epoch if self._steps_per_epoch else record.epoch + 1
                point = Point(record.step, epoch, moment - self._begun, float(value))
                self.series.setdefault((record.kind, key), []).append(point)


def panels(runs: Sequence[Curves], metrics: Sequence[str] = ()) -> Panels:
    """Return the series of each panel: the losses, each other evaluated metric, the learning rate; or ``metrics``.

    Raises:
        ConfigError: no run has one of ``metrics``.
    """
    known = list(dict.fromkeys(series for run in runs for series in run.series))
    if metrics:
        chosen = {name: [s for s in known if name in (s[1], _last(s[1]))] for name in metrics}
        for name, series in chosen.items():
            if not series:
                names = {_last(key) for _, key in known}
                raise ConfigError(f"command line --metric: no run has a metric {name!r}{nearest(name, names)}")
        return chosen
    found: Panels = {}
    for kind, key in known:
        if kind == "evaluate" or _last(key) in ALWAYS:
            found.setdefault(_last(key), []).append((kind, key))
    return dict(sorted(found.items(), key=lambda item: (item[0] != "loss", item[0] == "lr")))


def draw(
    runs: Sequence[Curves], *, x: str = "step", metrics: Sequence[str] = (), smooth: int = 1, title: str = ""
) -> Figure:
    """Return a picture of ``runs``.

    One run has a colour for each series. Of several, each has its own colour, pale for training where there is an
    evaluation beside it, and one legend for all panels.

    Args:
        x: step, epoch or seconds.
        metrics: names of panels; by default what :func:`panels` chooses.
        smooth: draw the mean over this many training records.
        title: stands above all panels.
    """
    chosen = panels(runs, metrics)
    columns = max(1, min(len(chosen), COLUMNS))
    rows = -(-len(chosen) // columns) or 1
    width = max(4.2 * columns, 6.0) if len(runs) > 1 else 4.2 * columns
    figure = new_figure(width, 3.4 * rows)
    if title:
        figure.suptitle(plain(title), fontsize="medium")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    colours = _colours(len(runs))
    for (name, series), axes in zip(chosen.items(), grid, strict=False):  # panels first: zip takes no axes too many
        for run, colour in zip(runs, colours, strict=True):
            _lines(axes, run, series, x, smooth, colour if len(runs) > 1 else None)
        _dress(axes, name, x)
        if len(runs) == 1 and len(axes.lines) > 1:
            axes.legend()
    for spare in list(grid):
        spare.set_visible(False)
    if len(runs) > 1:
        _legend(figure, runs, colours, chosen)
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty picture that needs no screen; sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Return ``text`` so that matplotlib shows it as it is: no formula between dollars, no hidden label."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _role(key: str) -> str:
    return key.rpartition("/")[0]


def _roles(series: Sequence[Series]) -> list[str]:
    return list(dict.fromkeys(_role(key) for _, key in series))


def _lines(axes: Axes, run: Curves, series: Sequence[Series], x: str, smooth: int, colour: Any) -> None:
    """Draw a run's part of a panel; a run without a colour of its own is alone."""
    for number, (kind, key) in enumerate(series):
        points = run.series.get((kind, key), [])
        if not points:
            continue
        values = [point.value for point in points]
        if kind == "train" and smooth > 1 and _last(key) != "lr":
            parts = [values[max(0, end - smooth) : end] for end in range(1, len(values) + 1)]
            values = [sum(part) / len(part) for part in parts]
        pale = colour is not None and kind == "train" and ("evaluate", key) in series
        axes.plot(
            [getattr(point, x) for point in points],
            values,
            LINES[_roles(series).index(_role(key)) % len(LINES)] if colour is not None else "-",
            color=colour or f"C{number}",
            marker="o" if len(points) < (FEW if kind == "evaluate" else 2) else "",
            markersize=3,
            linewidth=0.9 if pale else 1.6,
            alpha=0.5 if pale else 1.0,
            label=f"{_role(key)} {KINDS[kind]}".strip(),
        )
        best = [p for p in points if kind == "evaluate" and run.best == (key, p.step)]
        for point in best[-1:]:
            axes.plot(
                *(getattr(point, x), point.value),
                "*",
                color=colour or "black",
                markeredgecolor="black",
                markersize=10,
                label="best",
                zorder=3,
            )


def _dress(axes: Axes, name: str, x: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_title({"lr": "learning rate"}.get(name, label(name)))
    axes.set_xlabel({"seconds": "seconds since the start"}.get(x, x))
    axes.grid(alpha=0.3)
    lines: Any = axes.lines
    shown = [float(value) for line in lines for value in line.get_ydata()]
    if name.endswith("loss") and min(shown) > 0 and max(shown) > 10 * min(shown):
        axes.set_yscale("log")
        if max(shown) < 100 * min(shown):  # so few powers of ten that those between them need words too
            axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")


def _colours(runs: int) -> list[Any]:
    from matplotlib import colormaps

    return [f"C{i}" for i in range(runs)] if runs <= 10 else [colormaps["turbo"](i / (runs - 1)) for i in range(runs)]


def _legend(figure: Figure, runs: Sequence[Curves], colours: Sequence[Any], chosen: Panels) -> None:
    """Say below all panels which colour is which run, and which line is what of it."""
    from matplotlib.lines import Line2D

    width = figure.get_figwidth()
    names = ["\n".join(textwrap.wrap(plain(run.name), int(PER_INCH * (width - ROOM)))) for run in runs]
    entries = [Line2D([], [], color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    styles = _styles(runs, chosen)
    longest = max(len(text) for name in names for text in name.splitlines() or [""])
    columns = max(1, min(len(entries), int(PER_INCH * (width - ROOM) / (longest + 8))))
    lines = max(sum(name.count("\n") for name in names) + -(-len(entries) // columns), len(styles))
    figure.set_figheight(figure.get_figheight() + 0.2 * lines + 0.2)
    look: dict[str, Any] = {"fontsize": "small", "frameon": False}
    figure.legend(handles=entries, loc="outside lower left", ncols=columns, **look)
    if styles:
        figure.legend(handles=styles, loc="outside lower right", **look)


def _styles(runs: Sequence[Curves], chosen: Panels) -> list[Any]:
    """Return the legend's entries about lines of any colour."""
    from matplotlib.lines import Line2D

    series = [one for group in chosen.values() for one in group]
    entries = []
    if any(("train", key) in group and ("evaluate", key) in group for group in chosen.values() for _, key in group):
        entries.append(Line2D([], [], color="black", linewidth=0.9, alpha=0.5, label="training"))
        entries.append(Line2D([], [], color="black", linewidth=1.6, label="evaluation"))
    if any(run.best and ("evaluate", run.best[0]) in series for run in runs):
        entries.append(Line2D([], [], color="black", marker="*", linestyle="", markersize=10, label="best"))
    roles = list(dict.fromkeys(role for group in chosen.values() if len(_roles(group)) > 1 for role in _roles(group)))
    for number, role in enumerate(roles):
        entries.append(Line2D([], [], color="black", linestyle=LINES[number % len(LINES)], label=plain(role or "all")))
    return entries
