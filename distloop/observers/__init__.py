"""Observers: callables that are told what happens in a run (a ``Record``) and show it to someone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distloop.errors import ConfigError
from distloop.records import Observer


def make_observers(
    directory: Path,
    *,
    rank: int,
    total_steps: int | None,
    progress: bool | None,
    tensorboard: bool | None,
    picture: bool | None,
    task: Any = None,
) -> tuple[list[Observer], Callable[[int], None] | None]:
    """Return the supplied observers of a rank, and what advances its progress bar, if it has one.

    ``task`` may have pictures of its own to show.

    Raises:
        ConfigError: TensorBoard or a picture is asked for, but the library is missing.
    """
    from distloop.observers.files import JsonLines, LogFile, TensorBoard
    from distloop.observers.history import RECORDS

    if rank != 0:
        return [LogFile(directory / "logs" / f"rank_{rank}.log")], None
    from distloop.observers.console import Console
    from distloop.observers.pictures import LearningCurves

    console = Console(total_steps, progress)
    observers: list[Observer] = [LogFile(directory / "logs" / "rank_0.log"), JsonLines(directory / RECORDS)]
    if _wanted(tensorboard, "tensorboardX", "log.tensorboard", "tensorboard"):
        observers.append(TensorBoard(directory / "tensorboard"))
    if _wanted(picture, "matplotlib", "log.picture", "plots"):
        observers.append(LearningCurves(directory / "curves.png"))
        if hasattr(task, "pictures"):
            from distloop.observers.task_pictures import TaskPictures

            observers.append(TaskPictures(task, directory))
    return [*observers, console], console.advance if console.shows_progress else None


def require(module: str, what: str, extra: str) -> None:
    """Raise a ConfigError if a library is missing that ``what`` needs."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{what}: needs {module}: pip install 'distloop[{extra}]'")


def _wanted(asked: bool | None, module: str, key: str, extra: str) -> bool:
    if asked:
        require(module, key, extra)
    return importlib.util.find_spec(module) is not None if asked is None else asked
