"""``python -m tests.long.fuzz --count 100000``: prints one line of figures, as JSON; fails if anything is wrong.

With ``--only NUMBER`` it shows one case of a campaign, and what it came to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.fuzzing import attempt, campaign, draw_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    chosen = parser.parse_args()
    memory = Path("/dev/shm")  # no disk has a part in this
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="distloop-fuzz-", dir=where) as folder:
        if chosen.only is not None:
            case = draw_case(chosen.seed, chosen.only)
            print(f"{case}\n{attempt(case, Path(folder))}")
            return 0
        figures = campaign(chosen.count, chosen.seed, Path(folder))
    print(json.dumps(figures))
    return 1 if figures["silently_accepted"] or figures["tracebacks"] or figures["others"] else 0


if __name__ == "__main__":
    sys.exit(main())
