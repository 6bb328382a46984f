"""Runs that are stopped at random moments and gone on with: a task with a journal, and what its journals prove.

The step in a journal is counted by a buffer of the model, so that it is that of the weights, whatever the session says.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from distloop.checkpoints import Checkpoints
from tests.ranks import Ended, Job

SAMPLES, BATCH, EPOCHS = 77, 12, 5
PER_EPOCH = -(-SAMPLES // BATCH)
STEPS = EPOCHS * PER_EPOCH
LIMIT = 60.0  # seconds after which a rank that should have ended hangs, where others have the cores too
PAUSE = 0.001  # seconds between two looks
SETTINGS: dict[str, Any] = {
    "data.global_batch_size": BATCH,
    "optimizer.name": "adamw",
    "optimizer.lr": 0.01,
    "optimizer.weight_decay": 0.1,
    "schedule.name": "cosine",
    "schedule.warmup_steps": 5,
    "gradients.clip_norm": 1.0,
    "train.epochs": EPOCHS,
    "checkpoint.every_steps": 2,
    "log.name": "run",
    "log.every": 5,
    "log.tensorboard": "false",
    "log.picture": "false",
}
DETERMINISTIC = {"train.deterministic": "true", "train.leaves": 4}


# -- the task, in a rank ---------------------------------------------------------------------------------------------


class Journal:
    """What one rank does in one attempt: a line for each step, which the system has before the step is over."""

    def __init__(self) -> None:
        self.attempt, self.rank = int(os.environ["ATTEMPT"]), int(os.environ.get("RANK", "0"))
        path = _journal(Path(os.environ["JOURNAL"]), self.attempt, self.rank)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.ids: list[int] = []
        self.write()

    def write(self, **values: Any) -> None:
        head = {"attempt": self.attempt, "rank": self.rank, "time": time.monotonic()}
        os.write(self._file, json.dumps(head | values).encode() + b"\n")


class Learned:
    """A classifier with dropout and batch statistics; a leaf of one sample has two values for each of them."""

    def __init__(self, journal: Journal):
        self.model = nn.Sequential(
            nn.Linear(6, 16), nn.Unflatten(1, (8, 2)), nn.BatchNorm1d(8), nn.Flatten(), nn.ReLU(), nn.Dropout(0.3)
        )
        self.model.append(nn.Linear(16, 3))
        self.model.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._journal = journal

    def guess(self, batch: Any) -> Tensor:
        self._journal.ids += batch[2].tolist()
        return self.model(batch[0])

    def targets(self, batch: Any) -> Tensor:
        return batch[1]

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(guesses, targets)

    def updated(self) -> None:
        self.model.updates += 1
        self._journal.write(step=int(self.model.updates), ids=self._journal.ids)
        self._journal.ids = []


class Augmented(Dataset[Any]):
    """Draws when it is read; the last of a sample is its number."""

    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
        self.y = (self.x.sum(1) > 0).long() + (self.x[:, 0] > 1).long()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.randn(6), self.y[index], index


class Restarted:
    """What a run learns that is stopped and gone on with."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.objectives = {"model": Learned(self.journal)}
        self.train = self.validation = Augmented()

    def collect(self, epoch: int) -> Any:
        return self.train

    def evaluate(self, batch: Any) -> Any:
        self.journal.write(evaluates=True)
        loss = F.cross_entropy(self.objectives["model"].model(batch[0]), batch[1], reduction="sum")
        return {"loss": (loss, float(len(batch[1])))}


def _journal(folder: Path, attempt: int, rank: int) -> Path:
    return folder / f"{attempt:05}-{rank}.jsonl"


# -- attempts, and what becomes of them ------------------------------------------------------------------------------


@dataclass
class Attempt:
    """One start of a run, on ranks of its own."""

    number: int
    world: int
    began_at: int  # the step of the newest checkpoint
    launched: float
    ends: list[Ended] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)  # by who harmed it
    hung: bool = False
    lines: list[list[dict[str, Any]]] = field(default_factory=list)  # of the journals, by rank

    @property
    def codes(self) -> list[int]:
        return [end.code for end in self.ends]

    @property
    def over(self) -> bool:
        """Whether the run has come to its end."""
        return set(self.codes) == {0}

    def steps(self, rank: int) -> list[dict[str, Any]]:
        return [line for line in self.lines[rank] if "step" in line]

    def last(self, rank: int) -> int:
        """Return the last step that a rank has taken."""
        return max((line["step"] for line in self.steps(rank)), default=self.began_at)

    def describe(self) -> str:
        said = " | ".join(end.err.strip() for end in self.ends if end.err.strip())
        return (
            f"attempt {self.number} on {self.world} from step {self.began_at}: {self.told}, codes {self.codes}: {said}"
        )


class Run:
    """A run in a folder of its own, however many attempts it takes.

    Attributes:
        writers: by step and inode, the attempt that wrote a checkpoint.
        faults: sentences on all that should not have been.
    """

    def __init__(self, folder: Path, **settings: Any):
        folder.mkdir(parents=True)
        self.folder, self.attempts = folder, list[Attempt]()
        self._journals = folder / "journals"
        self._journals.mkdir()
        named = SETTINGS | settings
        self._arguments = [word for key, value in named.items() for word in (f"--{key}", str(value))]
        self._environment = {"JOURNAL": str(self._journals)}
        self.writers: dict[tuple[int, int], int] = {}
        self.faults: list[str] = []

    @property
    def directory(self) -> Path:
        return self.folder / "runs" / "run"

    def attempt(self, world: int, harm: Callable[[Under], None] | None = None) -> Attempt:
        """Start the run or go on with it, let ``harm`` be done, and return when all its processes are gone."""
        now = Attempt(len(self.attempts), world, self.newest(), time.monotonic())
        self.attempts.append(now)
        job = Job(
            *("train", "tests.restarting:Restarted", "--resume", "auto", *self._arguments),
            folder=self.folder,
            ranks=world,
            ATTEMPT=str(now.number),
            **self._environment,
        )
        try:
            if harm is not None:
                harm(Under(self, now, job))
            now.hung = not job.wait(LIMIT)
        finally:
            now.ends = job.end()
        now.lines = [list(_lines(_journal(self._journals, now.number, rank))) for rank in range(world)]
        for step, inode in self._committed().items():
            self.writers.setdefault((step, inode), now.number)
        self._look(now)
        return now

    def newest(self) -> int:
        """Return the step of the newest checkpoint, or 0."""
        return max(self._committed(), default=0)

    def saving(self) -> bool:
        """Return whether a checkpoint is being written."""
        checkpoints = self.directory / "checkpoints"
        return checkpoints.is_dir() and any(checkpoints.glob(".tmp-*"))

    def journal(self, attempt: Attempt, rank: int) -> list[dict[str, Any]]:
        """Return what a rank has done so far."""
        return list(_lines(_journal(self._journals, attempt.number, rank)))

    def digests(self) -> tuple[str, str]:
        """Return the sha256 of the last weights and of the best model."""
        last = self.directory / "checkpoints" / f"step-{STEPS:08}" / "model.safetensors"
        best = self.directory / "model.safetensors"
        return hashlib.sha256(last.read_bytes()).hexdigest(), hashlib.sha256(best.read_bytes()).hexdigest()

    def logged(self) -> list[dict[str, Any]]:
        """Return the log, without what depends on the clock."""
        own = {"time", "samples_per_second", "idle", "seconds"}
        rows = [{k: v for k, v in row.items() if k not in own} for row in _lines(self.directory / "metrics.jsonl")]
        return [row for row in rows if row["kind"] in ("train", "evaluate")]

    def history(self) -> dict[int, list[int]]:
        """Return the samples of each step of the line that led to the end: from checkpoint to checkpoint, backwards."""
        found: dict[int, list[int]] = {}
        attempt, last = self.attempts[-1], STEPS
        while True:
            first = attempt.began_at
            for rank in range(attempt.world):
                for line in attempt.steps(rank):
                    if first < line["step"] <= last:
                        found.setdefault(line["step"], []).extend(line["ids"])
            if first == 0:
                return found
            before = self.attempts[self._writer(first)]
            assert before.number < attempt.number, "a checkpoint was written before it was gone on from"
            attempt, last = before, first

    def _writer(self, step: int) -> int:
        return max(number for (known, _), number in self.writers.items() if known == step)

    def _committed(self) -> dict[int, int]:
        """Return the inodes of the checkpoints there are, by step."""
        checkpoints = Checkpoints(self.directory / "checkpoints")
        if not checkpoints.directory.is_dir():
            return {}
        return {step: checkpoints.path(step).stat().st_ino for step in checkpoints.steps()}

    def _look(self, now: Attempt) -> None:
        """Note what no attempt may do."""
        if now.hung:
            self.faults.append(f"hangs: {now.describe()}")
        if any("Traceback" in end.err for end in now.ends):
            self.faults.append(f"a traceback: {now.describe()}")
        if (self.directory / "checkpoints" / "quarantine").exists():
            self.faults.append(f"a damaged checkpoint: {now.describe()}")
        for rank in range(now.world):
            steps = [line["step"] for line in now.steps(rank)]
            if steps != list(range(now.began_at + 1, now.began_at + 1 + len(steps))):
                self.faults.append(f"rank {rank} took steps {steps}: {now.describe()}")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a file's lines of JSON; the last may not have been finished."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)


class Under:
    """An attempt under way, for those who harm it."""

    def __init__(self, run: Run, attempt: Attempt, job: Job):
        self.run, self.attempt, self.job = run, attempt, job

    def begun(self) -> bool:
        """Return whether all ranks have met: from then on each knows when another dies."""
        return all(self.run.journal(self.attempt, rank) for rank in range(self.attempt.world))

    def trains(self) -> bool:
        """Return whether all ranks have trained a step."""
        return all(self._has(rank, "step") for rank in range(self.attempt.world))

    def evaluates(self) -> bool:
        """Return whether a rank evaluates at this moment."""
        last = [self.run.journal(self.attempt, rank)[-1:] for rank in range(self.attempt.world)]
        return any("evaluates" in line for lines in last for line in lines)

    def codes(self) -> list[int]:
        """Return the exit codes of the ranks that have ended."""
        return [code for process in self.job.processes if (code := process.exitcode) is not None]

    def until(self, moment: float, condition: Callable[[], bool] | None = None) -> None:
        """Return ``moment`` seconds after the launch, and when ``condition`` holds; or when all ranks have ended."""
        if self.job.wait(max(0.0, self.attempt.launched + moment - time.monotonic())) or condition is None:
            return
        deadline = time.monotonic() + LIMIT
        while not condition() and not self.job.wait(PAUSE) and time.monotonic() < deadline:
            pass

    def _has(self, rank: int, key: str) -> bool:
        return any(key in line for line in self.run.journal(self.attempt, rank))
