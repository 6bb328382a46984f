"""What users write, right and wrong; the command line tests name these tasks."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import distloop
from distloop.tasks.base import SupervisedObjective

RANK = next((int(os.environ[n]) for n in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK") if n in os.environ), 0)
DATA = TensorDataset(torch.arange(80.0).view(20, 4) / 80, torch.arange(20) % 2)


def with_model(model: nn.Module) -> distloop.Supervised:
    return distloop.Supervised(model, nn.CrossEntropyLoss(), DATA, DATA)


def with_loss(loss: Any) -> distloop.Supervised:
    return distloop.Supervised(nn.Linear(4, 2), loss, DATA)


def with_data(data: Any) -> distloop.Supervised:
    return distloop.Supervised(nn.Linear(4, 2), nn.CrossEntropyLoss(), data)


class Scaled(nn.Linear):
    def __init__(self, size: int = 2):
        super().__init__(4, size)


def Fine(size: int = 2) -> distloop.Supervised:
    return with_model(Scaled(size))


def VectorLoss() -> distloop.Supervised:
    return with_loss(nn.CrossEntropyLoss(reduction="none"))


def FloatLoss() -> distloop.Supervised:
    return with_loss(lambda guesses, targets: 1.0)


def DetachedLoss() -> distloop.Supervised:
    return with_loss(lambda guesses, targets: F.cross_entropy(guesses.detach(), targets))


def NaNOnTheLastRank() -> distloop.Supervised:
    factor = float("nan") if int(os.environ.get("WORLD_SIZE", "1")) - 1 == RANK else 1.0
    return with_loss(lambda guesses, targets: F.cross_entropy(guesses, targets) * factor)


def Frozen() -> distloop.Supervised:
    return with_model(nn.Linear(4, 2).requires_grad_(False))


class Spare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def Unused() -> distloop.Supervised:
    return with_model(Spare())


class SometimesSpare(Spare):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x) + (self.spare(x) if RANK == 0 else 0)


def UnusedOnOneRank() -> distloop.Supervised:
    return with_model(SometimesSpare())


class Counting(Spare):
    """Its loss reaches the spare layer in some calls."""

    def __init__(self, reached: Any):
        super().__init__()
        self.reached, self.calls = reached, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.used(x) + (self.spare(x) if self.reached(self.calls) else 0)


def UnusedLast() -> distloop.Supervised:
    """With two micro-batches per step, the first reaches every parameter, and the second does not."""
    return distloop.Supervised(Counting(lambda calls: calls % 2 == 1), nn.CrossEntropyLoss(), DATA)


def UnusedLater() -> distloop.Supervised:
    return distloop.Supervised(Counting(lambda calls: calls < 3 or RANK == 0), nn.CrossEntropyLoss(), DATA)


def DetachedOnTheLastRank() -> distloop.Supervised:
    return DetachedLoss() if RANK else with_loss(nn.CrossEntropyLoss())


def OtherLength() -> distloop.Supervised:
    n = 20 + RANK
    return with_data(TensorDataset(torch.zeros(n, 4), torch.zeros(n).long()))


def ValidationOnOneRank() -> distloop.Supervised:
    return with_data(DATA) if RANK else Fine()


def NoValidation() -> distloop.Supervised:
    return with_data(DATA)


def OtherModelOnOneRank() -> distloop.Supervised:
    return with_model(nn.Linear(4, 2 + RANK))


def Empty() -> distloop.Supervised:
    return with_data(TensorDataset(torch.zeros(0, 4)))


def NoLength() -> distloop.Supervised:
    return with_data(iter(()))


class Corrupt(Dataset[Any]):
    def __init__(self, rank: int):
        self.rank = rank

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index == 7 and RANK in (self.rank, 0):
            raise OSError("truncated image")
        return torch.zeros(4), 1


def CorruptSample() -> distloop.Supervised:
    return with_data(Corrupt(0))


class Bug(nn.Linear):
    """A mistake of the user's on the last rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if RANK == 1:
            raise KeyError("the user's own bug")
        return super().forward(x)


def BugOnOneRank() -> distloop.Supervised:
    return with_model(Bug(4, 2))


class Dies(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def KilledRank() -> distloop.Supervised:
    return with_model(Dies(4, 2))


class Sleeps(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if RANK == 1:
            time.sleep(60)
        return super().forward(x)


def SilentRank() -> distloop.Supervised:
    return with_model(Sleeps(4, 2))


class SharedBody(distloop.Supervised):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 2), nn.CrossEntropyLoss(), DATA)
        body, loss = nn.Linear(4, 4), nn.CrossEntropyLoss()
        models = {name: nn.Sequential(body, nn.Linear(4, 2)) for name in ("actor", "critic")}
        self.objectives = {name: SupervisedObjective(model, loss) for name, model in models.items()}


class Collecting(distloop.Supervised):
    def __init__(self, collected: Any):
        super().__init__(nn.Linear(4, 2), nn.CrossEntropyLoss(), DATA)
        self.collected = collected

    def collect(self, epoch: int) -> Any:
        return self.collected


def NothingCollected() -> Collecting:
    return Collecting(distloop.PerRank(None))


def PerRankOnOneRank() -> Collecting:
    return Collecting(distloop.PerRank(DATA) if RANK else DATA)


class NoCollect:
    objectives: dict[str, Any] = {}  # noqa: RUF012


class NoObjectives:
    def collect(self, epoch: int) -> Any:
        return DATA


class HalfObjective:
    model = nn.Linear(4, 2)

    def guess(self, batch: Any) -> Any:
        return self.model(batch[0])


class LacksALoss(NoObjectives):
    objectives = {"half": HalfObjective()}  # noqa: RUF012


class Raises(NoObjectives):
    def __init__(self) -> None:
        raise ValueError("the user's own reason")


class BadMetric(distloop.Supervised):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 2), nn.CrossEntropyLoss(), DATA, DATA)

    def evaluate(self, batch: Any) -> Any:
        return {"accuracy": 0.5}


records: list[distloop.Record] = []


def observer(record: distloop.Record) -> None:
    print(f"user observer: {record.kind}")
