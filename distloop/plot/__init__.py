"""``distloop plot``: learning curves of runs, and the learning rate of a run that has not begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distloop.errors import ConfigError, StorageError, nearest
from distloop.observers import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg", ".jpg")
OPTIONS = ("--schedule", "--output", "--metric", "--x", "--smooth", "--traceback", "--help")


def check_request(targets: Sequence[str], schedule: str | None, output: Path, for_runs: Sequence[str]) -> None:
    """Refuse what contradicts itself before anything is read.

    Args:
        targets: run directories; behind ``--schedule``, settings.
        schedule: the configuration whose learning rate is wanted.
        output: where the picture goes.
        for_runs: options that were given and that only runs have.

    Raises:
        ConfigError: with what would be right.
    """
    require("matplotlib", "plot", "plots")
    if output.suffix.lower() not in ENDINGS:
        raise ConfigError(f"command line --output: {output}: a picture's name ends in {', '.join(ENDINGS)}")
    first = targets[0] if targets else ""
    if schedule is None:
        if not targets:
            raise ConfigError("command line: give run directories, as in runs/*, or --schedule with a configuration")
        for option in (target for target in targets if target.startswith("-")):
            name = option.partition("=")[0]
            hint = "; settings are for --schedule" if "." in name else nearest(name, OPTIONS)
            raise ConfigError(f"command line: plot has no option {name!r}{hint}")
    elif first and not first.startswith("-"):
        raise ConfigError(f"command line: {first!r} and --schedule are two pictures: draw them one after the other")
    elif for_runs:
        raise ConfigError(f"command line: {for_runs[0]} is for the curves of runs, and --schedule has none")


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format that the path's ending names.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except OSError as failure:
        raise StorageError(f"{path}: cannot be written: {failure.strerror or failure}") from failure
