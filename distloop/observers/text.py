"""Records as text: one aligned line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distloop.records import Record


def line(record: Record, total_steps: int | None = None) -> str:
    """Return a line for a train or evaluate record; columns of consecutive lines stand under each other."""
    total = f"/{total_steps}" if total_steps is not None else ""
    width = len(str(total_steps)) if total_steps is not None else 6
    head = f"step {record.step:>{width}}{total}  epoch {record.epoch + 1:>3}"
    if record.kind == "evaluate":
        star = "  * best" if record.values.get("best") else ""
        return f"{head}  eval  {_columns(record.values)}{star}"
    return f"{head}  {_columns(record.values)}"


def _columns(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{label(key)} {number(key, value)}" for key, value in values.items() if not _left_out(key))


def _left_out(key: str) -> bool:
    # Of several learners the losses fill a line; the rest is in metrics.jsonl and in the curves.
    return key == "best" or key.endswith(("/lr", "/gradient_norm"))


def label(key: str) -> str:
    """Return a metric's name as people write it."""
    return key.replace("samples_per_second", "samples/s").replace("gradient_norm", "grad norm").replace("_", " ")


def number(key: str, value: Any) -> str:
    """Return a metric's value at a fixed width."""
    if value is None:
        return f"{'-':>9}"
    if key == "idle":
        return f"{100 * value:>4.0f} %"
    if key.endswith(("samples_per_second", "_steps")):
        return f"{value:>9,.0f}"
    if key.endswith("skipped"):
        return f"{value:>3}"
    if key.endswith(("lr", "loss_scale")):
        return f"{value:>9.3g}"
    return f"{value:>9.4f}" if abs(value) < 1e4 else f"{value:>9.3g}"
