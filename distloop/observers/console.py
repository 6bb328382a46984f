"""What rank 0 prints: the facts at the start, a line per log step, a progress bar in a terminal, a table at the end."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from distloop.errors import REQUEUE
from distloop.observers.text import label, line, number
from distloop.records import Record


class _RichConsole(RichConsole):
    def on_broken_pipe(self) -> None:
        """Say so, where rich would end the process."""
        raise BrokenPipeError


class Console:
    """Prints records; with a progress bar below them if the output is a terminal (or ``progress`` says so)."""

    def __init__(self, total_steps: int | None, progress: bool | None = None):
        self._console = _RichConsole(highlight=False, soft_wrap=True, force_terminal=True if progress else None)
        self._total = total_steps
        self.shows_progress = self._console.is_terminal if progress is None else progress
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            auto_refresh=False,
        )
        self._bar_task = self._bar.add_task("training", total=total_steps)
        self._refreshed = 0.0

    def __call__(self, record: Record) -> None:
        try:
            self._show(record)
        except BrokenPipeError:  # whoever was reading has left; the training goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _show(self, record: Record) -> None:
        if record.kind == "start":
            self._facts(record.values)
            if self.shows_progress:
                self._bar.start()
        elif record.kind in ("end", "failure"):
            if self.shows_progress:
                self._bar.stop()
            if record.kind == "end":
                self._summary(record.values)
        elif record.kind == "checkpoint":
            self._checkpoint(record.values)
        else:
            self._line(line(record, self._total), bold=record.kind == "evaluate")

    def _checkpoint(self, values: Mapping[str, Any]) -> None:
        """Say what is wrong with a checkpoint; of those that are safe the log tells."""
        if "failure" in values:
            step = values["saved_step"]
            print(f"distloop: checkpoint of step {step}: {values['failure']}; the training goes on", file=sys.stderr)
        if "warning" in values:
            print(f"distloop: {values['warning']}", file=sys.stderr)

    def advance(self, step: int) -> None:
        """Move the bar, at most ten times a second."""
        now = time.monotonic()
        if now - self._refreshed > 0.1:
            self._refreshed = now
            self._bar.update(self._bar_task, completed=step)
            self._bar.refresh()

    def _line(self, text: str, *, bold: bool) -> None:
        if self._console.is_terminal:
            self._console.print(Text(text, style="bold" if bold else ""))
        else:
            print(text, flush=True)  # a rich line costs as much as ten steps of a small model

    def _facts(self, facts: Mapping[str, Any]) -> None:
        width = max([14, *(len(name) + 2 for name in facts)])
        for name, text in facts.items():
            self._entry(name, text, width)
        print(flush=True)

    def _entry(self, name: str, text: object, width: int = 14) -> None:
        self._console.print(Text(f"{name:<{width}}", style="dim"), Text(str(text)), sep="")

    def _summary(self, result: Mapping[str, Any]) -> None:
        rows = {
            "ended": f"{result['reason']}, after {result['steps']} steps, in epoch {result['epochs']}",
            "time": f"{result['seconds']:.1f} s, {result['samples_per_second']:,.0f} samples/s",
        }
        if result["skipped"]:
            rows["skipped"] = f"{result['skipped']} updates that overflowed"
        if result["last_metrics"]:
            rows["last"] = _metrics(result["last_metrics"])
        if result["best"] is not None:
            name = str(result["best_metric"])
            rows["best"] = f"{_metrics({name: result['best']})} at step {result['best_step']}"
            rows["kept model"] = _metrics(result["metrics"])
        directory = Path(result["directory"])
        if result.get("exit_code") == REQUEUE:
            rows["saved"] = f"go on with: distloop train --resume {shlex.quote(str(directory))}"
        names = sorted(file.name for file in directory.iterdir() if not file.name.startswith("."))
        rows["results"] = f"{directory} ({', '.join(names)})"
        print(flush=True)
        for name, text in rows.items():
            self._entry(name, text)


def _metrics(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{label(key)} {number(key, value).strip()}" for key, value in values.items())
