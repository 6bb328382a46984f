"""``python -m tests.long.signals --count 200``: signals to ranks of runs on 1 to 4 ranks, at random moments.

Prints one line of figures, as JSON; fails if any that must be 0 is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.harming import signals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="of attempts to stop")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="distloop-signals-", dir=where) as name:
        os.environ["XDG_CACHE_HOME"] = name
        figures = signals(chosen.count, chosen.seed, Path(name), (1, 2, 3, 4), told=True)
    for fault in figures.faults:
        print(fault, file=sys.stderr)
    print(json.dumps(figures.figures()))
    return 0 if figures.sound else 1


if __name__ == "__main__":
    sys.exit(main())
