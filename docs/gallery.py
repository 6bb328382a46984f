"""Optimizers times schedules on one task, as one picture, one JSON file and one table: python docs/gallery.py.

Every cell is the same network on the same digits with the same batches; what differs between rows is the optimizer
(with one learning rate for the whole row), between columns the schedule. Each cell is run with several seeds.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import distloop
from distloop.observers.curves import new_figure
from distloop.plot.schedule import plan_rates
from distloop.settings import from_mapping, resolve
from distloop.tasks.digits import Digits

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "images" / "gallery.png"
RESULTS = HERE.parent / "benchmarks" / "results" / "gallery.json"
SEEDS = [0, 1, 2]
EPOCHS = 20
STEPS = 23 * EPOCHS  # 1437 images in batches of 64
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"name": "sgd", "lr": 1.0},
    "SGD, momentum 0.9": {"name": "sgd", "lr": 0.2, "momentum": 0.9},
    "RMSProp": {"name": "rmsprop", "lr": 0.01},
    "Adam": {"name": "adam", "lr": 0.01},
    "AdamW, decay 0.1": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant"},
    "step": {"name": "step", "every": STEPS // 3, "gamma": 0.1},
    "cosine": {"name": "cosine"},
    "warm-up + cosine": {"name": "cosine", "warmup_steps": STEPS // 10},
    "one-cycle": {"name": "one_cycle"},
}


def sections(optimizer: str, schedule: str, seed: int = 0, epochs: int = EPOCHS) -> dict[str, dict[str, Any]]:
    """Return the configuration of a run, without its task and its files."""
    return {
        "data": {"global_batch_size": 64},
        "optimizer": OPTIMIZERS[optimizer],
        "schedule": SCHEDULES[schedule],
        "train": {"epochs": epochs, "seed": seed},
        "evaluate": {"every_epochs": epochs},  # at the end alone
    }


def measure(optimizer: str, schedule: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train once; return the curve of the training loss, and the loss and accuracy on the validation images."""
    curve: list[tuple[int, float]] = []

    def note(record: distloop.Record) -> None:
        if record.kind == "train":
            curve.append((record.step, record.values["loss"]))

    torch.manual_seed(seed)
    task = Digits("mlp")
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        log = {"directory": directory, "every": 10, "picture": False, "tensorboard": False, "progress": False}
        chosen = sections(optimizer, schedule, seed, epochs)
        result = distloop.fit(task, observers=[note], log=log, monitor={"metric": "loss"}, **chosen)
    return {
        "optimizer": optimizer,
        "schedule": schedule,
        "seed": seed,
        "steps": [step for step, _ in curve],
        "training_loss": [float(f"{loss:.3g}") for _, loss in curve],
        "loss": result.last_metrics["loss"],
        "accuracy": result.last_metrics["accuracy"],
    }


def cell(runs: list[dict[str, Any]], optimizer: str, schedule: str) -> list[dict[str, Any]]:
    """Return the runs of a cell, one for each seed."""
    return [run for run in runs if run["optimizer"] == optimizer and run["schedule"] == schedule]


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def table(results: dict[str, Any]) -> str:
    """Return validation loss and accuracy of every cell, as the page quotes them."""
    runs, optimizers, schedules = results["runs"], results["optimizers"], results["schedules"]
    lines = [f"| optimizer | lr | {' | '.join(schedules)} |", "|---|---|" + "---|" * len(schedules)]
    for optimizer, settings in optimizers.items():
        cells = [cell(runs, optimizer, schedule) for schedule in schedules]
        texts = [f"{mean(found, 'loss'):.3f}, {100 * mean(found, 'accuracy'):.1f} %" for found in cells]
        lines.append(f"| {optimizer} | {settings['lr']:g} | {' | '.join(texts)} |")
    everything = [cell(runs, optimizer, schedule) for optimizer in optimizers for schedule in schedules]
    spreads = [100 * (max(r["accuracy"] for r in found) - min(r["accuracy"] for r in found)) for found in everything]
    lines += [
        "",
        f"Validation loss and accuracy after {results['steps']} updates, means over {len(results['seeds'])} seeds. "
        f"Between seeds of a cell the accuracy varies by {statistics.median(spreads):.1f} points in the median, "
        f"by {max(spreads):.1f} at most.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> Any:
    """Return the picture: schedules above, below them a row of training losses for each optimizer."""
    runs, optimizers, schedules = results["runs"], results["optimizers"], results["schedules"]
    figure = new_figure(2.5 * len(schedules) + 0.6, 1.75 * (len(optimizers) + 1))
    grid = figure.subplots(len(optimizers) + 1, len(schedules), sharex=True, sharey="row")
    for axes, schedule in zip(grid[0], schedules, strict=True):
        draw_shape(axes, schedule, results["shapes"][schedule])
    grid[0][0].set_ylabel("learning rate,\npart of lr")
    low = min(min(run["training_loss"]) for run in runs) * 0.5
    for number, (row, (optimizer, settings)) in enumerate(zip(grid[1:], optimizers.items(), strict=True)):
        cells = [cell(runs, optimizer, schedule) for schedule in schedules]
        best = min(mean(found, "loss") for found in cells)
        for axes, found in zip(row, cells, strict=True):
            if found is not cells[0]:
                draw_curves(axes, cells[0], "0.8", 1)
            draw_curves(axes, found, f"C{number}", 2)
            loss = mean(found, "loss")
            text = f"loss {loss:.3f}\n{100 * mean(found, 'accuracy'):.1f} % right"
            weight = "bold" if loss == best else "normal"
            axes.text(0.97, 0.93, text, transform=axes.transAxes, ha="right", va="top", fontsize=8.5, fontweight=weight)
            axes.set_yscale("log")
            axes.set_ylim(low, 5.0)
            axes.grid(alpha=0.25)
        name = optimizer.replace(", ", "\n")
        row[0].set_ylabel(f"{name}\nlr {settings['lr']:g}")
    for axes in grid[-1]:
        axes.set_xlabel("update")
    figure.suptitle(
        f"Training loss (logarithmic) of an MLP on digits, {len(results['seeds'])} seeds each; "
        "grey: the row's constant schedule.\n"
        "In each cell the validation loss and accuracy at the end, means over seeds; bold: the row's lowest loss.",
        fontsize=10,
    )
    return figure


def draw_shape(axes: Any, schedule: str, shape: dict[str, list[float]]) -> None:
    axes.plot(shape["updates"], shape["factors"], color="black", linewidth=1.5)
    axes.fill_between(shape["updates"], shape["factors"], color="black", alpha=0.08, linewidth=0)
    axes.set_title(schedule, fontsize=11)
    axes.set_ylim(0.0, 1.1)
    axes.grid(alpha=0.25)


def draw_curves(axes: Any, found: list[dict[str, Any]], colour: str, layer: float) -> None:
    for run in found:
        axes.plot(run["steps"], run["training_loss"], color=colour, linewidth=1.0, zorder=layer)


def shape_of(schedule: str) -> dict[str, list[float]]:
    """Return a schedule as training uses it, as parts of the learning rate."""
    task = {"task": {"name": "digits", "model": "mlp"}}
    planned = plan_rates(resolve(from_mapping(task | sections("SGD", schedule))))
    top = OPTIMIZERS["SGD"]["lr"]
    return {"updates": list(planned.updates), "factors": [float(f"{rate / top:.4g}") for rate in planned.rates[""]]}


def main() -> None:
    """Run everything, which takes about a minute, and write what it gave."""
    runs = []
    for optimizer in OPTIMIZERS:
        for schedule in SCHEDULES:
            found = [measure(optimizer, schedule, seed) for seed in SEEDS]
            print(f"{optimizer:<18} {schedule:<17} loss {mean(found, 'loss'):.3f}", flush=True)
            runs += found
    results = {
        "task": "digits, model mlp, batches of 64",
        "steps": STEPS,
        "seeds": SEEDS,
        "optimizers": OPTIMIZERS,
        "schedules": SCHEDULES,
        "shapes": {schedule: shape_of(schedule) for schedule in SCHEDULES},
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(results) + "\n")
    draw(results).savefig(PICTURE, dpi=100)
    print(f"\n{table(results)}\n\nwritten to {RESULTS} and {PICTURE}")


if __name__ == "__main__":
    main()
