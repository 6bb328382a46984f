"""Whole runs in this process, alone and on ranks that are threads: stopping, evaluating, keeping the best, logging."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import distloop
from distloop.agreement import Agreement, Signals, Stop
from distloop.build import Builder, make_place
from distloop.build.identity import identity
from distloop.errors import ConfigError, DataError, MismatchError, NonFiniteError, StorageError, WorldError
from distloop.monitor import lower_is_better
from distloop.settings import from_mapping, resolve
from distloop.transports import Alone, ThreadCluster, Transport
from distloop.world import World

NAMES = {"checkpoints", "config.yaml", "lock", "logs", "metrics.jsonl", "model.safetensors", "result.json", "run.json"}
QUIET = {"tensorboard": False, "picture": False, "every": 3}


def problem(n: int = 60) -> tuple[TensorDataset, TensorDataset]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n + 37, 4, generator=generator)
    labels = (inputs.sum(1) > 0).long()
    return TensorDataset(inputs[:n], labels[:n]), TensorDataset(inputs[n:], labels[n:])


def task(**changes: Any) -> distloop.Supervised:
    train, validation = problem()
    options: dict[str, Any] = {
        "model": nn.Linear(4, 2),
        "loss": nn.CrossEntropyLoss(),
        "train": train,
        "validation": validation,
        "metrics": {"accuracy": distloop.accuracy},
    }
    return distloop.Supervised(**(options | changes))


def sections(folder: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    base: dict[str, dict[str, Any]] = {
        "data": {"global_batch_size": 8},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "log": {"directory": str(folder), **QUIET},
        "strategy": {"name": "naive"},
        "train": {"epochs": 3},
    }
    for section, keys in changes.items():
        base[section] = base.get(section, {}) | keys
    return base


def fit(folder: Path, observers: Any = (), given: Any = None, **changes: dict[str, Any]) -> distloop.Result:
    torch.manual_seed(0)
    return distloop.fit(given or task(), observers=observers, **sections(folder, **changes))


def records(folder: Path, result: distloop.Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_in_its_directory(tmp_path: Path) -> None:
    result = fit(tmp_path)
    assert (result.steps, result.epochs, result.reason) == (3 * 8, 3, "all epochs done")
    names = {path.name for path in result.directory.iterdir()}
    assert names == NAMES
    rows = records(tmp_path, result)
    assert [r["step"] for r in rows if r["kind"] == "evaluate"] == [8, 16, 24]
    assert {r["step"] for r in rows if r["kind"] == "train"} == {1, 3, 6, 8, 11, 14, 16, 19, 22, 24}
    assert rows[0]["kind"] == "start" and rows[-1]["kind"] == "end"
    assert json.loads((result.directory / "result.json").read_text())["best"] == result.best
    again = fit(tmp_path)
    assert again.directory != result.directory, "a run never writes into another's directory"


def test_the_logged_loss_is_that_of_the_global_batches(tmp_path: Path) -> None:
    result = fit(tmp_path, train={"epochs": 2})
    logged = [(r["step"], r["loss"]) for r in records(tmp_path, result) if r["kind"] == "train"]
    torch.manual_seed(0)
    plain, (train, _) = task(), problem()
    model = plain.objectives["model"].model
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    from tests.parity import permutation

    for epoch in range(2):
        for chosen in permutation(0, epoch, 60).split(8):
            loss = nn.functional.cross_entropy(model(train.tensors[0][chosen]), train.tensors[1][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    begin = 0
    for step, loss in logged:
        assert loss == pytest.approx(sum(losses[begin:step]) / (step - begin), rel=1e-5)
        begin = step


def run_as_rank(transport: Transport, folder: Path, given: Any, observers: Any, changes: Any) -> tuple[Any, Any]:
    resolved = resolve(from_mapping(sections(folder, **changes)))
    world = World(transport.rank, transport.size, transport.rank, transport.size, "threads")
    own = given(transport.rank)
    place = make_place(resolved.config, world, transport, identity(resolved, own))
    session = Builder(resolved, own).session(place, observers(transport.rank))
    result = session.run()
    return result, {k: v.clone() for k, v in own.objectives["model"].model.state_dict().items()}


def run_in_threads(size: int, folder: Path, given: Any = None, observers: Any = None, **changes: Any) -> list[Any]:
    models = [task() for _ in range(size)]
    given = given or (lambda rank: models[rank])
    observers = observers or (lambda rank: ())
    return ThreadCluster(size, 20).run(lambda t: run_as_rank(t, folder, given, observers, changes))


def test_any_number_of_ranks_ends_with_the_same_model_and_metrics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = fit(tmp_path)
    expected = load_file(alone.directory / "model.safetensors")
    for size in (2, 3):
        torch.manual_seed(0)
        outcomes = run_in_threads(size, tmp_path)
        for result, state in outcomes:
            assert result.metrics == pytest.approx(alone.metrics, rel=1e-6)
            assert result.directory == outcomes[0][0].directory
            for key, value in expected.items():
                assert torch.allclose(state[key], value, rtol=1e-5, atol=1e-7)
        logs = outcomes[0][0].directory / "logs"
        assert {p.name for p in logs.iterdir()} == {f"rank_{rank}.log" for rank in range(size)}


@pytest.mark.parametrize(
    ("changes", "reason", "steps"),
    [
        ({"train": {"epochs": None, "max_steps": 5}}, "max_steps 5 reached", 5),
        ({"train": {"epochs": 1, "max_steps": 50}}, "all epochs done", 8),
        ({"train": {"epochs": None, "max_seconds": 0.3}}, "max_seconds reached", None),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_limits(tmp_path: Path, changes: Any, reason: str, steps: int | None, size: int) -> None:
    if size == 1:
        ends = [fit(tmp_path, **changes)]
    else:
        ends = [result for result, _ in run_in_threads(size, tmp_path, **changes)]
    assert {end.reason for end in ends} == {reason}
    assert len({end.steps for end in ends}) == 1, "all ranks stop at the same step"
    if steps is not None:
        assert ends[0].steps == steps


def test_evaluation_every_n_steps_and_once_at_the_end(tmp_path: Path) -> None:
    result = fit(tmp_path, evaluate={"every_steps": 5}, train={"epochs": None, "max_steps": 12})
    assert [r["step"] for r in records(tmp_path, result) if r["kind"] == "evaluate"] == [5, 10, 12]


class Worsens(distloop.Supervised):
    """Its metric is best at the second evaluation (the first call is the look at one batch before training)."""

    def evaluate(self, batch: Any) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return {"score": (float([0, 1, 3, 2, 2, 2, 2, 2, 2][self.calls - 1]), 1.0)}


def test_early_stopping_and_the_best_model_at_the_end(tmp_path: Path) -> None:
    train, validation = problem()
    given = Worsens(nn.Linear(4, 2), nn.CrossEntropyLoss(), train, validation)
    states: list[Any] = []

    def keep(record: distloop.Record) -> None:
        if record.kind == "evaluate":
            states.append(given.objectives["model"].model.weight.detach().clone())

    result = fit(tmp_path, [keep], given, monitor={"patience": 1}, train={"epochs": 8})
    assert result.reason == "no better score in 2 evaluations"
    assert (result.best, result.best_step, result.steps) == (3.0, 16, 32)
    assert (result.metrics, result.last_metrics) == ({"score": 3.0}, {"score": 2.0})
    assert torch.equal(given.objectives["model"].model.weight, states[1])
    assert torch.equal(load_file(result.directory / "model.safetensors")["weight"], states[1])


def test_without_keep_best_the_last_model_stays(tmp_path: Path) -> None:
    train, validation = problem()
    given = Worsens(nn.Linear(4, 2), nn.CrossEntropyLoss(), train, validation)
    result = fit(tmp_path, (), given, monitor={"keep_best": False})
    assert result.best_step == 16
    weight = given.objectives["model"].model.weight
    assert torch.equal(load_file(result.directory / "model.safetensors")["weight"], weight)


@pytest.mark.parametrize(
    ("name", "lower"),
    [("loss", True), ("mae", True), ("val/RMSE", True), ("word_error_rate", True), ("accuracy", False), ("f1", False)],
)
def test_what_is_better_is_told_from_the_name(name: str, lower: bool) -> None:
    assert lower_is_better(name) == lower


def test_a_runs_own_configuration_can_be_run_again(tmp_path: Path) -> None:
    from distloop.settings import from_file

    result = fit(tmp_path, schedule={"name": "cosine"})
    again = resolve(from_file(result.directory / "config.yaml"))
    Builder(again)
    assert (
        again.config
        == resolve(from_mapping(sections(tmp_path, schedule={"name": "cosine"}, task={"name": "Supervised"}))).config
    )


def test_a_growing_data_set_is_seen_to_grow(tmp_path: Path) -> None:
    class Growing(distloop.Supervised):
        def collect(self, epoch: int) -> Any:
            data = self.train
            data.tensors = tuple(torch.cat([t, t[:20]]) for t in data.tensors)
            return data

    train, validation = problem(20)
    result = fit(tmp_path, (), Growing(nn.Linear(4, 2), nn.CrossEntropyLoss(), train, validation))
    assert result.steps == 5 + 8 + 10, "40, 60 and 80 samples in batches of 8"


def test_data_sets_that_differ_by_rank_are_refused(tmp_path: Path) -> None:
    from torch.utils.data import Subset

    train, _ = problem()

    def given(rank: int) -> distloop.Supervised:
        return task(train=Subset(train, range(rank, 40 + rank)))

    with pytest.raises(MismatchError, match=r"ranks differ in the data set .*: contents is"):
        run_in_threads(2, tmp_path, given)


def test_an_epoch_without_batches_is_an_error(tmp_path: Path) -> None:
    class Exhausted:
        def extract(self, epoch: int, world: World) -> Any:
            return iter(())

    class Nothing(distloop.Supervised):
        def collect(self, epoch: int) -> Any:
            return Exhausted()

    train, validation = problem()
    with pytest.raises(DataError, match="epoch 0 had no batch"):
        fit(tmp_path, (), Nothing(nn.Linear(4, 2), nn.CrossEntropyLoss(), train, validation))


def test_parameters_with_gaps_in_memory_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    model.weight = nn.Parameter(torch.randn(2, 8)[:, :4])
    with pytest.raises(ConfigError, match=r"'weight' has gaps or overlaps in memory"):
        fit(tmp_path, (), task(model=model))


def test_reentrant_checkpoints_are_refused(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(checkpoint(self.first, x.clone().requires_grad_(), use_reentrant=True))

    for unused in ("refuse", "zeros"):
        with pytest.raises(ConfigError, match="use_reentrant=False"):
            fit(tmp_path, (), task(model=Hidden()), strategy={"unused_parameters": unused})


def test_buffers_that_share_memory_are_saved(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    table = torch.arange(6.0)
    model.register_buffer("table", table)
    model.register_buffer("head", table[:3])
    saved = load_file(fit(tmp_path, (), task(model=model)).directory / "model.safetensors")
    assert saved["head"].tolist() == [0, 1, 2] and saved["table"].tolist() == list(range(6))


def test_min_delta_and_mode(tmp_path: Path) -> None:
    train, validation = problem()
    given = Worsens(nn.Linear(4, 2), nn.CrossEntropyLoss(), train, validation)
    result = fit(tmp_path, (), given, monitor={"mode": "min"}, train={"epochs": 4})
    assert (result.best, result.best_step) == (1.0, 8)
    given = Worsens(nn.Linear(4, 2), nn.CrossEntropyLoss(), train, validation)
    result = fit(tmp_path, (), given, monitor={"min_delta": 5.0}, train={"epochs": 4})
    assert (result.best, result.best_step) == (1.0, 8)


def test_plateau_follows_the_watched_metric(tmp_path: Path) -> None:
    train, validation = problem()
    given = Worsens(nn.Linear(4, 2), nn.CrossEntropyLoss(), train, validation)
    result = fit(tmp_path, (), given, schedule={"name": "plateau", "patience": 0, "gamma": 0.5}, train={"epochs": 4})
    rates = {r["step"]: r["lr"] for r in records(tmp_path, result) if r["kind"] == "train"}
    assert [rates[step] for step in (8, 16, 24, 32)] == [0.1, 0.1, 0.1, 0.05]


def test_only_true_asks_for_a_stop(tmp_path: Path) -> None:
    assert (
        fit(tmp_path, [lambda record: "a file's write returns how many letters it wrote"]).reason == "all epochs done"
    )


def test_a_metric_is_looked_for_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metric 'acuracy' \(did you mean 'accuracy'\?\)"):
        fit(tmp_path, monitor={"metric": "acuracy"})
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_frozen_parameters_are_the_same_on_all_ranks_too(tmp_path: Path) -> None:
    def given(rank: int) -> distloop.Supervised:
        backbone = nn.Linear(4, 4)
        with torch.no_grad():
            backbone.weight.fill_(float(rank + 1))
        return task(model=nn.Sequential(backbone.requires_grad_(False), nn.Linear(4, 2)))

    models = [given(rank) for rank in range(2)]
    (_, one), (_, other) = run_in_threads(2, tmp_path, lambda rank: models[rank])
    assert (one["0.weight"] == 1.0).all()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_ranks_with_different_configurations_are_told_which_key(tmp_path: Path) -> None:
    def work(transport: Transport) -> Any:
        return run_as_rank(
            transport, tmp_path, lambda rank: task(), lambda rank: (), {"optimizer": {"lr": 0.1 * (transport.rank + 1)}}
        )

    with pytest.raises(WorldError, match=r"configuration optimizer\.lr is 0\.1 on rank 0 and 0\.2 on rank 1"):
        ThreadCluster(2, 20).run(work)


def test_modules_stay_in_the_mode_their_owner_chose(tmp_path: Path) -> None:
    frozen = nn.BatchNorm1d(4).eval()
    modes: list[tuple[bool, bool]] = []
    model = nn.Sequential(frozen, nn.Linear(4, 2))
    fit(tmp_path, [lambda record: modes.append((model.training, frozen.training))], task(model=model))
    assert set(modes) == {(True, False)}


def test_sync_batch_norm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SyncBatchNorm waits for every rank"):
        run_in_threads(2, tmp_path, lambda rank: task(model=nn.Sequential(nn.SyncBatchNorm(4), nn.Linear(4, 2))))


def test_a_loss_that_is_nan_under_fp16_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 5, learner 'model'"):
        fit(tmp_path, (), task(model=Breaks(5, float("nan"))), precision={"name": "fp16"})


def test_an_observer_may_ask_for_a_stop(tmp_path: Path) -> None:
    result = fit(tmp_path, [lambda record: record.kind == "train" and record.step == 6])
    assert (result.reason, result.steps) == ("an observer asked for it", 6)


def test_one_ranks_wish_stops_all_at_the_same_step(tmp_path: Path) -> None:
    def observers(rank: int) -> list[Any]:
        return [lambda record: record.kind == "train" and record.step == 6] if rank == 0 else []

    ends = run_in_threads(3, tmp_path, observers=observers, train={"epochs": None, "max_steps": 100_000})
    assert {result.reason for result, _ in ends} == {"an observer asked for it"}
    assert len({result.steps for result, _ in ends}) == 1
    assert ends[0][0].steps >= 6


class Breaks(nn.Module):
    """Its output is multiplied by ``value`` at the given call; a negative one makes what was right wrong."""

    def __init__(self, call: int, value: float):
        super().__init__()
        self.linear, self.call, self.value, self.calls = nn.Linear(4, 2), call, value, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.linear(x) * (self.value if self.calls == self.call else 1.0)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("value", "what"), [(float("nan"), "became nan"), (-1e7, "exploded")])
def test_a_broken_loss_stops_with_step_learner_and_rank(tmp_path: Path, size: int, value: float, what: str) -> None:
    def given(rank: int) -> distloop.Supervised:
        return task(model=Breaks(5 if rank == size - 1 else -1, value))

    with pytest.raises(NonFiniteError, match=f"{what}.* step 5, learner 'model'.* rank {size - 1}"):
        if size == 1:
            fit(tmp_path, (), given(0))
        else:
            run_in_threads(size, tmp_path, given)


def test_overflowed_steps_are_skipped_counted_and_do_not_advance_the_schedule(tmp_path: Path) -> None:
    rates: list[float] = []
    result = fit(
        tmp_path,
        [lambda record: rates.append(record.values["lr"]) if record.kind == "train" else None],
        precision={"name": "fp16", "loss_scale": 2.0**126},
        schedule={"name": "linear", "steps": 100},
        train={"epochs": None, "max_steps": 150},
        log={"every": 1},
    )
    rows = [r for r in records(tmp_path, result) if r["kind"] == "train"]
    assert result.skipped == rows[-1]["skipped"] > 0
    applied = 150 - result.skipped
    assert rates[-1] == pytest.approx(0.1 * (1 - (applied - 1) / 100), rel=1e-6)
    assert rows[-1]["loss_scale"] == 2.0 ** (126 - result.skipped)
    assert rows[-1]["loss"] < 0.5, "it learned nevertheless"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_what_full_precision_learns(tmp_path: Path, precision: str) -> None:
    full = fit(tmp_path, train={"epochs": 10})
    low = fit(tmp_path, train={"epochs": 10}, precision={"name": precision})
    assert low.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.02)
    assert low.metrics["loss"] != full.metrics["loss"], "it was another precision indeed"


def test_learning_rate_scaling_and_its_warm_up(tmp_path: Path) -> None:
    rates: list[float] = []
    fit(
        tmp_path,
        [lambda record: rates.append(record.values["lr"]) if record.kind == "train" else None],
        optimizer={"lr_scaling": "linear", "reference_batch_size": 2},
        schedule={"warmup_steps": 3},
        train={"epochs": None, "max_steps": 4},
        log={"every": 1},
    )
    assert rates == pytest.approx([0.2, 0.3, 0.4, 0.4]), "from 0.1 to 0.1 x 8 / 2 in a straight line"


def test_an_unwritable_directory_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        run_in_threads(2, tmp_path / "file")


def test_batch_norm_statistics_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    models = [task(model=model()) for _ in range(2)]
    (_, one), (_, other) = run_in_threads(2, tmp_path, lambda rank: models[rank])
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_agreement_is_reached_by_all_ranks_at_the_same_step() -> None:
    def work(transport: Transport) -> tuple[int, Stop]:
        agreement = Agreement(transport, every=0.0)
        for step in range(1, 1000):
            if transport.rank == 1 and step == 17:
                agreement.ask(Stop.TERMINATED)
            if transport.rank == 2 and step == 18:
                agreement.ask(Stop.ASKED)
            if stop := agreement():
                return step, stop
        return 0, Stop.NO

    ends = ThreadCluster(3).run(work)
    assert len(set(ends)) == 1
    assert ends[0][1] == Stop.TERMINATED
    assert 17 < ends[0][0] < 25


def test_signals_become_wishes_and_are_restored() -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    agreement = Agreement(Alone())
    with Signals(agreement):
        signal.raise_signal(signal.SIGINT)
        assert agreement() == Stop.INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminated_run_ends_with_its_code_and_its_model(tmp_path: Path) -> None:
    def terminate(record: distloop.Record) -> None:
        if record.kind == "train" and record.step == 6:
            signal.raise_signal(signal.SIGTERM)

    result = fit(tmp_path, [terminate])
    assert (result.exit_code, result.reason, result.steps) == (75, "terminated (SIGTERM)", 6)
    assert [path.name for path in (result.directory / "checkpoints").iterdir()] == ["step-00000006"]
    result = fit(tmp_path, [terminate], checkpoint={"enabled": False})
    assert (result.exit_code, result.reason, result.steps) == (143, "terminated (SIGTERM)", 6)
    assert not (result.directory / "checkpoints").exists()
    assert (result.directory / "model.safetensors").exists()


def test_a_rank_that_dies_when_all_are_done_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last thing that ranks do is to wait for each other; a thousand kills have hit it once."""
    from distloop.errors import RankDiedError

    def broken(self: Alone, *, failed: bool = False) -> None:
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:5550: Connection reset by peer. GLHF!")

    monkeypatch.setattr(Alone, "close", broken)
    with pytest.raises(RankDiedError, match="another rank has ended"):
        fit(tmp_path)
