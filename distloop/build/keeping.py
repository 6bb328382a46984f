"""What saves a run and sets it back, as a configuration describes it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch

from distloop import __version__
from distloop.build.differences import values_of
from distloop.build.feeding import Fed
from distloop.build.place import Place
from distloop.build.run_directory import RunDirectory
from distloop.build.task_state import ObserverStates, TaskState
from distloop.keeper import Keeper
from distloop.resumed import Resumed
from distloop.saver import Keep, Saver
from distloop.session import Session
from distloop.settings import Resolved


def make_keeper(
    session: Session, task: Any, fed: Fed, place: Place, directory: RunDirectory, resolved: Resolved
) -> Keeper:
    """Return what saves ``session`` and sets it back."""
    config, world = resolved.config, place.world
    saver = Saver(
        directory.checkpoints,
        rank=world.rank,
        ranks=world.size,
        token=directory.token,
        keep=Keep(config.checkpoint.keep_last, config.checkpoint.keep_every),
        background=config.checkpoint.background,
        reading=None if directory.checkpoint is None else directory.checkpoint.step,
    )
    facts = {"run_id": directory.run_id, "strategy": config.strategy.name, **_surroundings(place)}
    return Keeper(
        saver,
        session.turns,
        world,
        place.transport,
        place.device,
        directory.path,
        session.files,
        config.train.seed,
        shared={"session": session},
        own={
            "observers": ObserverStates(session.observers),
            "ledger": session.ledger,
            "task": TaskState(task),
            "data": fed,
        },
        described=lambda: {"configuration": values_of(resolved)},
        facts=facts,
        grace=config.checkpoint.grace,
    )


def resumed_facts(resumed: Resumed | None, notes: Sequence[str], place: Place) -> dict[str, str]:
    """Return what a user wants to see of how a run goes on, by name."""
    if resumed is None:
        return {"note": "; ".join(notes)} if notes else {}
    known = resumed.checkpoint.manifest["facts"]
    changed = [
        f"{name} was {known.get(name)}, is {now} (the last bits may differ)"
        for name, now in _surroundings(place).items()
        if known.get(name) != now and name not in ("python", "distloop")
    ]
    every = [*notes, *changed]
    return {"resumed": resumed.describe()} | ({"changed": "; ".join(every)} if every else {})


def _surroundings(place: Place) -> dict[str, Any]:
    """Return what the last bits of results depend on, beside the configuration."""
    return {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": place.device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distloop": __version__,
    }
