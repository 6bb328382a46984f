"""Every all-reduce against that of the library: gloo's dist.all_reduce, and MPI's Allreduce where there is MPI.

    python benchmarks/all_reduce.py                        # all sections, about eight minutes
    python benchmarks/all_reduce.py --only small latency   # some
    python benchmarks/all_reduce.py --quick                # few rounds, to see whether it works; writes nothing

Both sides are in one process group in the same run and take turns, round after round; a figure is the median, over
rounds, of the ratio of neighbouring times, with its quartiles. Every all-reduce is checked (benchmarks/cells.py). A
figure is how many times faster ours is, or, in per cent, what share of a bound it reaches. The bounds: what the links
must carry at least, 1.046 * 2(N-1)/N * S/B, where 1.046 is for headers; and the fastest of three streams that move
2 * N * S bytes of memory, which is the least that an all-reduce of N buffers of S bytes must move. Several hosts are
emulated (benchmarks/emulated), for which it must be root on Linux; where something is missing, the reason is printed
and the rest is run.

Writes benchmarks/results/all_reduce.json, in which sections that were not run stay as they were. Ends with 1 if a
must is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emulated import Unavailable
from ranks import Failed
from sections import HEAD, SECTIONS, Row

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "all_reduce.json"


def run(name: str, quick: bool) -> dict[str, Any]:
    """Measure a section; return what docs and pictures need of it."""
    measure, evaluate = SECTIONS[name]
    begin = time.perf_counter()
    try:
        cells = measure(quick)
    except Unavailable as reason:
        return {"unavailable": str(reason)}
    except Failed as failure:
        return {"failed": str(failure)}
    rows = [asdict(row) | {"missed": row.missed} for row in evaluate(cells)]
    rounded = [shortened(cell) for cell in cells]
    return {"seconds": round(time.perf_counter() - begin, 1), "rows": rows, "cells": rounded}


def shortened(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell with as many digits as mean something."""
    rounded = {
        key: {side: [float(f"{t:.4g}") for t in times] for side, times in cell[key].items()}
        for key in ("times", "first_look")
        if key in cell
    }
    return cell | rounded


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table."""
    lines = [HEAD, ["---"] * len(HEAD)]
    lines += [Row(**{key: value for key, value in row.items() if key != "missed"}).line() for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> dict[str, Any]:
    import torch

    return {"cores": os.cpu_count(), "torch": torch.__version__, "kernel": platform.release()}


def write(path: Path, sections: Mapping[str, Any]) -> None:
    """Write results of sections; those of others stay."""
    kept = json.loads(path.read_text())["sections"] if path.exists() else {}
    whole = {"machine": machine(), "sections": {name: (kept | sections).get(name) for name in SECTIONS}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="few rounds; writes nothing unless --json is given")
    parser.add_argument("--json", type=Path, help=f"where to write (default: {RESULTS.relative_to(HERE.parent)})")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts and ranks are removed
    path = options.json or (None if options.quick else RESULTS)
    missed, written = [], False
    for name in options.only:
        print(f"\n{name}: {(SECTIONS[name][0].__doc__ or '').strip()}", flush=True)
        result = run(name, options.quick)
        if path is not None and "rows" in result:
            write(path, {name: result})
            written = True
        if "rows" not in result:
            print(f"left out: {result['unavailable']}" if "unavailable" in result else f"FAILED: {result['failed']}")
            missed += [f"{name}: it failed"] if "failed" in result else []
            continue
        print(f"\n{table(result['rows'])}\n\n({result['seconds']:.0f} s)", flush=True)
        missed += [f"{name}: {row['what']}" for row in result["rows"] if row["missed"]]
    if written:
        print(f"\nwritten to {path}")
    if missed:
        raise SystemExit("missed:\n  " + "\n  ".join(missed))


if __name__ == "__main__":
    main()
