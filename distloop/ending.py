"""The end of a process without its destructors: those of process groups wait for peers that may be gone."""

from __future__ import annotations

import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End now, from whatever thread, with what was written so far."""
    # The main thread may hold a stream's lock for ever, so somebody else waits for that.
    flushing = threading.Thread(target=flush, daemon=True)
    try:
        flushing.start()
        flushing.join(0.2)
    except RuntimeError:  # no thread can begin in an interpreter that ends
        flush()
    os._exit(code)


def flush() -> None:
    """Write out what print has kept, as far as somebody reads it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
