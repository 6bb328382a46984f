"""Runs the long forms of tests, one after the other, and keeps what they print for docs/reliability.md.

python -m tests.long                # all, about an hour
python -m tests.long fuzz mutations # some
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
# By the name that the page gives it: module and arguments.
FORMS = {
    "fuzz --count 100000": ("fuzz", "--count", "100000"),
    "kills --count 1000": ("kills", "--count", "1000"),
    "mutations --count 50000": ("mutations", "--count", "50000"),
    "pairs": ("pairs",),
    "replicas --count 100 --steps 100000": ("replicas", "--count", "100", "--steps", "100000"),
    "restarts --count 100": ("restarts", "--count", "100"),
    "signals --count 200": ("signals", "--count", "200"),
}


def keep(name: str, line: str, seconds: float) -> None:
    """Put a line of figures where the page looks for it."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    figures = json.loads(line)
    parts = {f"{name}: {part}": own for part, own in figures.items() if isinstance(own, dict)}
    if len(parts) == len(figures):  # of several campaigns
        known |= {part: own | {"seconds": round(own.get("seconds", seconds))} for part, own in parts.items()}
    else:
        known[name] = figures | {"seconds": round(seconds)}
    RESULTS.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="those of these modules (default: all)")
    chosen = parser.parse_args().modules
    failed = []
    for name, (module, *arguments) in FORMS.items():
        if chosen and module not in chosen:
            continue
        begun = time.monotonic()
        command = [sys.executable, "-m", f"tests.long.{module}", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        line = (done.stdout.strip().splitlines() or [""])[-1]
        print(f"{name}: exit code {done.returncode}: {line}", flush=True)
        if done.returncode == 0:
            keep(name, line, time.monotonic() - begun)
        else:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
