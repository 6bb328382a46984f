"""What the same bits on any number of ranks cost: the time of a step in deterministic mode, over that of others.

    python benchmarks/deterministic.py            # about a minute and a half
    python benchmarks/deterministic.py --quick    # few steps, to see whether it works; writes nothing

Two workloads, an MLP whose step is little but overhead and a small GPT, with the same global batch on 1, 2 and 4 ranks
of this machine. All sides are in one group of processes, each with a model of its own, and take turns, step by step;
a step is reading, forward, backward, collecting, clipping and AdamW, and lasts as long as on the slowest rank. A row's
figures are medians over steps, with quartiles, of the ratio of neighbouring steps. Every rank has one thread. In
deterministic mode a batch is in 8 leaves, and torch's deterministic algorithms are on. The last column is against
`auto` with micro-batches of a leaf's size, and so leaves out what small batches cost by themselves.

The weights that the deterministic side ends with must have one sha256 on all numbers of ranks, or the benchmark ends
with 1. Writes benchmarks/results/deterministic.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ranks

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "deterministic.json"
WORLDS = [1, 2, 4]
SIDES = ["deterministic", "auto", "naive", "accumulating"]
STEPS = {"mlp": (200, 20), "gpt": (16, 3)}  # measured, and in a quick run
BATCH = {"mlp": 256, "gpt": 16}
WARM_UP = 3


# -- a rank ----------------------------------------------------------------------------------------------------------


def workload(name: str) -> tuple[Any, Any, Any]:
    """Return a model, its loss and data."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.utils.data import TensorDataset

    from distloop.tasks.gpt import GPT

    torch.manual_seed(1)
    samples = 40 * BATCH[name]
    if name == "mlp":
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
        return model, F.cross_entropy, TensorDataset(torch.randn(samples, 64), torch.randint(10, (samples,)))
    gpt = GPT(vocabulary=256, outputs=256, context=64, width=128, layers=4, heads=4, dropout=0.1)
    tokens = torch.randint(256, (samples, 65))

    def loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

    return gpt, loss, TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def steps_of(side: str, name: str, transport: Any) -> tuple[Any, Iterator[Any], Any]:
    """Return a model, what trains it step by step, and the configuration."""
    from distloop.build.deterministic import hold_to_leaves, leaves_of
    from distloop.build.models import options_from
    from distloop.data import Batches
    from distloop.learner import Learner
    from distloop.loop import train
    from distloop.objective import trained_parameters
    from distloop.optimizer import Adam, Optimizer
    from distloop.plan import Plan
    from distloop.schedules import Constant
    from distloop.settings import from_mapping, resolve
    from distloop.strategies import make
    from distloop.tasks.base import Supervised
    from distloop.transforms import ClipByNorm
    from distloop.turns import Turns
    from distloop.world import World

    chosen: dict[str, Any] = {"strategy": {"name": side}}
    if side == "deterministic":
        chosen = {"train": {"deterministic": True}}
    elif side == "accumulating":
        chosen = {"strategy": {"name": "auto"}}
    config = resolve(from_mapping(chosen)).config
    micro = BATCH[name] // config.train.leaves if side == "accumulating" else None
    model, loss, data = workload(name)
    task = Supervised(model, loss, data)
    parameters = trained_parameters("model", model)
    strategy = make(config.strategy.name, parameters, transport, options_from(config))
    rule = Optimizer(Adam(decoupled=True), strategy.shards, dict.fromkeys(parameters, 0.01))
    clip = [ClipByNorm(1.0)]
    learner = Learner("model", task.objectives["model"], strategy, rule, lr=1e-3, schedule=Constant(), transforms=clip)
    hold_to_leaves([learner], task, 0)
    batches = Batches(data, Plan(len(data), BATCH[name], micro, leaves_of(config)), transport=transport)
    world = World(transport.rank, transport.size, transport.rank, transport.size)

    class Collected:
        def collect(self, epoch: int) -> Batches:
            return batches

    return model, iter(train(Collected(), Turns([learner]), range(10**6), world)), config


def measured(name: str, steps: int, transport: Any) -> dict[str, Any]:
    """Return the seconds of each step by side, and the sha256 of what the deterministic side came to."""
    import torch

    from distloop.build.deterministic import reproducible

    sides = {side: steps_of(side, name, transport) for side in SIDES}
    own: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(WARM_UP + steps):
        # Who comes first changes, as what one side leaves in the caches is the next one's to clear.
        for side in SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]:
            _, training, config = sides[side]
            with reproducible(config):
                transport.all_gather(torch.zeros(1)).wait()
                begin = time.perf_counter()
                next(training)
                own[side].append(time.perf_counter() - begin)
    every = torch.tensor([own[side][WARM_UP:] for side in SIDES], dtype=torch.float64)
    slowest = transport.all_gather(every).wait().amax(0).tolist()
    found = hashlib.sha256()
    for parameter in sides["deterministic"][0].parameters():
        found.update(parameter.detach().numpy().tobytes())
    return {"workload": name, "ranks": transport.size, "sha256": found.hexdigest()} | {
        "seconds": dict(zip(SIDES, slowest, strict=True))
    }


def rank_main(quick: bool) -> None:
    import torch

    from distloop.transports import Alone
    from distloop.transports.join import join
    from distloop.world import World

    torch.set_num_threads(1)
    world = World.from_environment()
    transport = Alone() if world.size == 1 else join(world, "auto", timeout=60.0)[0]
    for name, numbers in STEPS.items():
        row = measured(name, numbers[quick], transport)
        if transport.rank == 0:
            ranks.tell(row)
    transport.close()
    sys.stdout.flush()
    os._exit(0)  # with gloo, torch now and then aborts in the interpreter's end


# -- the starting side -----------------------------------------------------------------------------------------------


def summary(told: dict[str, Any]) -> dict[str, Any]:
    """Return a row: medians of the times, and medians and quartiles of the ratios."""
    seconds = told["seconds"]
    row = {key: told[key] for key in ("workload", "ranks", "sha256")}
    row |= {f"{side}_ms": 1e3 * statistics.median(seconds[side]) for side in SIDES}
    for other in SIDES[1:]:
        ratios = [own / theirs for own, theirs in zip(seconds[SIDES[0]], seconds[other], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {f"over_{other}": middle, f"over_{other}_low": low, f"over_{other}_high": high}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = [
        "workload",
        "ranks",
        "ms a step",
        "over `auto` (quartiles)",
        "over `naive`",
        "over `auto` in as small parts",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        line = [row["workload"], str(row["ranks"]), f"{row['deterministic_ms']:.2f}"]
        for other in SIDES[1:]:
            low, middle, high = (row[f"over_{other}{end}"] for end in ("_low", "", "_high"))
            line.append(f"**{middle:.2f}** ({low:.2f} to {high:.2f})")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps; writes nothing unless --json is given")
    parser.add_argument("--json", type=Path, help=f"where to write (default: {RESULTS.relative_to(HERE.parent)})")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(options.quick)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks are removed
    program = [__file__, "--rank", *(["--quick"] if options.quick else [])]
    try:
        told = [row for size in WORLDS for row in ranks.run(program, size, limit=120)]
    except ranks.Failed as failure:
        raise SystemExit(str(failure)) from None
    rows = sorted(map(summary, told), key=lambda row: (row["workload"], row["ranks"]))
    print(table(rows))
    path = options.json or (None if options.quick else RESULTS)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=2) + "\n")
        print(f"\nwritten to {path}")
    for name in STEPS:
        found = {row["sha256"] for row in rows if row["workload"] == name}
        if len(found) > 1:
            raise SystemExit(f"{name}: the weights differ between numbers of ranks")
        print(f"{name}: one sha256 on {', '.join(map(str, WORLDS))} ranks, {min(found)[:16]}...")


if __name__ == "__main__":
    main()
