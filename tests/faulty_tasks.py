"""A task whose rank FAULT_RANK does what no rank should, in its loss of step FAULT_STEP; and ranks that differ."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import distloop
from distloop.tasks.base import SupervisedObjective

DATA = TensorDataset(torch.arange(480.0).view(120, 4) / 480, torch.arange(120) % 2)
MARK = ".fault"  # its time of change is when it happened


def own_rank() -> int:
    return int(os.environ["RANK"])  # now, and not when this was imported


class Loss(nn.Module):
    """Cross entropy, and a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, guesses: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.calls += 1
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if self.calls == int(os.environ.get("FAULT_STEP", "5")) and attempt < int(
            os.environ.get("FAULT_ATTEMPTS", "9")
        ):
            if "PIDFILE" in os.environ:
                Path(f"{os.environ['PIDFILE']}.{own_rank()}").write_text(str(os.getpid()))
            if int(os.environ.get("FAULT_RANK", "-1")) == own_rank():
                Path(MARK).touch()
                self.fail(os.environ["FAULT"])
            elif os.environ.get("OTHERS") == "compute":
                time.sleep(60)
            elif os.environ.get("OTHERS") == "stop":
                self.fail("stop")
        first, count = int(os.environ.get("NAN_STEP", "0")), int(os.environ.get("NAN_STEPS", "0"))
        hurt = first <= self.calls < first + count and torch.is_grad_enabled() and own_rank() == 1
        return F.cross_entropy(guesses, targets) * (torch.nan if hurt else 1.0)

    def fail(self, kind: str) -> None:
        if kind == "sleep":
            time.sleep(60)
        elif kind == "hold":
            ctypes.PyDLL(None).sleep(60)  # without letting go of the GIL
        elif kind == "raise":
            raise ValueError("a bug in the task")
        elif kind == "leave":
            sys.exit(0)
        elif kind == "eat":
            torch.ones(2**28)  # a GiB
        elif kind == "vanish":
            os._exit(0)
        else:
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])


def model(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))


def Faulty() -> distloop.Supervised:
    return distloop.Supervised(model(), Loss(), DATA)


def Endless() -> distloop.Supervised:
    """Tell each rank's process id."""
    Path(f"{os.environ['PIDFILE']}.{own_rank()}").write_text(str(os.getpid()))
    return distloop.Supervised(model(), nn.CrossEntropyLoss(), DATA)


class Slow(TensorDataset):
    """Read sample by sample, so that worker processes are worth their while."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)


def WithWorkers() -> distloop.Supervised:
    return distloop.Supervised(model(), Loss(), Slow(*DATA.tensors))


def AnotherShape() -> distloop.Supervised:
    return distloop.Supervised(model(16 + own_rank()), nn.CrossEntropyLoss(), DATA)


class Two(distloop.Supervised):
    """Two learners of one batch."""

    def __init__(self, names: tuple[str, str], turns: Mapping[str, int] | None = None) -> None:
        super().__init__(model(), nn.CrossEntropyLoss(), DATA)
        self.objectives = {name: SupervisedObjective(model(), nn.CrossEntropyLoss()) for name in names}
        self.turns = dict(turns or {})


def AnotherOrder() -> Two:
    return Two(("critic", "actor") if own_rank() == 1 else ("actor", "critic"))


def AnotherTurn() -> Two:
    return Two(("actor", "critic"), {"critic": 2} if own_rank() == 1 else None)


class Replaces(nn.Linear):
    """Sets its gradient to None before the third backward, as a zero_grad() in the wrong place does."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 3 and own_rank() == 1:
            self.zero_grad()
        return super().forward(x)


def Replaced() -> distloop.Supervised:
    return distloop.Supervised(Replaces(4, 2), nn.CrossEntropyLoss(), DATA)
