"""``python -m tests.long.kills --count 1000``: kills on 1 to 4 ranks in deterministic mode, and of fast strategies.

Prints one line of figures, as JSON; fails if any that must be 0 is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.harming import FAST, kills
from tests.restarting import DETERMINISTIC


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="of attempts to kill in deterministic mode")
    parser.add_argument("--each", type=int, default=20, help="of attempts to kill of each fast strategy on 2 ranks")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    memory = Path("/dev/shm")  # what a disk may lose is for another test
    where, found = memory if os.access(memory, os.W_OK) else None, {}
    with tempfile.TemporaryDirectory(prefix="distloop-kills-", dir=where) as name:
        folder, os.environ["XDG_CACHE_HOME"] = Path(name), name
        if chosen.count:
            worlds = (1, 2, 3, 4)
            found["deterministic"] = kills(chosen.count, chosen.seed, folder / "tree", worlds, DETERMINISTIC, told=True)
        for strategy in FAST if chosen.each else ():
            settings = {"strategy.name": strategy}
            found[strategy] = kills(chosen.each, chosen.seed, folder / strategy, (2, 2), settings, told=True)
    for fault in (fault for figures in found.values() for fault in figures.faults):
        print(fault, file=sys.stderr)
    print(json.dumps({name: figures.figures() for name, figures in found.items()}))
    return 0 if all(figures.sound for figures in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
