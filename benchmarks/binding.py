"""Whether it pays to bind each rank to cores of its own: steps with and without, in turns, by the same two processes.

    python benchmarks/binding.py            # two minutes

Two ranks train the same model on the CPU. After every block of steps both are bound each to its own cores, or let go
again; a figure is the median over pairs of neighbouring blocks of the time bound over the time free, with quartiles:
below 1, binding pays. Writes benchmarks/results/binding.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ranks

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "binding.json"
RANKS, PAIRS = 2, 16
# width of the layers, samples per rank, steps of a block
MODELS = {"small": (64, 32, 100), "large": (768, 64, 4)}
STRATEGIES = ("ddp", "auto")


def rank_main() -> None:
    import torch
    from torch import nn

    from distloop.cores import Cores, affinity, bind, bindings
    from distloop.strategies import Options, make
    from distloop.transports.join import join
    from distloop.world import World

    torch.set_num_threads(1)
    world = World.from_environment()
    everything = affinity()
    own = Cores.of_this_process(world)
    parts = bindings([own] * world.size, [None] * world.size)
    if isinstance(parts, str):
        raise SystemExit(f"left out: {parts}")
    places = (everything, set(parts[world.rank]))
    transport, _ = join(world, "auto", timeout=60.0)
    found: dict[str, Any] = {}
    for model_name, (width, samples, steps) in MODELS.items():
        for strategy_name in STRATEGIES:
            torch.manual_seed(0)
            model = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(width, width), nn.ReLU())])
            strategy = make(strategy_name, dict(model.named_parameters()), transport, Options())
            inputs = torch.randn(samples, width)
            times: list[tuple[float, float]] = []
            for pair in range(PAIRS + 1):
                taken = [0.0, 0.0]
                for bound in (0, 1) if pair % 2 else (1, 0):
                    bind(places[bound])
                    transport.all_gather(torch.zeros(1)).wait()
                    begun = time.perf_counter()
                    for _ in range(steps):
                        strategy.backward(model(inputs).square().mean(), 1.0, final=True)
                        for i, _ in strategy.collect():
                            strategy.broadcast(i)
                        strategy.settle()
                    transport.all_gather(torch.zeros(1)).wait()
                    taken[bound] = time.perf_counter() - begun
                if pair:  # the first is warm-up
                    times.append((taken[0], taken[1]))
            found[f"{model_name} {strategy_name}"] = times
    if transport.rank == 0:
        ranks.tell(found)
    transport.close()
    sys.stdout.flush()
    os._exit(0)  # with gloo, torch now and then aborts in the interpreter's end


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().rank:
        rank_main()
        return
    (told,) = ranks.run([__file__, "--rank"], RANKS, limit=240)
    rows = {}
    for name, times in told.items():
        low, ratio, high = statistics.quantiles([bound / free for free, bound in times], n=4)
        rows[name] = {"ratio": ratio, "low": low, "high": high, "free": statistics.median(t[0] for t in times)}
        print(f"{name:<14} bound over free {ratio:.3f} ({low:.3f} to {high:.3f})")
    RESULTS.write_text(json.dumps({"ranks": RANKS, "rows": rows, "times": told}, indent=2) + "\n")


if __name__ == "__main__":
    main()
