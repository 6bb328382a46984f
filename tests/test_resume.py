"""A run that was stopped goes on exactly: on the same ranks to the bit, on others and with other strategies closely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import distloop
from distloop.averages import MovingAverage
from distloop.build import Builder, Place
from distloop.settings import from_mapping, resolve
from distloop.transports import Alone, ThreadCluster, Transport
from distloop.world import World

CPU = torch.device("cpu")


class Net(nn.Module):
    """Dropout, batch statistics, and a buffer that its file leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.body(x)


class Augmented(Dataset[Any]):
    """Draws when it is read."""

    def __init__(self, n: int):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long() + (self.x[:, 0] > 1).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]


class Averaged:
    """A classifier with a moving average, on which it is evaluated too."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.average = MovingAverage(model, 0.9)

    def guess(self, batch: Any) -> Any:
        return self.model(batch[0])

    def targets(self, batch: Any) -> Any:
        return batch[1]

    def loss(self, guesses: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(guesses, targets)

    def updated(self) -> None:
        self.average.update(self.model)


class Task:
    """Supervised, with everything that a checkpoint must not forget."""

    def __init__(self, *, plain: bool = False, model: nn.Module | None = None):
        torch.manual_seed(0)
        self.learned: Any = Averaged(model or Net())
        if plain:
            self.learned = distloop.Supervised(model or Net(), nn.functional.cross_entropy, None).objectives["model"]
        self.objectives = {"model": self.learned}
        self.train = Augmented(102)
        self.validation = TensorDataset(self.train.x[:40], self.train.y[:40])

    def collect(self, epoch: int) -> Any:
        return self.train

    def evaluate(self, batch: Any) -> Any:
        loss = nn.functional.cross_entropy(self.learned.model(batch[0]), batch[1])
        return {"loss": (loss * len(batch[0]), float(len(batch[0])))}


def sections(folder: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    base: dict[str, dict[str, Any]] = {
        "data": {"global_batch_size": 8},
        "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
        "schedule": {"name": "cosine", "warmup_steps": 5},
        "gradients": {"clip_norm": 1.0},
        "log": {"directory": str(folder), "name": "run", "every": 3, "tensorboard": False, "picture": False},
        "strategy": {"name": "naive"},
        "train": {"epochs": 3},
        "monitor": {"keep_best": False},
    }
    for section, keys in changes.items():
        base[section] = base.get(section, {}) | keys
    return base


def rank(transport: Transport, folder: Path, make: Any, stop: int | None, changes: Any) -> tuple[Any, Any]:
    """Be one rank of a run that is terminated after step ``stop``; return its result and what it has learned."""
    resolved = resolve(from_mapping(sections(folder, **changes)))
    world = World(transport.rank, transport.size, transport.rank, transport.size, "threads")
    task = make()
    session = Builder(resolved, task).session(Place(world, transport, CPU))
    if stop is not None:
        from distloop.agreement import Stop

        session._agreement._every = 0.0  # ranks learn of a wish a step or two later, and not by the clock
        inner = session._after_batch

        def after(update: Any) -> Any:
            if session.step + 1 == stop:
                session._agreement.ask(Stop.TERMINATED)
            return inner(update)

        session._after_batch = after  # type: ignore[method-assign]
    result = session.run()
    return result, {
        f"{name}.{key}": value.clone()
        for name, objective in task.objectives.items()
        for key, value in objective.model.state_dict().items()
    }


def run(
    size: int, folder: Path, *, make: Any = Task, stop: int | None = None, **changes: Any
) -> list[tuple[Any, dict[str, Tensor]]]:
    if size == 1:
        return [rank(Alone(), folder, make, stop, changes)]
    return ThreadCluster(size, 20, ordered=True).run(lambda t: rank(t, folder, make, stop, changes))


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    own = {"time", "samples_per_second", "idle"}
    return [{k: v for k, v in row.items() if k not in own} for row in rows if row["kind"] in ("train", "evaluate")]


def interrupted(size: int, folder: Path, stops: list[int], **changes: Any) -> list[tuple[Any, dict[str, Tensor]]]:
    """Run, stopped after each of these steps and gone on with; return how the last attempt ended."""
    for number, stop in enumerate([*stops, None]):
        ends = run(size, folder, stop=stop, **changes, checkpoint={"resume": "auto"})
        if stop is not None:
            assert {result.exit_code for result, _ in ends} == {75}, number
            assert len({result.steps for result, _ in ends}) == 1
    return ends


@pytest.mark.parametrize("strategy", ["naive", "ring", "direct", "zero_offload"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, strategy: str, size: int) -> None:
    changes = {"strategy": {"name": strategy}}
    whole = run(size, tmp_path / "a", **changes)
    parts = interrupted(size, tmp_path / "b", [4, 13, 20, 33], **changes)
    for (_, expected), (result, found) in zip(whole, parts, strict=True):
        assert result.steps == 39 and result.exit_code == 0
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key
    assert logged(tmp_path / "b") == logged(tmp_path / "a")
