"""Records in files. A file that cannot be written is given up with a warning: logging never ends a training."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from distloop.checkpoint import finite
from distloop.observers.text import line
from distloop.records import Record

LAST = ("end", "failure")


class _File:
    """A text file to append to, opened at the first line; a checkpoint has its length."""

    def __init__(self, path: Path):
        self._path = path
        self._file: TextIO | None = None
        self._broken = False

    def write(self, text: str) -> None:
        if self._broken:
            return
        try:
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8", buffering=1)
            self._file.write(text + "\n")
        except OSError as failure:
            self._broken = True
            self.close()
            print(f"distloop: {self._path}: {failure.strerror}; it gets no more lines", file=sys.stderr)

    def state_dict(self) -> dict[str, int]:
        """Return how long it is, once all of it is with the system."""
        try:
            if self._file is not None:
                self._file.flush()
            return {"bytes": self._path.stat().st_size}
        except OSError:
            return {"bytes": 0}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Forget what was written after a checkpoint: it is going to be written again."""
        with suppress(OSError):
            if self._path.stat().st_size > state["bytes"]:
                os.truncate(self._path, state["bytes"])

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written cannot be flushed either
                self._file.close()
            self._file = None


class JsonLines:
    """One JSON object per record: ``kind``, ``step``, ``epoch``, ``time`` (UTC seconds) and the record's values."""

    def __init__(self, path: Path):
        self._out = _File(path)
        self.state_dict, self.load_state_dict = self._out.state_dict, self._out.load_state_dict

    def __call__(self, record: Record) -> None:
        head = {"kind": record.kind, "step": record.step, "epoch": record.epoch, "time": round(time.time(), 3)}
        self._out.write(json.dumps(finite(head | dict(record.values))))
        if record.kind in LAST:
            self._out.close()


class LogFile:
    """A rank's own log, for reading: the same lines as the console, with the time."""

    def __init__(self, path: Path):
        self._out = _File(path)
        self.state_dict, self.load_state_dict = self._out.state_dict, self._out.load_state_dict

    def __call__(self, record: Record) -> None:
        if record.kind in ("train", "evaluate"):
            lines = [line(record)]
        else:
            lines = [f"{record.kind}: {key}: {value}" for key, value in record.values.items()]
        for text in lines:
            self._out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")
        if record.kind in LAST:
            self._out.close()


class TensorBoard:
    """Scalars for TensorBoard, tags ``train/loss``, ``evaluate/accuracy`` and so on."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._writer: Any = None
        self._broken = False
        self._last = 0
        self._from: int | None = None  # figures from this step on are written again

    def __call__(self, record: Record) -> None:
        try:
            self._write(record)
        except OSError as failure:
            if not self._broken:
                print(f"distloop: {self._directory}: {failure.strerror}; it gets no more figures", file=sys.stderr)
            self._broken = True

    def state_dict(self) -> dict[str, int]:
        """Return the step of the last figures."""
        if self._writer is not None:
            self._writer.flush()
        return {"step": self._last}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Have TensorBoard pass over figures that followed."""
        self._from = state["step"] + 1

    def _write(self, record: Record) -> None:
        self._last = max(self._last, record.step)
        if record.kind in LAST and self._writer is not None:
            self._writer.close()
        if record.kind not in ("train", "evaluate") or self._broken:
            return
        if self._writer is None:
            from tensorboardX import SummaryWriter  # late: it takes part of the time to the first step

            self._writer = SummaryWriter(str(self._directory), purge_step=self._from)
        for key, value in record.values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{record.kind}/{key}", value, record.step)
