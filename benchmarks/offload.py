"""What offloading costs and saves: step time against what bounds it, memory, and DeepSpeed beside it.

    python benchmarks/offload.py                # all that can be had here, some 15 minutes
    python benchmarks/offload.py --quick        # few steps, to see whether it works; writes nothing
    python benchmarks/offload.py --only timing  # one part of: timing, memory, deepspeed, gpu

timing: an emulated accelerator (layers that sleep) behind an emulated PCIe link (copies at a given rate, both ways at
once) on this CPU. Adam does its arithmetic and then waits until an emulated host would have done it. So the three
times that bound a step are known:

    floor = max(accelerator, link, Adam)

Ours and the serial order (backward; gradients down; norm; Adam; values up; forward) take turns in one process, through
the same learner; their masters must be equal bit by bit. memory: bytes per parameter of real processes. deepspeed: a
GPT on two ranks. gpu: the same on a GPU, where there is one. Writes benchmarks/results/offload.json; ends with 1 if a
must is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "offload.json"
MUST, MOONSHOT = 1.15, 1.05


def timing(quick: bool) -> list[dict[str, Any]]:
    import torch
    from offloading.timing import REGIMES, measure

    torch.set_num_threads(1)
    turns, steps = (1, 4) if quick else (2, 6)
    regimes = REGIMES[:1] if quick else REGIMES
    rows = list(measure(regimes, turns=turns, steps=steps, clip=True))
    if not quick:
        rows += measure(regimes, turns=turns, steps=steps, clip=False)
        rows += measure(regimes[2:4], turns=turns, steps=steps, clip=True, delayed=True)
    return rows


def timing_table(rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return the table of step times, and what was missed."""
    from offloading.timing import bounds

    head = ["accelerator : link : Adam", "update", "floor, ms", "bound, ms", "serial, ms", "early, ms", "ours, ms"]
    head += [
        "ours / floor (least)",
        "ours / bound (least)",
        "serial / floor",
        "same bits",
        "must",
        "moonshot",
        "reached",
    ]
    lines, missed = [head, ["---"] * len(head)], []
    for row in rows:
        floor, bound = bounds(row)
        times = row["times"]
        serial, early, ours = (statistics.median(times[name]) for name in ("serial", "early", "ours"))
        least = min(times["ours"])
        update = ("clipped" if row["clip"] else "as it arrives") + (", delayed" if row["delayed"] else "")
        reached = "-"
        if row["must"] and not row["delayed"]:
            reached = "moonshot" if ours <= MOONSHOT * floor else "yes" if ours <= MUST * floor else "**missed**"
        missed += [f"{row['regime']} takes {ours / floor:.2f} of the floor"] * (reached == "**missed**")
        same = "-" if row["delayed"] else "yes" if row["equal"] else "**no**"
        missed += [f"{row['regime']} {update}: other bits than in order"] * (same == "**no**")
        asked = [f"{MUST}", f"{MOONSHOT}"] if reached != "-" else ["-", "-"]
        cells = [row["regime"], update, *(f"{1e3 * t:.0f}" for t in (floor, bound, serial, early, ours))]
        cells += [f"**{ours / floor:.2f}** ({least / floor:.2f})", f"{ours / bound:.2f} ({least / bound:.2f})"]
        lines.append([*cells, f"{serial / floor:.2f}", same, *asked, reached])
    notes = (
        "bound: what the order of a step leaves of the floor: gradients come down in backward alone; with clipping "
        "Adam begins after it.\nearly: the serial order, but gradients come down beside backward."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{notes}", missed


def memory(quick: bool) -> dict[str, Any]:
    from offloading import trainings

    return trainings.memory(quick=quick)


def memory_table(found: dict[str, Any]) -> tuple[str, list[str]]:
    from offloading import trainings

    own = [row for row in found["rows"] if row["side"].startswith("zero_offload") and round(row["host"], 2) > 16.0]
    missed = [f"{row['host']:.2f} bytes of the host per parameter on {row['ranks']} ranks" for row in own]
    return trainings.memory_table(found), missed


def deepspeed(quick: bool) -> dict[str, Any] | str:
    from offloading import trainings

    return trainings.against_deepspeed(quick=quick) or trainings.missing() or "DeepSpeed is not compared with"


def deepspeed_table(found: dict[str, Any] | str) -> tuple[str, list[str]]:
    from offloading import trainings

    return (found if isinstance(found, str) else trainings.deepspeed_table(found)), []


def gpu(quick: bool) -> dict[str, Any] | str:
    from offloading import gpu as part
    from offloading import trainings

    return part.missing() or part.measure(quick=quick, deepspeed=trainings.missing() is None)


def gpu_table(found: dict[str, Any] | str) -> tuple[str, list[str]]:
    from offloading import gpu as part

    return (found, []) if isinstance(found, str) else (part.table(found), part.missed(found))


PARTS: dict[str, tuple[Callable[[bool], Any], Callable[[Any], tuple[str, list[str]]]]] = {
    "timing": (timing, timing_table),
    "memory": (memory, memory_table),
    "deepspeed": (deepspeed, deepspeed_table),
    "gpu": (gpu, gpu_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps; writes nothing unless --json is given")
    parser.add_argument("--only", choices=list(PARTS), help="one part; the others stay as they were measured before")
    parser.add_argument("--json", type=Path, help=f"where to write (default: {RESULTS.relative_to(HERE.parent)})")
    options = parser.parse_args()
    path = options.json or (None if options.quick else RESULTS)
    results = json.loads(path.read_text()) if path is not None and options.only and path.exists() else {}
    missed = []
    for name in [options.only] if options.only else PARTS:
        measure, table = PARTS[name]
        results[name] = measure(options.quick)
        text, own = table(results[name])
        print(f"\n{name}\n\n{text}", flush=True)
        missed += own
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"\nwritten to {path}")
    if missed:
        sys.exit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
