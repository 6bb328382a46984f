"""Learning curves as a picture, drawn when the run ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from distloop.observers.curves import Curves, draw
from distloop.observers.history import RECORDS, read_records
from distloop.records import Record


class LearningCurves:
    """One panel for the losses, one for each other evaluated metric, one for the learning rate."""

    def __init__(self, path: Path):
        self._path = path
        self.curves = Curves()

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the records of before are in a file."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Draw what was recorded before too; after the file of records has been cut."""
        records = self._path.with_name(RECORDS)
        if records.is_file():
            for record, moment in read_records(records):
                self.curves.add(record, moment)

    def __call__(self, record: Record) -> None:
        self.curves.add(record, time.time())
        if record.kind != "end" or not self.curves.series:
            return
        try:
            draw([self.curves]).savefig(self._path, dpi=120)
        except OSError as failure:
            print(f"distloop: {self._path}: {failure.strerror}; there is no picture of this run", file=sys.stderr)
