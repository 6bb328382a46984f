"""``python -m tests.long.pairs --count N``: runs that go on with another strategy on another number of ranks.

Half of 500 steps is done once by each strategy on each number of ranks; then each of the others goes on from there.
Prints one line of figures, as JSON; fails if a loss is farther than 1e-5 of it from that of one rank in peace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import distloop
from distloop.build import Builder, Place
from distloop.build.deterministic import reproducible
from distloop.settings import Resolved, from_mapping, resolve
from distloop.transports import Alone, ThreadCluster, Transport
from distloop.world import World
from tests.ranks import in_processes

STEPS, HALF = 500, 250
CLOSE = 1e-5
IN_PROCESSES = ("ddp", "deepspeed")
STRATEGIES = ("naive", "ring", "direct", "auto", "zero_offload", *IN_PROCESSES)
WORLDS = (1, 2, 3)
Place_ = tuple[str, int]  # a strategy on so many ranks
Curve = list[tuple[str, int, float]]  # kind of record, step, loss


def task() -> distloop.Supervised:
    """Return one without anything that depends on how batches are split."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(203, 6, generator=generator)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return distloop.Supervised(model, nn.functional.cross_entropy, TensorDataset(x, y), TensorDataset(x[:50], y[:50]))


def resolved(folder: str, strategy: str, steps: int) -> Resolved:
    sections: dict[str, Any] = {
        "data": {"global_batch_size": 16},
        "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup_steps": 5, "steps": STEPS},
        "gradients": {"clip_norm": 1.0},
        "log": {"directory": folder, "name": "run", "every": 1, "tensorboard": False, "picture": False},
        "strategy": _strategy(strategy),
        "train": {"max_steps": steps},
        "monitor": {"keep_best": False},
        "checkpoint": {"resume": "auto"},
        "world": {"device": "cpu"},
    }
    return resolve(from_mapping(sections))


def _strategy(name: str) -> dict[str, Any]:
    """Return what a strategy's name means; that of DeepSpeed may end in its stage."""
    name, _, stage = name.partition("-")
    own = {"cpu_adam": "torch", "stage": int(stage or 2)} if name == "deepspeed" else {}
    return {"name": name, **own}


def rank(transport: Transport, folder: str, strategy: str, steps: int) -> int:
    """Be one rank of a run up to so many steps; return how many it has done."""
    config = resolved(folder, strategy, steps)
    place = Place(World(transport.rank, transport.size, transport.rank, transport.size), transport, torch.device("cpu"))
    with reproducible(config.config):
        return Builder(config, task()).session(place).run().steps


def run(folder: Path, place: Place_, steps: int) -> None:
    """Run, or go on, up to so many steps."""
    strategy, world = place
    if strategy.startswith(IN_PROCESSES):
        done = in_processes(world, rank, str(folder), strategy, steps)
    elif world == 1:
        done = [rank(Alone(), str(folder), strategy, steps)]
    else:  # one at a time: threads share the generator that first weights are drawn from
        done = ThreadCluster(world, 60, ordered=True).run(
            lambda transport: rank(transport, str(folder), strategy, steps)
        )
    assert done == [steps] * world, done


def curve(folder: Path) -> Curve:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"], row["loss"]) for row in rows if row["kind"] in ("train", "evaluate")]


def distance(found: Curve, expected: Curve) -> float:
    """Return how far losses are apart at most, relatively; infinity if they are not of the same steps."""
    found = [row for row in found if row[:2] != ("evaluate", HALF)]  # of the end of the first half
    if [row[:2] for row in found] != [row[:2] for row in expected]:
        return float("inf")
    return max(abs(a[2] - b[2]) / abs(b[2]) for a, b in zip(found, expected, strict=True))


def campaign(count: int | None, seed: int, folder: Path) -> dict[str, Any]:
    """Try so many of the ordered pairs, or all; return the figures."""
    begun = time.monotonic()
    missing = [name for name in STRATEGIES if name == "deepspeed" and find_spec(name) is None]
    places = [(name, world) for name in STRATEGIES if name not in missing for world in WORLDS]
    pairs = [pair for pair in itertools.product(places, places) if pair[0] != pair[1]]
    if count is not None:
        random.Random(seed).shuffle(pairs)
        pairs = sorted(pairs[:count])
    run(folder / "peace", ("naive", 1), STEPS)
    expected, farthest, failures = curve(folder / "peace"), 0.0, []
    for number, (first, second) in enumerate(pairs):
        half, whole = folder / f"{first[0]}-{first[1]}", folder / "whole"
        try:
            if not half.exists():
                run(half, first, HALF)
            shutil.copytree(half, whole)
            run(whole, second, STEPS)
            apart = distance(curve(whole), expected)
            farthest = max(farthest, apart)
            if apart > CLOSE:
                failures.append(f"{first} to {second}: losses differ by {apart:.2g}")
        except Exception as failure:  # the others are to be tried too
            failures.append(f"{first} to {second}: {type(failure).__name__}: {failure}")
        shutil.rmtree(whole, ignore_errors=True)
        print(f"{number + 1} of {len(pairs)}: {first} to {second}, {failures[-1:]}", file=sys.stderr, flush=True)
    return {
        "pairs": len(pairs),
        "of": len(places) * (len(places) - 1),
        "not_installed": missing,
        "failures": failures,
        "farthest": farthest,
        "seconds": round(time.monotonic() - begun, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, help="of pairs (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with os.fdopen(os.dup(1), "w") as out, tempfile.TemporaryDirectory(prefix="distloop-pairs-", dir=where) as folder:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what runs print, also in processes
        os.environ["XDG_CACHE_HOME"] = folder
        figures = campaign(chosen.count, chosen.seed, Path(folder))
        print(json.dumps(figures), file=out)
    return 1 if figures["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
