"""Bits flipped in replicas must be found and named, and there must be no alarm without one.

python -m tests.long.replicas --count 100 --steps 100000
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

from distloop.errors import MismatchError
from distloop.replicas import compare
from distloop.transports import Transport
from tests.ranks import in_threads
from tests.test_replicas import made, one_flip, steps

KINDS = ("parameter", "buffer", "optimizer state")
RANKS = 3


def flips(transport: Transport, count: int, seed: int) -> tuple[int, int]:
    """Return how many of so many flips were found and named, and how many more were gone before anybody looked.

    A flip of the last bits of an average, or of a counter that is a float, may be rounded away by the next update.
    """
    choose, found, healed = random.Random(seed), 0, 0
    while found < count:
        flipped, said = one_flip(transport, choose, KINDS[found % len(KINDS)])
        if not said and flipped.startswith("optimizer state"):
            healed += 1
        elif flipped not in said:
            break
        else:
            found += 1
    return found, healed


def alarms(transport: Transport, count: int) -> int:
    """Return how many steps were compared without an alarm."""
    learner, done = made(transport), 0
    own = compare([learner], transport, every=1)

    def after(step: int) -> None:
        nonlocal done
        own(step)
        done = step

    try:
        steps(transport, learner, count, after)
    except MismatchError as alarm:
        print(alarm, file=sys.stderr)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    begun = time.monotonic()
    found, healed = in_threads(RANKS, flips, chosen.count, chosen.seed)[0]
    print(f"{found} of {chosen.count} flips found; now {chosen.steps:,} steps without one", file=sys.stderr)
    compared = min(in_threads(RANKS, alarms, chosen.steps))
    figures = {
        "flips": chosen.count,
        "found_and_named": found,
        "rounded_away_before": healed,
        "steps_compared": compared,
        "false_alarms": int(compared < chosen.steps),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(figures))
    return 0 if found == chosen.count and not figures["false_alarms"] else 1


if __name__ == "__main__":
    sys.exit(main())
