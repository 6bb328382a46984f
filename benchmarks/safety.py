"""What safety costs: the time of a step with everything that distloop does for it by default, over one without.

    python benchmarks/safety.py            # about two minutes
    python benchmarks/safety.py --quick    # few steps, to see whether it works; writes nothing

By default a run agrees on stops, compares its replicas, beats, and saves a checkpoint every five minutes. Two whole
sessions, one with all that and one with it turned off (``checkpoint.enabled false``, ``monitor.replicas_every 0``; no
heartbeat), are in one group of processes and take turns, step by step; a step lasts as long as on the slowest rank.
Figures are medians of the ratio of neighbouring steps, with quartiles. What the heartbeat's threads take is read off
the processor time of theirs. Then the first session saves: the time that its step is held up, and by how much longer
the steps beside the writing are, both of the five minutes and of one. Writes benchmarks/results/safety.json; ends with
1 if a must is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "safety.json"
WORLDS = [1, 2]
WORKLOADS = {"mlp": (600, 20), "wide": (60, 4)}  # steps measured, and in a quick run
BATCH = {"mlp": 256, "wide": 64}
WARM_UP = 12
SAVES = 3
AFTER = {"mlp": 60, "wide": 12}  # steps after a save, which is written beside them
EVERY = 300.0  # seconds between two checkpoints, by default
MUST, MUST_SAVE = 1.02, 0.05


# -- a rank ----------------------------------------------------------------------------------------------------------


def task_of(name: str) -> Any:
    """Return a task of which an epoch never ends."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    import distloop

    torch.manual_seed(1)
    width, samples = {"mlp": 512, "wide": 2048}[name], 4096 * BATCH[name]
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    if name == "wide":
        model = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3)), model[-1])
    inputs = width if name == "wide" else 64
    data = TensorDataset(torch.randn(samples // 64, inputs), torch.randint(10, (samples // 64,)))
    return distloop.Supervised(model, nn.functional.cross_entropy, data)


def stepping(name: str, folder: str, place: Any, *, safe: bool) -> tuple[Any, Callable[[], None]]:
    """Return a session, and what does its next step."""
    from distloop.build import Builder
    from distloop.loop import train
    from distloop.settings import from_mapping, resolve

    off: dict[str, Any] = {"checkpoint": {"enabled": False}, "monitor": {"replicas_every": 0}}
    resolved = resolve(
        from_mapping(
            {
                "data": {"global_batch_size": BATCH[name]},
                "optimizer": {"name": "adamw"},
                "strategy": {"name": "auto"},
                "train": {"epochs": 10**6},
                "log": {"directory": folder, "tensorboard": False, "picture": False, "progress": False},
                **({} if safe else off),
            }
        )
    )
    session = Builder(resolved, task_of(name)).session(place)
    session.observers.clear()
    updates = train(session.task, session.turns, session._epochs(), session.world)

    def step() -> None:
        update = next(updates)
        session.ledger.add(update, session.step + 1, last=True)
        session._after_batch(update)

    return session, step


def measure(name: str, steps: int, transport: Any, world: Any) -> dict[str, Any]:
    """Return the figures of a workload on these ranks."""
    import torch

    from distloop.build.place import Place

    place = Place(world, transport, torch.device("cpu"))
    folder = tempfile.mkdtemp(prefix="distloop-safety-")
    safe, safe_step = stepping(name, folder, place, safe=True)
    _, plain_step = stepping(name, folder, place, safe=False)

    def timed(step: Callable[[], None]) -> float:
        begun = time.perf_counter()
        step()
        own = torch.tensor([time.perf_counter() - begun], dtype=torch.float64)
        return float(transport.all_gather(own).wait().max()) if world.size > 1 else float(own)

    for _ in range(WARM_UP):
        timed(safe_step), timed(plain_step)
    rows = []
    for number in range(steps):
        sides = (safe_step, plain_step) if number % 2 else (plain_step, safe_step)
        one, other = timed(sides[0]), timed(sides[1])
        rows.append((one, other) if number % 2 else (other, one))
    plain = statistics.median(b for _, b in rows)
    saves = []
    for _ in range(SAVES):
        safe._saved_at = -1
        held = timed(safe._save)
        after = [timed(safe_step) for _ in range(AFTER[name])]
        safe.keeper.saver.drain()
        saves.append((held, held + sum(after) - plain * len(after)))
    kept = list((safe.directory / "checkpoints").glob("step-*"))
    nbytes = sum(file.stat().st_size for file in kept[0].iterdir()) if world.rank == 0 else 0
    shutil.rmtree(folder, ignore_errors=True)
    return {"rows": rows, "saves": saves, "bytes": nbytes, "plain": plain}


def beating(seconds: float) -> float | None:
    """Return which part of a processor the heartbeat's threads take."""
    from distloop.heartbeat import Heartbeat

    found = Heartbeat.current()
    if found is None:
        return None
    names = {found._pulse.thread.native_id, found._watch.thread.native_id}

    def used() -> float:
        ticks = 0
        for thread in names:
            words = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
            ticks += int(words[11]) + int(words[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    before, begun = used(), time.monotonic()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - begun)


def rank(quick: bool) -> None:
    import torch

    from distloop.heartbeat import Heartbeat
    from distloop.transports import Alone
    from distloop.transports.join import join
    from distloop.world import World

    signal.alarm(500)
    torch.set_num_threads(1)
    world = World.from_environment()
    transport = join(world)[0] if world.size > 1 else Alone()
    heartbeat = Heartbeat.begin(world, transport)
    sys.stdout.flush()
    found = {name: measure(name, steps[quick], transport, world) for name, steps in WORKLOADS.items()}
    share = beating(2.0 if quick else 10.0)
    if heartbeat is not None:
        heartbeat.end()
    if world.rank == 0:
        ranks.tell({"found": found, "beating": share})
    transport.close()


# -- the starting side -----------------------------------------------------------------------------------------------


def summary(size: int, name: str, found: dict[str, Any]) -> dict[str, Any]:
    ratios = [safe / plain for safe, plain in found["rows"]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    safe, plain = (statistics.median(column) for column in zip(*found["rows"], strict=True))
    held, extra = (statistics.median(column) for column in zip(*found["saves"], strict=True))
    return {
        "ranks": size,
        "workload": name,
        "plain_ms": 1e3 * plain,
        "ratio": middle,
        "quartiles": [low, high],
        "ratio_of_medians": safe / plain,
        "checkpoint_mb": found["bytes"] / 1e6,
        "held_ms": 1e3 * held,
        "extra_ms": 1e3 * extra,
        "part_of_default_interval": extra / EVERY,
        "part_of_a_minute": extra / 60.0,
    }


def markdown(found: dict[str, Any]) -> str:
    """Return the tables."""
    lines = ["| ranks | workload | step without, ms | with / without | quartiles | must |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        low, high = row["quartiles"]
        cells = [row["ranks"], row["workload"], f"{row['plain_ms']:.2f}", f"**{row['ratio']:.3f}**"]
        lines.append(_line([*cells, f"{low:.3f} to {high:.3f}", MUST]))
    lines += [
        "",
        "| ranks | workload | checkpoint, MB | training held up, ms | longer in all, ms | of 5 minutes | of 1 |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        times = [f"{row['checkpoint_mb']:.1f}", f"{row['held_ms']:.1f}", f"{row['extra_ms']:.1f}"]
        parts = [f"{100 * row['part_of_default_interval']:.3f} %", f"{100 * row['part_of_a_minute']:.3f} %"]
        lines.append(_line([row["ranks"], row["workload"], *times, *parts]))
    beats = [
        f"{100 * share:.2f} % of a processor for each of {n} ranks" for n, share in found["heartbeat"].items() if share
    ]
    return "\n".join(lines) + (f"\n\nThe heartbeat's threads took {', '.join(beats)}." if beats else "")


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Return what was missed."""
    steps = [
        f"{row['workload']} on {row['ranks']} ranks: {row['ratio']:.3f}, must {MUST}"
        for row in rows
        if row["ratio"] > MUST
    ]
    saves = [
        f"saving {row['workload']} on {row['ranks']} ranks: {row['part_of_a_minute']:.3f} of a minute, must {MUST_SAVE}"
        for row in rows
        if row["part_of_a_minute"] > MUST_SAVE
    ]
    return steps + saves


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.quick)
        return 0
    rows, beats = [], {}
    for size in WORLDS:
        told = ranks.run([__file__, "--rank", *(["--quick"] if options.quick else [])], size, limit=500)[0]
        rows += [summary(size, name, found) for name, found in told["found"].items()]
        beats[size] = told["beating"]
    found = {"rows": rows, "heartbeat": beats}
    print(markdown(found))
    if not options.quick:
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    for line in missed(rows):
        print(f"missed: {line}")
    return 1 if missed(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
