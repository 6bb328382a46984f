"""Adam on the CPU in one pass over memory, against DeepSpeed's sequence, torch's, and the memory itself.

    python benchmarks/cpu_adam.py            # a few minutes; 8 GB of memory
    python benchmarks/cpu_adam.py --quick    # few parameters, few rounds; writes nothing

An update takes fp32 gradients with a pending clip factor and leaves new values in fp32 and, rounded, in bf16.

    one pass    Optimizer.apply with OnePassAdam
    deepspeed   three passes: gradient.mul_(factor), DeepSpeedCPUAdam.step(), rounded.copy_(values)
    torch       Optimizer.apply with Adam: the fused kernel, which divides, then the cast
    memory      benchmarks/bytes.c: reads and writes the same bytes, turning a bit of each number; the best of four ways

All tensors of these are on huge pages, of the same memory. "as shipped" is DeepSpeed with tensors as torch allocates
them. "bf16" begins with gradients in bf16, as a model in bf16 has them: ours takes them as they are, DeepSpeed first
copies them into its gradient in fp32. "first step" is an update with states that are allocated for it, ours as Group
does it, DeepSpeed's as shipped.

Sides take turns, round after round, backwards in every second, in a process per number of threads. A figure is the
median of the ratios of neighbouring times, with quartiles. Writes benchmarks/results/cpu_adam.json; ends with 1 if a
must is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sections import HEAD, Row, compare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cpu_adam.json"
MILLION = 10**6
CELLS = [(50 * MILLION, 1, 25), (50 * MILLION, 2, 25), (200 * MILLION, 2, 9)]  # parameters, threads, rounds
QUICK = [(2 * MILLION, 1, 3)]
FACTOR = 0.999  # of clipping; near 1, for it is applied to the same gradients again and again
LR, BETAS, EPS, DECAY = 1e-4, (0.9, 0.999), 1e-8, 0.01
WAYS = {"memory": (0, 0), "memory, fetched": (1, 0), "memory, streamed": (0, 1), "memory, both": (1, 1)}
FIRST_STEPS = 3


# -- a number of threads ---------------------------------------------------------------------------------------------


def tensors(numel: int, allocate: Callable[..., Any]) -> dict[str, Any]:
    """Return values, gradient in fp32 and in bf16, and rounded values."""
    import torch

    made = {"values": allocate(numel, dtype=torch.float32), "gradient": allocate(numel, dtype=torch.float32)}
    for tensor in made.values():
        tensor.copy_(torch.randn(1000).repeat(-(-numel // 1000))[:numel])
    made["narrow"] = allocate(numel, dtype=torch.bfloat16).copy_(made["gradient"])
    return made | {"rounded": allocate(numel, dtype=torch.bfloat16).fill_(1.0)}


def ours(own: dict[str, Any], rule: Any, gradient: str = "gradient") -> Callable[[], None]:
    """Return an update through the optimizer."""
    import torch
    from torch import nn

    from distloop.optimizer import Optimizer
    from distloop.strategies.base import Segment
    from distloop.transforms import Collected

    parameter = nn.Parameter(torch.empty(0))
    segment = Segment("p", parameter, 0, own["values"].numel(), own["values"], own["rounded"])
    optimizer = Optimizer(rule, [[segment]], {"p": DECAY})
    optimizer.lr, divisor = LR, torch.tensor(1.0 / FACTOR)
    return lambda: optimizer.apply(Collected([own[gradient]], divisor), optimizer.shards[0])


def deepspeeds(
    own: dict[str, Any], states: Callable[..., Any] | None = None, *, widen: bool = False
) -> Callable[[], None]:
    """Return an update as DeepSpeed's ZeRO-Offload does it; its states are its own, or made by ``states``."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from torch import nn

    parameter = nn.Parameter(own["values"])
    optimizer = DeepSpeedCPUAdam([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    if states is not None:
        named = {name: states(parameter.numel(), dtype=parameter.dtype) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": 0, **named}
    parameter.grad = own["gradient"]

    def update() -> None:
        if widen:
            own["gradient"].copy_(own["narrow"])
        own["gradient"].mul_(FACTOR)
        optimizer.step()
        own["rounded"].copy_(own["values"])

    return update


def bound(library: ctypes.CDLL, own: dict[str, Any], states: list[Any], ahead: int, stream: int) -> Callable[[], None]:
    """Return a pass over the memory of an update."""
    import torch

    from distloop.cpu_adam import in_threads

    places = [t.data_ptr() for t in (own["gradient"], own["values"], *states, own["rounded"])]

    def run() -> None:
        following = ctypes.c_int64(0)
        arguments = [*map(ctypes.c_void_p, places), ctypes.c_int64(own["values"].numel()), ahead, stream]
        in_threads(lambda: library.pass_over(*arguments, ctypes.byref(following)), torch.get_num_threads())

    return run


def compiled(folder: str) -> ctypes.CDLL:
    from distloop import native

    made = Path(folder) / "bytes.so"
    subprocess.run(["cc", *native.FLAGS, "-o", str(made), str(HERE / "bytes.c")], check=True)
    return ctypes.CDLL(str(made))


def clock(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def cell(numel: int, threads: int, rounds: int) -> dict[str, Any]:
    """Measure all sides; return their seconds."""
    import torch

    from distloop.cpu_adam import OnePassAdam
    from distloop.host_memory import allocate
    from distloop.optimizer import Adam

    torch.set_num_threads(threads)
    numel -= numel % 32
    rule = OnePassAdam(BETAS, EPS, decoupled=True)
    if rule.unavailable:
        raise SystemExit(f"left out: {rule.unavailable}")
    huge = tensors(numel, allocate)
    sides = {"one pass": ours(huge, rule), "one pass, bf16": ours(huge, rule, "narrow")}
    sides["torch"] = ours(huge, Adam(BETAS, EPS, decoupled=True))
    states, missing = [allocate(numel, torch.float32) for _ in range(2)], ""
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(folder)
    sides |= {name: bound(library, huge, states, *way) for name, way in WAYS.items()}
    plain: dict[str, Any] = {}
    try:
        sides["deepspeed"] = deepspeeds(huge, allocate)
        plain = tensors(numel, torch.empty)
        sides["deepspeed, as shipped"] = deepspeeds(plain)
        sides["deepspeed, as shipped, bf16"] = deepspeeds(plain, widen=True)
    except ImportError:
        missing = 'DeepSpeed\'s sides are left out: it is missing: pip install "distloop[deepspeed]"'
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            seconds = clock(sides[name])
            if number:  # the first time states are allocated
                times[name].append(seconds)
    sides.clear()  # and with them their states
    for _ in range(FIRST_STEPS):
        times.setdefault("one pass, first step", []).append(clock(ours(huge, rule)))
        if plain:
            times.setdefault("deepspeed, first step", []).append(clock(deepspeeds(plain)))
    return {"parameters": numel, "threads": threads, "times": times, "missing": missing}


# -- the starting side -----------------------------------------------------------------------------------------------


def measured(numel: int, threads: int, rounds: int) -> dict[str, Any]:
    """Return what a process with so many threads finds: DeepSpeed's read their number when it starts."""
    specification = json.dumps([numel, threads, rounds])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop("THP_MEM_ALLOC_ENABLE", None)  # it would put torch's own tensors on huge pages
    command = [sys.executable, __file__, "--cell", specification]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=900, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise SystemExit(lines[-1] if lines else f"a process of {threads} threads ended with {done.returncode}")
    told: dict[str, Any] = json.loads(lines[-1])
    return told


def rows(found: dict[str, Any]) -> list[Row]:
    """Return a cell's figures."""
    times, what = found["times"], f"{found['parameters'] / MILLION:.0f} M, {found['threads']} threads"
    best = min(WAYS, key=lambda way: statistics.median(times[way]))
    made = [compare(what, times, "one pass", best, None, 0.92, share=True)]
    if not found["missing"]:
        made.append(compare(what, times, "one pass", "deepspeed", 1.4, 1.6))
        made.append(compare(what, times, "one pass", "deepspeed, as shipped", 2.5, 4.0))
        made.append(compare(what, times, "one pass, bf16", "deepspeed, as shipped, bf16"))
        made.append(compare(what, times, "one pass, first step", "deepspeed, first step"))
    made.append(compare(what, times, "one pass", "torch"))
    return made


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def sides_table(found: list[dict[str, Any]]) -> str:
    """Return nanoseconds per parameter of every side, the median and the range."""
    lines = []
    for one in found:
        for name, times in one["times"].items():
            ns = [1e9 * t / one["parameters"] for t in times]
            what = f"{one['parameters'] / MILLION:.0f} M, {one['threads']} threads"
            lines.append([what, name, f"{statistics.median(ns):.3f}", f"{min(ns):.3f} to {max(ns):.3f}"])
    return markdown(["what", "side", "ns per parameter", "least to most"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few parameters; writes nothing unless --json is given")
    parser.add_argument("--json", type=Path, help=f"where to write (default: {RESULTS.relative_to(HERE.parent)})")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(*options.cell)))
        return
    found = [measured(*one) for one in (QUICK if options.quick else CELLS)]
    figures = [row for one in found for row in rows(one)]
    print(sides_table(found), markdown(HEAD, [row.line() for row in figures]), sep="\n\n")
    if found[0]["missing"]:
        print(f"\n{found[0]['missing']}")
    path = options.json or (None if options.quick else RESULTS)
    if path is not None:
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        result = {"cells": found, "huge_pages": pages.read_text().strip() if pages.exists() else ""}
        result["rows"] = [vars(row) for row in figures]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {path}")
    if not options.quick and any(row.missed for row in figures):
        raise SystemExit("missed: a must, marked in the table")


if __name__ == "__main__":
    main()
