"""What a run has recorded, read again; needs nothing but the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from distloop.errors import DataError
from distloop.records import Record

RECORDS = "metrics.jsonl"


def read_records(path: Path) -> Iterator[tuple[Record, float]]:
    """Yield records and their times. A last line that is cut off belongs to a run that goes on, or was killed."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as failure:
        raise DataError(f"{path}: cannot be read: {failure.strerror}") from None
    for number, text in enumerate(lines, 1):
        try:
            values = json.loads(text)
            head = Record(values.pop("kind"), int(values.pop("step")), int(values.pop("epoch")), values)
            moment = float(values.pop("time"))
        except (ValueError, KeyError, TypeError, AttributeError):
            if number == len(lines):
                return
            raise DataError(f"{path}:{number}: is no record of a run") from None
        yield head, moment
