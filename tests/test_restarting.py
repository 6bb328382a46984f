"""Runs that are killed or signalled at random moments go on exactly; tests/long has the same in the large.

Everything is in memory where there is such a file system: the system does not lose what a killed process has written,
and what a disk may lose is for tests/test_checkpoint_crashes.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.harming import FAST, Figures, kills, signals
from tests.long import pairs
from tests.restarting import BATCH, DETERMINISTIC, PER_EPOCH, SAMPLES, STEPS, Attempt, Run

MEMORY = Path("/dev/shm")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as name:
        yield Path(name)


def sound(figures: Figures, least: int) -> None:
    assert figures.sound, "\n".join([str(figures.figures()), *figures.faults])
    assert figures.harmed >= least


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_runs_lose_and_repeat_no_sample_and_end_in_the_same_weights(folder: Path) -> None:
    """On another number of ranks after each kill."""
    sound(kills(10, 1, folder, (1, 2, 3, 4), DETERMINISTIC), 10)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", FAST)
def test_every_fast_strategy_goes_on_to_the_bit_on_as_many_ranks(folder: Path, strategy: str) -> None:
    sound(kills(2, 1, folder, (2, 2), {"strategy.name": strategy}), 2)  # 20 of each in tests/long


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_signalled_runs_stop_together_and_go_on(folder: Path) -> None:
    sound(signals(6, 1, folder, (1, 2, 3, 4)), 6)  # 200 in tests/long


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    find_spec("deepspeed") is None, reason='deepspeed is not installed: pip install "distloop[deepspeed]"'
)
def test_runs_go_on_with_and_without_deepspeed(folder: Path) -> None:
    """Also one after the other: what DeepSpeed records another strategy has to know what to do with."""
    pairs.run(folder / "peace", ("naive", 1), 60)
    for steps, place in enumerate([("naive", 1), ("deepspeed", 2), ("ring", 2), ("deepspeed-3", 1)], 1):
        pairs.run(folder / "whole", place, 15 * steps)
    found, expected = (pairs.curve(folder / name) for name in ("whole", "peace"))
    own = [row for row in found if row[0] == "train" or row[1] % 15 or row[1] == 60]
    assert pairs.distance(own, expected) <= pairs.CLOSE


# -- the proof itself ------------------------------------------------------------------------------------------------


def a_run(folder: Path, *attempts: tuple[int, int, int | None]) -> Run:
    """Return a run of these attempts on one rank: from which checkpoint, to which step, what it saved."""
    run = Run(folder / "run")
    for number, (first, last, saved) in enumerate(attempts):
        steps = range(first + 1, last + 1)
        lines = [{"step": s, "ids": [(s - 1) % PER_EPOCH * BATCH + i for i in range(BATCH)]} for s in steps]
        for line in lines:
            line["ids"] = [i for i in line["ids"] if i < SAMPLES]
        run.attempts.append(Attempt(number, 1, first, 0.0, lines=[json.loads(json.dumps(lines))]))
        if saved is not None:
            run.writers[saved, number] = number
    return run


def counted(run: Run) -> tuple[int, int]:
    figures = Figures()
    figures.count(run)
    return figures.samples_lost, figures.samples_repeated


def test_the_proof_follows_the_line_of_checkpoints(folder: Path) -> None:
    run = a_run(folder, (0, 9, 6), (6, 7, None), (6, 20, 18), (18, STEPS, STEPS))
    assert counted(run) == (0, 0)
    assert sorted(run.history()) == list(range(1, STEPS + 1))


def test_the_proof_sees_what_is_lost_and_what_comes_twice(folder: Path) -> None:
    skipped = a_run(folder / "a", (0, 9, 6), (6, STEPS, STEPS))
    del skipped.attempts[1].lines[0][1]
    assert counted(skipped) == (BATCH, 0)
    doubled = a_run(folder / "b", (0, 9, 6), (6, STEPS, STEPS))
    doubled.attempts[1].lines[0].append(doubled.attempts[1].lines[0][1])
    assert counted(doubled) == (0, BATCH)
    another = a_run(folder / "c", (0, 9, 6), (6, STEPS, STEPS))
    another.attempts[0].lines[0][3]["ids"][0] += 1
    assert counted(another) == (1, 1)
