"""What the command line's TARGET, and the settings behind it, come to."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distloop.errors import ConfigError, nearest
from distloop.values import brief, shown

if TYPE_CHECKING:
    from distloop.settings import Resolved

SETTINGS_FOLLOW = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}
TRAIN: tuple[click.Parameter, ...] = (  # what train has of its own; all else are settings
    click.Argument(["target"], required=False),
    click.Option(
        ["--resume"],
        metavar="auto|PATH",
        help="Go on: auto in the run directory log.name, if it is there; PATH is a run, or one of its checkpoints.",
    ),
    click.Option(
        ["--simulate", "ranks"],
        type=click.IntRange(1),
        metavar="N",
        help="Run N ranks as threads of this process, one at a time: for a debugger, or to see what N ranks do.",
    ),
    click.Option(["--traceback"], is_flag=True, help="Show where in the code an error comes from."),
)


@dataclass(frozen=True)
class Given:
    """What stands behind ``distloop train``: its own words, and the settings."""

    target: str | None
    resume: str | None
    ranks: int | None
    traceback: bool
    settings: tuple[str, ...]

    def resolved(self) -> Resolved:
        """Return the configuration that this comes to."""
        return resolve(*resumed(self.target, self.resume, list(self.settings)))


def given(words: Sequence[str]) -> Given:
    """Return what words are to train, for those who start it."""
    context_settings = SETTINGS_FOLLOW | {"help_option_names": []}
    command = click.Command("train", params=list(TRAIN), context_settings=context_settings)
    try:
        context = command.make_context("train", list(words))
    except click.UsageError as failure:
        raise ConfigError(f"command line: {failure.format_message()}") from failure
    return Given(**context.params, settings=tuple(context.args))


def resumed(target: str | None, resume: str | None, arguments: list[str]) -> tuple[str, list[str]]:
    """Return target and settings with what ``--resume`` says."""
    if target is not None and target.startswith("-") and resume not in (None, "auto"):
        arguments = [target, *arguments]  # the first setting, where there is no target
        target = None
    if resume is not None:
        arguments = [*arguments, f"--checkpoint.resume={_quoted(resume)}"]
    if target is not None:
        return target, arguments
    if resume is None or resume == "auto":
        raise ConfigError(
            "command line: TARGET is missing: what is to be trained? settings come behind it (or --resume PATH)"
        )
    path = Path(resume)
    path = path if path.name not in ("", "..") else path.absolute()
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not _is(run / "config.yaml"):
        raise ConfigError(f"command line --resume: {brief(resume)}: is no run directory: it has no config.yaml")
    where = [f"--log.directory={_quoted(str(run.parent))}", f"--log.name={_quoted(run.name)}"]
    arguments = [*where, *arguments]
    return str(run / "config.yaml"), arguments


def _quoted(text: str) -> str:
    """Return what stands for a text in YAML, whatever it looks like: a run may be called 2024, or "a #1"."""
    return json.dumps(text, ensure_ascii=False)


def _is(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or a folder that may not be looked into
        return False


def resolve(target: str, arguments: list[str]) -> Resolved:
    """Return the configuration that a target and the settings behind it come to."""
    from distloop import settings
    from distloop.layers import Setting
    from distloop.tasks import TASKS

    sys.path.insert(0, str(Path.cwd()))  # a task of the user's own is looked for in the current folder
    if target.startswith("-"):
        raise ConfigError(f"command line: {brief(target)} stands where TARGET should: settings come behind it")
    if not _is(Path(target)) and not Path(target).suffix and ":" not in target and target not in TASKS:
        raise ConfigError(
            f"command line: {shown(target)} is neither a file nor a supplied task{nearest(target, TASKS)}"
        )
    if target in TASKS or (":" in target and not _is(Path(target))):
        base = {"task.name": Setting(target, "command line")}
    else:
        base = settings.from_file(Path(target))
    return settings.resolve(base, settings.from_environment(), settings.from_arguments(arguments))
