"""``python -m distloop.launching.requeue ARGUMENTS``, those of train: whether a job that stopped is to start again.

A job whose ranks are stopped before they train a step (its limit is too short, its nodes too slow) would be started
again for ever. ``run.json`` has the step at which each attempt began: if this one and the one before began where the
newest checkpoint is, this says so and ends with exit code 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distloop.build.attempts import known_of
from distloop.errors import DistloopError
from distloop.targets import given


def stuck(began: Sequence[int | None], newest: int, restarts: int) -> bool:
    """Return whether two attempts of one job have not come further.

    Args:
        began: the steps at which attempts went on; None for a beginning.
        newest: the step of the newest checkpoint.
        restarts: how often this job was started again before; attempts of other jobs do not count.
    """
    last = [step or 0 for step in began][-min(2, restarts + 1) :]
    return len(last) == 2 and all(step >= newest for step in last)


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint, whole or not, or 0."""
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def reason(run: Path, environment: Mapping[str, str]) -> str | None:
    """Return in a sentence why the job is not to be started again, if so."""
    attempts: list[Any] = known_of(run).get("attempts", [])
    began = [attempt.get("resumed_step") for attempt in attempts if isinstance(attempt, dict)]
    restarts, newest = environment.get("SLURM_RESTART_COUNT", "0"), newest_step(run)
    if not stuck(began, newest, int(restarts) if restarts.isdigit() else 0):
        return None
    return (
        f"{run}: stopped at step {newest} twice without getting further, so the job is not started again: "
        "a longer limit, or an earlier --signal, would let it"
    )


def run_of(arguments: Sequence[str]) -> Path:
    """Return the directory of the run that train goes on with, given what the batch scripts give it."""
    config = given(["--resume", "auto", *arguments]).resolved().config
    if config.checkpoint.resume in (None, "auto"):
        return Path(config.log.directory, config.log.name or "")
    path = Path(config.checkpoint.resume)
    return path.parent.parent if path.name.startswith("step-") and path.parent.name == "checkpoints" else path


def main(arguments: Sequence[str]) -> int:
    """Say and return whether to start again."""
    try:
        found = reason(run_of(arguments), os.environ)
    except DistloopError as failure:
        found = str(failure)
    if found is not None:
        print(f"distloop: {found}", file=sys.stderr)
    return int(found is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
