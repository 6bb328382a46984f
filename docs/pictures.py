"""Take the pictures of docs/kinds.md from runs: python docs/pictures.py FOLDER.

FOLDER is what ``python benchmarks/kinds.py --keep FOLDER`` left.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from distloop.observers.curves import new_figure

IMAGES = Path(__file__).resolve().parent / "images"
TAKEN = {
    "autoencoder": "reconstructions",
    "gan": "samples",
    "contrastive": "embedding",
    "modem": "block_errors",
}


def returns(run: Path) -> list[tuple[float, float]]:
    """Return (steps in the environment, mean return) of each evaluation."""
    acted, points = 0.0, []
    for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if record["kind"] == "train":
            acted = record["environment_steps"]
        elif record["kind"] == "evaluate":
            points.append((acted, record["return"]))
    return points


def draw_returns(runs: Path) -> Any:
    """Return a picture of the returns of dqn, dyna and actor_critic over the steps acted."""
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for kind in ("dyna", "actor_critic", "dqn"):
        acted, found = zip(*returns(runs / kind), strict=True)
        axes.plot(acted, found, marker="o", markersize=3, label=kind)
    axes.axhline(400, color="black", linewidth=0.8, linestyle="--", label="must reach")
    axes.set(xlabel="steps in the environment", ylabel="mean return of 20 episodes", title="CartPole-v1")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main(runs: Path) -> None:
    for kind, name in TAKEN.items():
        shutil.copyfile(runs / kind / f"{name}.png", IMAGES / f"{name}.png")
    draw_returns(runs).savefig(IMAGES / "dyna.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
