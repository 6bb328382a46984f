"""A run that was stopped goes on exactly: on the same ranks to the bit, on others and with other strategies closely."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import distloop
from distloop.averages import MovingAverage
from distloop.build import Builder, Place
from distloop.checkpoints import Checkpoints, Disk, RunLock
from distloop.errors import BusyError, CheckpointError, ConfigError, DataError, NonFiniteError
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


def plain() -> Task:
    """Return a task without anything that depends on how batches are split."""
    torch.manual_seed(0)
    task = Task(plain=True, model=nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)))
    task.train = TensorDataset(task.train.x, task.train.y)  # type: ignore[assignment]
    return task


PAIRS = [
    ((2, "naive"), (3, "ring")),
    ((3, "zero_offload"), (2, "direct")),
    ((1, "naive"), (2, "zero_offload")),
    ((2, "ring"), (1, "naive")),
    ((2, "zero_offload"), (3, "zero_offload")),
    ((4, "direct"), (1, "zero_offload")),
]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_a_run_goes_on_on_other_ranks_and_with_another_strategy(tmp_path: Path, first: Any, second: Any) -> None:
    """Several times in one epoch; each sample once, and the same weights up to rounding."""
    seen: list[list[int]] = []

    def make() -> Task:
        task = plain()
        own: list[int] = []
        seen.append(own)
        inner = task.learned.guess

        def guess(batch: Any) -> Any:
            own.extend((batch[0][:, 0].double() * 1e6).long().tolist())
            return inner(batch)

        task.learned.guess = guess
        return task

    _, expected = run(1, tmp_path / "a", make=make)[0]
    everything = sorted(value for own in seen for value in own)
    seen.clear()
    for number, (size, strategy) in enumerate([first, second, first, second]):
        stop = None if number == 3 else 4 + 3 * number
        name = {"name": strategy}
        ends = run(size, tmp_path / "b", make=make, stop=stop, strategy=name, checkpoint={"resume": "auto"})
    result, found = ends[0]
    assert result.steps == 39
    assert sorted(value for own in seen for value in own) == everything, "each sample exactly once per epoch"
    for key, value in expected.items():
        assert torch.allclose(value, found[key], rtol=1e-5, atol=1e-6), key


def test_a_half_precision_model_goes_on_with_its_masters(tmp_path: Path) -> None:
    changes = {"strategy": {"name": "zero_offload"}, "precision": {"name": "bf16", "weights": "half"}}
    whole = run(2, tmp_path / "a", make=plain, **changes)
    parts: Any = None
    for stop in (5, 17, None):
        parts = run(2, tmp_path / "b", make=plain, stop=stop, **changes, checkpoint={"resume": "auto"})
    for key, value in whole[0][1].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, parts[0][1][key]), key


def test_delayed_updates_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    changes = {"strategy": {"name": "zero_offload", "delayed_update": True}}
    whole = run(2, tmp_path / "a", make=plain, **changes, evaluate={"every_epochs": None})
    for stop in (5, 17, None):
        parts = run(
            2,
            tmp_path / "b",
            make=plain,
            stop=stop,
            **changes,
            evaluate={"every_epochs": None},
            checkpoint={"resume": "auto"},
        )
    for key, value in whole[0][1].items():
        assert torch.equal(value, parts[0][1][key]), key


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("sgd", 0.1),
        ("rmsprop", 0.01),
        ("torch.optim:NAdam", 0.01),
        ("torch.optim:ASGD", 0.1),
        ("torch.optim:Adagrad", 0.1),
    ],
)
def test_every_optimizer_goes_on(tmp_path: Path, name: str, lr: float) -> None:
    own = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    changes = {"optimizer": {"name": name, "lr": lr, **own}}
    (_, expected), *_ = run(2, tmp_path / "a", make=plain, **changes)
    for stop in (5, 17, None):
        (_, found), *_ = run(2, tmp_path / "b", make=plain, stop=stop, **changes, checkpoint={"resume": "auto"})
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_channels_last_goes_on_in_cuts_and_whole(tmp_path: Path) -> None:
    def make() -> Task:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Unflatten(1, (2, 3, 1)), nn.Conv2d(2, 8, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        )
        model(torch.zeros(1, 6))
        task = Task(plain=True, model=model.to(memory_format=torch.channels_last))
        task.train = TensorDataset(task.train.x, task.train.y)  # type: ignore[assignment]
        return task

    (_, expected), *_ = run(1, tmp_path / "a", make=make)
    for number, size in enumerate((3, 1, 2)):
        stop = None if number == 2 else 6 + 10 * number
        name = "zero_offload" if number != 1 else "naive"
        (_, found), *_ = run(
            size, tmp_path / "b", make=make, stop=stop, strategy={"name": name}, checkpoint={"resume": "auto"}
        )
    for key, value in expected.items():
        assert torch.allclose(value, found[key], rtol=1e-5, atol=1e-6), key


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, expected), *_ = run(2, tmp_path / "a", make=plain)
    run(2, tmp_path / "b", make=plain, stop=20, checkpoint={"every_steps": 6, "keep_last": 5})
    kept = checkpoints(tmp_path / "b")
    assert len(kept) > 2
    file = tmp_path / "b" / "run" / "checkpoints" / kept[-1] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    (_, found), *_ = run(2, tmp_path / "b", make=plain, checkpoint={"resume": "auto"})
    told = " ".join(capsys.readouterr().out.split())
    assert f"damaged, set aside: {file}: its content has changed" in told
    assert f"from step {int(kept[-2].removeprefix('step-'))}, of 2 ranks with naive" in told
    assert (tmp_path / "b" / "run" / "checkpoints" / "quarantine" / kept[-1]).is_dir()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    run(1, tmp_path, make=plain, stop=5)
    (tmp_path / "run" / "checkpoints" / "step-00000005" / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is valid.*COMMIT: is missing") as failure:
        run(1, tmp_path, make=plain, checkpoint={"resume": "auto"})
    assert failure.value.exit_code == 20
    assert checkpoints(tmp_path) == ["step-00000005"], "nothing is moved"


def test_auto_begins_where_there_is_nothing_yet(tmp_path: Path) -> None:
    (result, _), *_ = run(1, tmp_path, make=plain, checkpoint={"resume": "auto"})
    assert (result.steps, result.directory) == (39, tmp_path / "run")
    (again, _), *_ = run(1, tmp_path, make=plain, checkpoint={"resume": "auto"})
    assert (again.steps, again.reason, again.directory) == (39, "all epochs done", tmp_path / "run")
    (longer, _), *_ = run(1, tmp_path, make=plain, checkpoint={"resume": "auto"}, train={"epochs": 4})
    assert (longer.steps, longer.exit_code) == (52, 0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"global_batch_size": 4}}, r"data\.global_batch_size: was 8 and is 4"),
        ({"optimizer": {"name": "sgd", "weight_decay": 0.1}}, r'optimizer\.name: was "adamw" and is "sgd"'),
        ({"train": {"seed": 3}}, r"train\.seed: was 0 and is 3"),
    ],
)
def test_what_a_checkpoint_depends_on_may_not_change(tmp_path: Path, changes: Any, sentence: str) -> None:
    run(1, tmp_path, make=plain, stop=5)
    with pytest.raises(ConfigError, match=sentence):
        run(1, tmp_path, make=plain, **changes, checkpoint={"resume": "auto"})


def test_what_may_change_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(2, tmp_path, make=plain, stop=5)
    capsys.readouterr()
    changes = {"optimizer": {"lr": 0.5}, "strategy": {"name": "ring"}}
    run(3, tmp_path, make=plain, **changes, checkpoint={"resume": "auto"})
    told = " ".join(capsys.readouterr().out.split())
    assert "optimizer.lr was 0.01, is 0.5 (the new value counts)" in told
    assert 'strategy.name was "naive", is "ring" (how it is computed)' in told
    assert "from step" in told and "of 2 ranks with naive" in told


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), "the model has changed"),
        (lambda: nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 3)), r"shape \(16, 6\) there and \(17, 6\)"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, model: Any, sentence: str) -> None:
    run(1, tmp_path, make=plain, stop=5)

    def make() -> Task:
        task = plain()
        task.learned.model = model()
        return task

    with pytest.raises(ConfigError, match=sentence):
        run(1, tmp_path, make=make, checkpoint={"resume": "auto"})


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    run(1, tmp_path, make=plain, stop=5)

    def make() -> Task:
        task = plain()
        task.train = TensorDataset(*(t[:90] for t in task.train.tensors))  # type: ignore[attr-defined, assignment]
        return task

    with pytest.raises(DataError, match="number of samples was 102 and is 90") as failure:
        run(1, tmp_path, make=make, checkpoint={"resume": "auto"})
    assert failure.value.exit_code == 4


def test_two_jobs_do_not_share_a_directory(tmp_path: Path) -> None:
    run(1, tmp_path, make=plain, stop=5)
    with RunLock(tmp_path / "run"), pytest.raises(BusyError, match="another job works here: process") as failure:
        run(2, tmp_path, make=plain, checkpoint={"resume": "auto"})
    assert failure.value.exit_code == 22
    run(2, tmp_path, make=plain, checkpoint={"resume": "auto"})


def test_the_best_model_and_the_patience_come_back(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "monitor": {"keep_best": True, "patience": 4, "min_delta": 0.0},
        "evaluate": {"every_steps": 3},
        "optimizer": {"name": "sgd", "lr": 1.5},
        "train": {"epochs": 20},
    }
    (expected, model), *_ = run(1, tmp_path / "a", make=plain, **changes)
    assert expected.reason.startswith("no better loss") and expected.best_step
    stops = [expected.best_step + 1, expected.best_step + 7]
    for stop in (*stops, None):
        (result, found), *_ = run(
            1, tmp_path / "b", make=plain, stop=stop, **changes, checkpoint={"resume": "auto", "every_steps": 2}
        )
    assert (result.best, result.best_step, result.steps) == (expected.best, expected.best_step, expected.steps)
    for key, value in model.items():
        assert torch.equal(value, found[key]), key
    saved = load_file(tmp_path / "b" / "run" / "model.safetensors")
    assert torch.equal(saved["0.weight"], load_file(tmp_path / "a" / "run" / "model.safetensors")["0.weight"])
    assert not list((tmp_path / "b" / "run").glob(".best*")), "nothing is left over"


def test_what_a_killed_attempt_has_left_is_removed(tmp_path: Path) -> None:
    run(1, tmp_path, make=plain, stop=5)
    left = [".best-00000004-model.safetensors", ".probe-1234abcd", ".model.safetensors.partial"]
    for name in left:
        (tmp_path / "run" / name).write_bytes(b"")
    run(1, tmp_path, make=plain, checkpoint={"resume": "auto"})
    assert not [name for name in left if (tmp_path / "run" / name).exists()]


def test_a_checkpoint_of_choice(tmp_path: Path) -> None:
    (_, expected), *_ = run(1, tmp_path / "a", make=plain)
    run(1, tmp_path / "b", make=plain, checkpoint={"every_steps": 6, "keep_last": 9})
    chosen = tmp_path / "b" / "run" / "checkpoints" / "step-00000012"
    (result, found), *_ = run(1, tmp_path / "b", make=plain, checkpoint={"resume": str(chosen)})
    assert (result.steps, result.directory) == (39, tmp_path / "b" / "run")
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    assert logged(tmp_path / "b") == logged(tmp_path / "a")


def test_a_model_file_is_what_any_tool_reads(tmp_path: Path) -> None:
    run(2, tmp_path, make=plain, stop=5)
    model = plain().learned.model
    model.load_state_dict(load_file(tmp_path / "run" / "checkpoints" / checkpoints(tmp_path)[-1] / "model.safetensors"))


def test_retention(tmp_path: Path) -> None:
    run(1, tmp_path, make=plain, checkpoint={"every_steps": 2, "keep_last": 2, "keep_every": 10, "background": False})
    assert checkpoints(tmp_path) == [f"step-{step:08}" for step in (10, 20, 30, 38, 39)]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, full = Disk.put, {"from": 12, "to": 20}

    def refuse(self: Disk, descriptor: int, data: memoryview) -> None:
        step = int(Path(f"/proc/self/fd/{descriptor}").readlink().parent.name.split("-")[1])
        if full["from"] <= step < full["to"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, descriptor, data)

    monkeypatch.setattr(Disk, "put", refuse)
    options = {"every_steps": 6, "background": False}
    (result, _), *_ = run(1, tmp_path / "a", make=plain, checkpoint=options)
    assert (result.exit_code, result.steps) == (0, 39)
    told = capsys.readouterr().err
    assert "checkpoint of step 12: " in told and "No space left on device" in told
    assert checkpoints(tmp_path / "a") == [f"step-{step:08}" for step in (30, 36, 39)]
    full["to"] = 100
    (result, _), *_ = run(1, tmp_path / "b", make=plain, checkpoint=options)
    assert (result.exit_code, result.reason) == (21, "checkpoints cannot be written")
    assert checkpoints(tmp_path / "b") == ["step-00000006"], "the last good one stays, and no rubbish"


def test_a_model_that_is_not_finite_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last update broke it, and no loss has told yet."""

    def make() -> Task:
        task = plain()
        calls = [0]
        task.learned.updated = lambda: (
            calls.__setitem__(0, calls[0] + 1)
            or (task.learned.model[0].bias.data.fill_(float("nan")) if calls[0] == 12 else None)
        )
        return task

    with pytest.raises(NonFiniteError, match="the loss became nan at step 13"):
        run(1, tmp_path, make=make, checkpoint={"every_steps": 4, "background": False})
    assert checkpoints(tmp_path) == ["step-00000004", "step-00000008"]
    assert "checkpoint of step 12: 0.bias has values that are NaN or infinite" in capsys.readouterr().err


# -- what a review found ----------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """With a mask of minus infinity, as attention has it, and a parameter that is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def masked() -> Task:
    task = plain()
    torch.manual_seed(0)
    task.learned.model = Masked()
    return task


@pytest.mark.parametrize("strategy", ["naive", "zero_offload"])
def test_masks_of_infinity_and_single_numbers_go_on(tmp_path: Path, strategy: str) -> None:
    changes = {"strategy": {"name": strategy}}
    (_, expected), *_ = run(2, tmp_path / "a", make=masked, **changes)
    for stop in (5, 17, None):
        (result, found), *_ = run(2, tmp_path / "b", make=masked, stop=stop, **changes, checkpoint={"resume": "auto"})
    assert result.exit_code == 0
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_a_delayed_update_is_not_lost_without_delay(tmp_path: Path) -> None:
    run(1, tmp_path, make=plain, stop=5, strategy={"name": "zero_offload", "delayed_update": True})
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert checkpoint is not None
    master = checkpoint.read("optimizer/model/0.weight/master")
    assert not torch.equal(checkpoint.read("0.weight"), master), "the model is one update behind"
    seen: list[Tensor] = []

    def make() -> Task:
        task = plain()
        inner = task.learned.guess
        task.learned.guess = lambda batch: seen.append(task.learned.model[0].weight.detach().clone()) or inner(batch)
        return task

    run(1, tmp_path, make=make, checkpoint={"resume": "auto"})
    assert torch.equal(seen[0], master)


def test_a_best_model_that_was_not_kept_is_not_returned_to(tmp_path: Path) -> None:
    evaluate = {"evaluate": {"every_steps": 3}}
    run(1, tmp_path, make=plain, stop=11, **evaluate, monitor={"keep_best": False})
    changes = {"monitor": {"keep_best": True}, "checkpoint": {"resume": "auto", "every_steps": 1}}
    (result, _), *_ = run(1, tmp_path, make=plain, **evaluate, **changes)
    assert result.exit_code == 0 and result.best_step is not None and result.best_step > 11


def test_a_run_that_has_ended_without_checkpoints_is_not_written_over(tmp_path: Path) -> None:
    run(1, tmp_path, make=plain, checkpoint={"enabled": False})
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="this run has ended, and has no checkpoint"):
        run(1, tmp_path, make=plain, checkpoint={"resume": "auto"})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_lock_is_let_go_of_when_building_fails(tmp_path: Path) -> None:
    def unfit() -> Any:
        task = plain()
        task.state = lambda: {}  # type: ignore[attr-defined]
        return task

    with pytest.raises(ConfigError, match="come together"):
        run(1, tmp_path, make=unfit)

    def fit() -> Any:
        task = plain()
        task.state = "idle"  # type: ignore[attr-defined]  # a word of the user's own
        return task

    run(1, tmp_path, make=fit, checkpoint={"resume": "auto"})


@pytest.mark.parametrize(
    ("shape", "sentence"), [((1,), None), ((4,), r"'kept' has shape \(1,\) there and \(4,\) here"), (None, None)]
)
def test_buffers_are_compared_too(tmp_path: Path, shape: Any, sentence: str | None) -> None:
    def make(size: Any) -> Any:
        task = plain()
        if size is not None:
            task.learned.model.register_buffer("kept", torch.ones(size))
        return task

    run(1, tmp_path, make=lambda: make((1,)), stop=5)
    if sentence is None or shape is None:
        run(1, tmp_path, make=lambda: make(shape), checkpoint={"resume": "auto"})
    else:
        with pytest.raises(ConfigError, match=sentence):
            run(1, tmp_path, make=lambda: make(shape), checkpoint={"resume": "auto"})


class Grouped(torch.optim.SGD):
    """Remembers something of all its parameters at once, as learning rates that find themselves do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0.0) + 1.0
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"] / group["seen"])


def test_what_an_optimizer_remembers_of_all_goes_on(tmp_path: Path) -> None:
    changes = {"optimizer": {"name": "tests.test_resume:Grouped", "lr": 0.3, "weight_decay": 0.0}}
    (_, expected), *_ = run(2, tmp_path / "a", make=plain, **changes)
    for stop in (5, 17, None):
        (_, found), *_ = run(2, tmp_path / "b", make=plain, stop=stop, **changes, checkpoint={"resume": "auto"})
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_an_extract_of_the_users_own_goes_on(tmp_path: Path) -> None:
    from distloop.data import MicroBatch, Minibatch, Position

    class Own:
        def __init__(self, data: Any):
            self.data = data

        def extract(self, epoch: int, world: World) -> Any:
            parts = torch.randperm(40).split(8)
            for i, part in enumerate(parts):
                batch = tuple(t[part] for t in self.data.tensors)
                yield Minibatch(Position(i, 8, i == 4), [MicroBatch(batch, 1.0, True)])

    def make() -> Task:
        task = plain()
        task.learned.model.append(nn.Dropout(0.1))
        data = Own(task.train)
        task.collect = lambda epoch: data  # type: ignore[method-assign]
        return task

    steps = {"schedule": {"name": "constant"}}
    (_, expected), *_ = run(1, tmp_path / "a", make=make, **steps)
    for stop in (2, 8, None):
        (_, found), *_ = run(1, tmp_path / "b", make=make, stop=stop, **steps, checkpoint={"resume": "auto"})
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_a_state_is_packed_as_it_is_or_refused() -> None:
    from distloop.own_state import pack, unpack

    state = {"tensor": torch.ones(3), "deep": [{"tensor": 1}, torch.arange(2), None, "text", 2.5, True]}
    packed, tensors = pack("own", state)
    by_name = {stored.name: stored.tensor for stored in tensors}
    back = unpack(packed, by_name.__getitem__)
    assert torch.equal(back["tensor"], torch.ones(3)) and back["deep"][0] == {"tensor": 1}
    for bad in ({1: 2}, {"a/b": 1}, {"a": object()}, {"$tensor": 1}):
        with pytest.raises(ConfigError, match="own"):
            pack("own", bad)
