"""``python -m tests.long.mutations --count 50000``: prints one line of figures, as JSON; fails if any is not 0."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.checkpoint_mutations import campaign


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    memory = Path("/dev/shm")  # no disk has a part in this
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="distloop-mutations-", dir=where) as folder:
        figures = campaign(chosen.count, chosen.seed, Path(folder))
    print(json.dumps(figures))
    return 1 if figures["accepted"] or figures["other_errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
