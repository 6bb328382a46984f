"""Real trainings on the CPU: memory by strategy, and step time and memory against DeepSpeed."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ranks

TRAINER = Path(__file__).resolve().with_name("trainer.py")
TOWER = {"model": "tower", "width": 1448, "layers": 24, "batch": 4, "steps": 4}  # 50 M parameters
GPT = {"model": "gpt", "width": 384, "layers": 8, "context": 128, "batch": 8, "steps": 8, "clip": True, "half": False}
ROUNDS = 3
FORGOTTEN = 2  # first steps of a job, in which memory is touched for the first time
MEMORY = [  # side, half weights, ranks, clipping by norm
    ("zero_offload", True, 1, False),
    ("zero_offload", True, 1, True),
    ("zero_offload", True, 2, False),
    ("zero_offload", True, 2, True),
    ("zero_offload", False, 2, True),
    ("zero_offload apart", True, 1, False),
    ("zero_offload apart", True, 1, True),
    ("zero_offload apart", True, 2, False),
    ("zero_offload apart", True, 2, True),
    ("zero_offload apart, bf16 between ranks", True, 2, True),
    ("deepspeed", True, 1, True),
    ("deepspeed", True, 2, True),
    ("deepspeed", False, 2, True),
    ("auto", False, 2, True),
    ("ddp", False, 2, True),
]


def run(wanted: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """Train on ``size`` ranks; return what each of them has measured."""
    with tempfile.TemporaryDirectory() as folder:
        ranks.run([str(TRAINER), json.dumps(wanted), folder], size, limit=400.0)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]


def missing() -> str | None:
    """Return why DeepSpeed cannot be compared with, if so."""
    if importlib.util.find_spec("deepspeed") is None:
        return 'DeepSpeed is not compared with: it is not installed (pip install "distloop[deepspeed]")'
    return None


def memory(*, quick: bool = False) -> dict[str, Any]:
    """Return bytes per parameter by strategy, over all ranks of the host."""
    rows = []
    for side, half, size, clip in MEMORY[1:4:2] if quick else MEMORY:
        if side == "deepspeed" and missing() is not None:
            continue
        told = run(TOWER | {"side": side, "half": half, "clip": clip, "layers": 4 if quick else TOWER["layers"]}, size)
        parameters = told[0]["parameters"]
        total, peak, host = (sum(one[key] for one in told) for key in ("settled", "peak", "host"))
        before = sum(one["before"] for one in told)
        row = {"side": side, "half": half, "ranks": size, "clip": clip, "parameters": parameters}
        row |= {"all": (total - before) / parameters, "peak": (peak - before) / parameters, "host": host / parameters}
        rows.append(row)
    return {"rows": rows}


def memory_table(found: dict[str, Any]) -> str:
    head = ["strategy", "weights", "ranks", "clipping by norm", "host, all ranks", "must", "moonshot"]
    head += ["the rest, each rank", "all", "peak"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found["rows"]:
        own = row["side"].startswith("zero_offload")
        host, rest = row["host"], (row["all"] - row["host"]) / row["ranks"]
        shown = (
            [f"**{host:.2f}**", "16", "12.5", f"{rest:.2f}"]
            if own
            else ["-", "-", "-", f"{row['all'] / row['ranks']:.2f}"]
        )
        weights, clip = "half" if row["half"] else "fp32", "yes" if row["clip"] else "no"
        cells = [
            f"`{row['side']}`",
            weights,
            str(row["ranks"]),
            clip,
            *shown,
            f"{row['all']:.2f}",
            f"{row['peak']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against_deepspeed(*, quick: bool = False) -> dict[str, Any] | None:
    """Return times of steps and peaks of memory of both sides, which take turns as jobs of two ranks."""
    if missing() is not None:
        return None
    wanted = GPT | ({"layers": 2, "steps": 4} if quick else {})
    sides: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "peak": []} for name in ("zero_offload", "deepspeed")
    }
    parameters = 0
    for turn in range(1 if quick else ROUNDS):
        for side in sorted(sides, reverse=turn % 2 == 0):
            told = run(wanted | {"side": side}, 2)
            parameters = told[0]["parameters"]
            slowest = [max(pair) for pair in zip(*(one["seconds"] for one in told), strict=True)]
            sides[side]["seconds"] += slowest[FORGOTTEN:]
            sides[side]["peak"].append(max(one["peak"] for one in told))
            sides[side].setdefault("grown", []).append(max(one["peak"] - one["before"] for one in told))
    return {"sides": sides, "parameters": parameters}


def deepspeed_table(found: dict[str, Any]) -> str:
    ours, theirs = found["sides"]["zero_offload"], found["sides"]["deepspeed"]
    lines = [
        "| | `zero_offload` | DeepSpeed ZeRO-2, optimizer on the CPU | DeepSpeed over ours |",
        "|---|---|---|---|",
    ]

    def line(name: str, key: str, unit: float, word: str) -> None:
        a, b = (statistics.median(side[key]) / unit for side in (ours, theirs))
        lines.append(f"| {name} | {a:.4g} {word} | {b:.4g} {word} | **{b / a:.2f}** |")

    line("step, median", "seconds", 1e-3, "ms")
    a, b = min(ours["seconds"]), min(theirs["seconds"])
    lines.append(f"| step, least | {1e3 * a:.4g} ms | {1e3 * b:.4g} ms | {b / a:.2f} |")
    line("peak memory per rank", "peak", 2**20, "MiB")
    line("the same, less what the process had before the model", "grown", 2**20, "MiB")
    size, count = found["parameters"] / 1e6, len(ours["seconds"])
    lines.append(f"\nA GPT of {size:.1f} M parameters in fp32, 2 ranks, {count} steps of each.")
    return "\n".join(lines)
