"""What a run tells: records while it goes on, and a result at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """Something that happened: ``kind`` is start, train, evaluate, checkpoint, end or failure.

    Exact over all ranks, alike on each. Exceptions are a failure, which is a rank's own, and a checkpoint, of whose end
    rank 0 alone knows.
    """

    kind: str
    step: int
    epoch: int
    values: Mapping[str, Any]


# Called on rank 0 with every record; returning True asks for a stop.
Observer = Callable[[Record], object]


@dataclass
class Result:
    """How a run ended. ``metrics`` are those of the model that was kept: the best one, or the last."""

    reason: str
    steps: int
    epochs: int
    seconds: float
    samples_per_second: float
    directory: Path
    metrics: dict[str, float] = field(default_factory=dict)
    last_metrics: dict[str, float] = field(default_factory=dict)
    best_metric: str | None = None
    best: float | None = None
    best_step: int | None = None
    kept_step: int = 0  # after which the model that was kept was saved
    skipped: int = 0
    exit_code: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it with JSON's types only."""
        return asdict(self) | {"directory": str(self.directory)}
