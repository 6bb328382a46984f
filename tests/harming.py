"""Campaigns of harm: runs that are killed or signalled at random moments, gone on with, and compared to one in peace.

Everything random is drawn from one seed, but how far a run has come at a moment is not.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distloop.transports import Transport
from tests.ranks import in_processes
from tests.restarting import DETERMINISTIC, EPOCHS, LIMIT, PER_EPOCH, SAMPLES, STEPS, Attempt, Run, Under

FAST = ("ddp", "naive", "ring", "direct", "auto", "zero_offload")  # to the bit on as many ranks
DIED = 10  # the exit code of a rank that has lost another
REQUEUE = 75
FORGOTTEN = (".tmp-", ".trash-", ".best-", ".probe-", ".part-", ".run.json", ".model")


@dataclass
class Expected:
    """What a run comes to that nobody harms, and how long its parts take by number of ranks."""

    digests: tuple[str, str]
    logged: list[dict[str, Any]]
    history: dict[int, list[int]]
    startup: dict[int, float] = field(default_factory=dict)
    training: dict[int, float] = field(default_factory=dict)


def in_peace(folder: Path, worlds: Sequence[int], settings: dict[str, Any]) -> tuple[Expected, list[str]]:
    """Run once on each of these numbers of ranks; return what it comes to, and where the runs differ."""
    found, faults = None, []
    in_processes(1, _nothing)  # the fork server begins with the first rank
    for number, world in enumerate(worlds):
        run = Run(folder / f"peace-{number}", **settings)
        attempt = run.attempt(world)
        assert attempt.over, attempt.describe()
        faults += run.faults
        own = Expected(run.digests(), run.logged(), by_step(run))
        found = found or own
        if (own.digests, own.logged, own.history) != (found.digests, found.logged, found.history):
            faults.append(f"run {number}, on {world} ranks, differs from that on {worlds[0]}")
        begun = max(attempt.lines[rank][0]["time"] for rank in range(world))
        found.startup[world] = begun - attempt.launched
        found.training[world] = attempt.lines[0][-1]["time"] - begun
    assert found is not None
    return found, faults


def _nothing(transport: Transport) -> None:
    pass


def by_step(run: Run) -> dict[int, list[int]]:
    return {step: sorted(ids) for step, ids in run.history().items()}


class Harm(ABC):
    """What is done to attempts, and what they may come to then."""

    moments: ClassVar[dict[str, int]]  # when, and how often of all

    def __init__(self, expected: Expected, chance: random.Random):
        self._expected, self._chance = expected, chance
        self.when: Counter[str] = Counter()

    def __call__(self, under: Under) -> None:
        """Wait for a random moment, and do it."""
        chance, world = self._chance, under.attempt.world
        kind = chance.choices(list(self.moments), list(self.moments.values()))[0]
        startup, training = self._expected.startup[world], self._expected.training[world]
        moment = chance.uniform(0, startup) if kind == "start" else startup + chance.uniform(0, 0.5 * training)
        under.until(moment, {"save": under.run.saving, "evaluation": under.evaluates}.get(kind))
        if kind == "save":
            under.until(time.monotonic() - under.attempt.launched + chance.uniform(0, 0.005))
        under.attempt.told = {"when": kind, "after": round(time.monotonic() - under.attempt.launched, 3)}
        self.when[kind] += 1
        self.do(under)

    @abstractmethod
    def do(self, under: Under) -> None:
        """Do it now."""

    @abstractmethod
    def done(self, attempt: Attempt) -> bool:
        """Return whether it has stopped the attempt."""

    @abstractmethod
    def fault(self, run: Run, attempt: Attempt) -> str | None:
        """Return what of an attempt that it was done to should not have been."""


class Kill(Harm):
    """SIGKILL to one rank, some, or all of them. Who is left finds out, or a launcher tells it."""

    moments: ClassVar = {"start": 1, "training": 3, "save": 2}

    def do(self, under: Under) -> None:
        world, chance = under.attempt.world, self._chance
        victims = chance.sample(range(world), chance.choice([1, chance.randint(1, world), world]))
        begun = under.begun()
        for victim in victims:
            under.job.send(victim, signal.SIGKILL)
        under.attempt.told |= {"killed": victims, "begun": begun}
        under.job.wait(LIMIT, victims)
        if not begun:  # those who have not met yet cannot know; torchrun ends them
            _terminate(under)

    def done(self, attempt: Attempt) -> bool:
        return -signal.SIGKILL in attempt.codes and not attempt.hung

    def fault(self, run: Run, attempt: Attempt) -> str | None:
        left = [code for code in attempt.codes if code != -signal.SIGKILL]
        if attempt.told.get("begun") and not attempt.hung and not set(left) <= {0, DIED}:
            return f"survivors of a kill: {attempt.describe()}"
        return None


class Signal(Harm):
    """A signal that asks for a stop: to all ranks, one, or all at moments of their own, if need be the last one."""

    moments: ClassVar = {"start": 1, "training": 3, "save": 2, "evaluation": 2}
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def do(self, under: Under) -> None:
        chance, job, ranks = self._chance, under.job, list(range(under.attempt.world))
        number, way = chance.choice(self.numbers), chance.choice(["all", "one", "skewed", "late"])
        delays = {rank: chance.uniform(0, 0.3) if way == "skewed" else 0.0 for rank in ranks}
        if way in ("one", "late"):
            delays = {chance.choice(ranks): 0.0}
        trains = under.trains()
        under.attempt.told |= {"signal": number.name, "way": way, "delays": delays, "trains": trains}
        begun = time.monotonic() - under.attempt.launched
        for rank in sorted(delays, key=lambda rank: delays[rank]):
            under.until(begun + delays[rank])
            job.send(rank, number)
        if way == "late" and trains:  # the others when the first has ended, as torchrun does
            under.until(0.0, lambda: bool(under.codes()))
            for rank in set(under.job.running()) - set(delays):
                job.send(rank, number)
        if not trains:  # a rank that is ended before it can stop takes others along, by its launcher
            under.until(0.0, lambda: bool(set(under.codes()) - {0, REQUEUE}))
            if set(under.codes()) - {0, REQUEUE}:
                _terminate(under)

    def done(self, attempt: Attempt) -> bool:
        return not attempt.over and not attempt.hung

    def fault(self, run: Run, attempt: Attempt) -> str | None:
        codes, steps = set(attempt.codes), {attempt.last(rank) for rank in range(attempt.world)}
        if attempt.hung or not (attempt.told["trains"] or codes == {REQUEUE}):
            return None
        if codes not in ({REQUEUE}, {0}):
            return f"exit codes: {attempt.describe()}"
        if len(steps) > 1:
            return f"ranks disagree on the step {steps}: {attempt.describe()}"
        if steps != {run.newest()}:
            return f"ended at step {steps} and saved at {run.newest()}: {attempt.describe()}"
        return None


def _terminate(under: Under) -> None:
    for rank in under.job.running():
        under.job.send(rank, signal.SIGTERM)


@dataclass
class Figures:
    """What a campaign has found; all but counts, times and moments must be 0."""

    harmed: int = 0
    runs: int = 0
    attempts: int = 0
    samples_lost: int = 0
    samples_repeated: int = 0
    other_weights: int = 0
    other_logs: int = 0
    left_over: int = 0
    hangs: int = 0
    disagreements: int = 0  # of ranks on the step at which they stopped
    when: dict[str, int] = field(default_factory=dict)  # the moments
    outcomes: dict[str, int] = field(default_factory=dict)  # exit codes of harmed attempts, by those of all ranks
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        wrong = (self.samples_lost, self.samples_repeated, self.other_weights, self.other_logs, self.left_over)
        return not any(wrong) and not self.faults

    def figures(self) -> dict[str, Any]:
        """Return what to print of it."""
        return asdict(self) | {"faults": len(self.faults)}

    def count(self, run: Run) -> dict[int, list[int]]:
        """Count samples that are not in the history exactly once per epoch; return it, in order."""
        history = by_step(run)
        for epoch in range(EPOCHS):
            steps = range(epoch * PER_EPOCH + 1, (epoch + 1) * PER_EPOCH + 1)
            times = Counter(i for step in steps for i in history.get(step, []))
            self.samples_lost += sum(times[i] == 0 for i in range(SAMPLES))
            self.samples_repeated += sum(max(count - 1, 0) for count in times.values())
        return history

    def compare(self, run: Run, expected: Expected) -> None:
        """Hold a run that has come to its end against one in peace."""
        history = self.count(run)
        if history != expected.history or set(history) != set(range(1, STEPS + 1)):
            self.faults.append(f"{run.folder}: other samples in some step")
        self.other_weights += run.digests() != expected.digests
        self.other_logs += run.logged() != expected.logged
        names = [path.name for path in run.directory.rglob(".*") if path.name.startswith(FORGOTTEN)]
        self.left_over += len(names)
        self.faults += [f"{run.folder}: left over: {names}"] if names else []


def campaign(
    harm: Harm, count: int, folder: Path, expected: Expected, settings: dict[str, Any], *, told: bool = False
) -> Figures:
    """Harm ``count`` attempts; compare each run that they are of, once it has come to its end."""
    figures, begun = Figures(), time.monotonic()
    while figures.harmed < count:
        run = Run(folder / f"run-{figures.runs}", **settings)
        figures.runs += 1
        if _lived_through(run, harm, figures, count, list(expected.startup)):
            figures.compare(run, expected)
        figures.faults += run.faults
        if told:
            print(f"{figures.harmed} of {count}, run {figures.runs}, {figures.faults}", file=sys.stderr, flush=True)
        if figures.sound:
            shutil.rmtree(run.folder)
        elif len(figures.faults) > 20:
            break
    figures.when = dict(harm.when)
    figures.seconds = round(time.monotonic() - begun, 1)
    return figures


def _lived_through(run: Run, harm: Harm, figures: Figures, count: int, worlds: list[int]) -> bool:
    """Return whether a run has come to its end, whatever was done to it meanwhile."""
    while True:
        harming = figures.harmed < count
        attempt = run.attempt(harm._chance.choice(worlds), harm if harming else None)
        figures.attempts += 1
        if harming and (fault := harm.fault(run, attempt)):
            run.faults.append(fault)
        figures.hangs += attempt.hung
        if harming:
            steps = {attempt.last(rank) for rank in range(attempt.world)}
            figures.disagreements += set(attempt.codes) == {REQUEUE} and len(steps) > 1
            trained = "" if attempt.told.get("trains", True) else ", before a step"
            outcome = " and ".join(map(str, sorted(set(attempt.codes)))) + trained
            figures.outcomes[outcome] = figures.outcomes.get(outcome, 0) + 1
        if attempt.over:
            return True
        if not (harming and harm.done(attempt)):
            run.faults.append(f"ended by itself: {attempt.describe()}")
            return False
        figures.harmed += 1


def kills(count: int, seed: int, folder: Path, worlds: Sequence[int], settings: Any, *, told: bool = False) -> Figures:
    """Kill ranks of runs on these numbers of ranks, another at each restart."""
    expected, faults = in_peace(folder, worlds, settings)
    figures = campaign(Kill(expected, random.Random(seed)), count, folder, expected, settings, told=told)
    figures.faults += faults
    return figures


def signals(count: int, seed: int, folder: Path, worlds: Sequence[int], *, told: bool = False) -> Figures:
    """Send signals to ranks of runs on these numbers of ranks, another at each restart."""
    expected, faults = in_peace(folder, worlds, DETERMINISTIC)
    figures = campaign(Signal(expected, random.Random(seed)), count, folder, expected, DETERMINISTIC, told=told)
    figures.faults += faults
    return figures
