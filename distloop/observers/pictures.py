"""Learning curves as a picture, drawn when the run ends."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from distloop.observers.curves import Curves, draw
from distloop.records import Record


class LearningCurves:
    """One panel for the losses, one for each other evaluated metric, one for the learning rate."""

    def __init__(self, path: Path):
        self._path = path
        self.curves = Curves()

    def __call__(self, record: Record) -> None:
        self.curves.add(record, time.time())
        if record.kind != "end" or not self.curves.series:
            return
        try:
            draw([self.curves]).savefig(self._path, dpi=120)
        except OSError as failure:
            print(f"distloop: {self._path}: {failure.strerror}; there is no picture of this run", file=sys.stderr)
