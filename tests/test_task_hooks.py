"""What a task may add to a run: a summary, a report, pictures, a target, several learners, samples of a rank's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import distloop
from distloop.averages import MovingAverage
from distloop.build import Builder, Place
from distloop.build.models import moving_averages
from distloop.errors import ConfigError, DataError, MismatchError
from distloop.objective import held_modules
from distloop.settings import from_mapping, resolve
from distloop.tasks.base import SupervisedObjective
from distloop.transports import Transport
from distloop.uneven import PerRank
from distloop.world import World
from tests.ranks import in_threads

DATA = TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 2)


class Task(distloop.Supervised):
    """Logistic regression with whatever attributes a test adds."""

    def __init__(self, **extra: Any):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 2), nn.CrossEntropyLoss(), DATA, DATA)
        for name, value in extra.items():
            setattr(self, name, value)


def sections(folder: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    base: dict[str, dict[str, Any]] = {
        "data": {"global_batch_size": 8},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "log": {"directory": str(folder), "tensorboard": False, "picture": False, "every": 1},
        "strategy": {"name": "naive"},
        "train": {"epochs": 2},
    }
    return {section: base.get(section, {}) | changes.get(section, {}) for section in {**base, **changes}}


def fit(folder: Path, task: Any, **changes: dict[str, Any]) -> distloop.Result:
    return distloop.fit(task, **sections(folder, **changes))


def told(result: distloop.Result, kind: str) -> list[dict[str, Any]]:
    records = map(json.loads, (result.directory / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_a_summary_is_made_of_the_means_of_all_samples(tmp_path: Path) -> None:
    given: list[dict[str, float]] = []

    def summarise(metrics: dict[str, float]) -> dict[str, float]:
        given.append(metrics)
        return {"perplexity": math.exp(metrics["loss"])}

    result = fit(tmp_path, Task(summarise=summarise), evaluate={"batch_size": 5}, monitor={"metric": "perplexity"})
    assert set(result.metrics) == {"perplexity"}
    assert result.metrics["perplexity"] == min(math.exp(metrics["loss"]) for metrics in given[1:])
    assert given[0] != given[1], "the first is of one batch, to know the names"


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        (lambda metrics: [1.0], r"summarise\(metrics\) returned a list; it must be a mapping"),
        (lambda metrics: {"a": "b"}, r"metric 'a' must be a number, not a str"),
    ],
)
def test_summaries_that_are_none(tmp_path: Path, summary: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, Task(summarise=summary))


def test_a_target_ends_the_run_as_soon_as_it_is_reached(tmp_path: Path) -> None:
    class Improves(Task):
        calls = -1

        def evaluate(self, batch: Any) -> Any:
            self.calls += 1
            return {"return": (float(self.calls), 1.0), "loss": (-float(self.calls), 1.0)}

    result = fit(tmp_path, Improves(), train={"epochs": 9}, monitor={"target": 3.0, "metric": "return"})
    assert (result.metrics["return"], result.epochs) == (3.0, 3)
    assert result.reason == "return reached monitor.target, which is 3"
    lower = fit(tmp_path, Improves(), train={"epochs": 9}, monitor={"target": -4.0, "metric": "loss"})
    assert lower.epochs == 4, "where lower is better, the target is reached from above"
    slowly = fit(tmp_path, Improves(), monitor={"target": 2.0, "metric": "return", "min_delta": 5.0})
    assert slowly.reason.startswith("return reached") and slowly.metrics["return"] == 2.0, (
        "however small the steps to it"
    )
    with pytest.raises(ConfigError, match=r"monitor.target: of which metric\?"):
        fit(tmp_path, Improves(), monitor={"target": 3.0})
    with pytest.raises(ConfigError, match=r"monitor.target: needs validation data"):
        fit(tmp_path, Task(validation=None), monitor={"target": 3.0})


# -- reports and pictures --------------------------------------------------------------------------------------------


def as_rank(transport: Transport, folder: Path, task: Any, changes: dict[str, dict[str, Any]]) -> distloop.Result:
    resolved = resolve(from_mapping(sections(folder, **changes)))
    world = World(transport.rank, transport.size, transport.rank, transport.size, "test")
    return Builder(resolved, task(transport.rank)).session(Place(world, transport, torch.device("cpu"))).run()


def test_a_report_is_added_up_over_ranks(tmp_path: Path) -> None:
    def reporting(rank: int) -> Task:
        pairs = [{"length": (6.0, 2.0)}, {"length": (30.0, 1.0), "seldom": (5.0, 1.0), "never": (0.0, 0.0)}]
        pairs = [pair | {"steps": 7} for pair in pairs]
        return Task(report=lambda: pairs[rank])

    (result, _) = in_threads(2, as_rank, tmp_path, reporting, {"log": {"name": "r"}})
    for record in told(result, "train"):
        assert (record["length"], record["seldom"], record["steps"]) == (12.0, 5.0, 14.0)
        assert "never" not in record


@pytest.mark.parametrize("answer", [[1.0], {"a": "b"}, {"a": (1.0, "x")}])
def test_reports_that_are_none(tmp_path: Path, answer: Any) -> None:
    with pytest.raises(ConfigError, match=r"report\(\)"):
        fit(tmp_path, Task(report=lambda: answer))


def test_pictures_leave_no_trace_in_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    seen: list[tuple[bool, bool]] = []

    def drawing(task: Task) -> None:
        def draw(figure: Any) -> None:
            model = task.objectives["model"].model
            torch.rand(100)
            seen.append((model.training, torch.is_grad_enabled()))
            figure.subplots().plot(model.weight.flatten().tolist())

        task.pictures = lambda: {"weights": draw}  # type: ignore[attr-defined]

    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.rand_like(x))

    results = []
    for drawn in (True, False):
        torch.manual_seed(0)
        task = Task()
        task.objectives = {"model": SupervisedObjective(Noisy(4, 2), nn.CrossEntropyLoss())}
        if drawn:
            drawing(task)
        results.append(fit(tmp_path, task, log={"picture": True}))
    assert (results[0].directory / "weights.png").stat().st_size > 1000
    assert set(seen) == {(False, False)}
    losses = [[record["loss"] for record in told(result, "train")] for result in results]
    assert losses[0] == losses[1]

    def broken(figure: Any) -> None:
        raise KeyError("my own mistake")

    capsys.readouterr()
    assert fit(tmp_path, Task(pictures=lambda: {"a": broken}), log={"picture": True}).exit_code == 0
    assert capsys.readouterr().err.count("picture 'a' failed: KeyError: 'my own mistake'; training goes on") == 1


# -- several learners ------------------------------------------------------------------------------------------------


def two(first: nn.Module, second: nn.Module, **extra: Any) -> Task:
    task = Task(**extra)
    loss = nn.CrossEntropyLoss()
    task.objectives = {"first": SupervisedObjective(first, loss), "second": SupervisedObjective(second, loss)}
    return task


def test_learners_have_settings_and_schedules_of_their_own(tmp_path: Path) -> None:
    settings = {"second": {"optimizer": {"lr": 0.01}, "schedule": {"name": "linear"}, "gradients": {"clip_norm": 1.0}}}
    task = two(nn.Linear(4, 2), nn.Linear(4, 2), turns={"second": 2})
    result = fit(tmp_path, task, learners=settings)
    records = told(result, "train")
    assert [r["first/lr"] for r in records] == pytest.approx([0.1] * 6)
    taken = [r["second/lr"] for r in records if r["second/loss"] is not None]
    assert taken == pytest.approx([0.01 * (1 - step / 3) for step in range(3)]), "its schedule has its own 3 updates"
    assert "second/gradient_norm" in records[-1] and "first/gradient_norm" not in records[-1]
    start = told(result, "start")[0]
    assert start["for second"].startswith("sgd, lr 0.01, linear") and start["for first"].startswith(
        "sgd, lr 0.1, constant"
    )


def test_learners_that_the_task_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"argument learners: learners.secnd.optimizer.lr: .* no learner 'secnd' .*'second'"
    ):
        fit(tmp_path, two(nn.Linear(4, 2), nn.Linear(4, 2)), learners={"secnd": {"optimizer": {"lr": 1.0}}})
    with pytest.raises(ConfigError, match=r"task.turns: there is no learner 'third'"):
        fit(tmp_path, two(nn.Linear(4, 2), nn.Linear(4, 2), turns={"third": 2}))


@pytest.mark.parametrize("strategy", ["ddp", "naive"])
def test_shared_parameters_are_refused_in_one_sentence(tmp_path: Path, strategy: str) -> None:
    body = nn.Linear(4, 4)
    task = two(nn.Sequential(body, nn.Linear(4, 2)), nn.Sequential(body, nn.Linear(4, 2)))
    message = r"'first' and 'second' share parameters \(the first is '0.weight'\).*one objective whose loss is the sum"
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, task, strategy={"name": strategy})
    body.requires_grad_(False)
    assert fit(tmp_path, task, strategy={"name": strategy}).exit_code == 0, "frozen, both may have it"


# -- averages --------------------------------------------------------------------------------------------------------


class Averaged(SupervisedObjective):
    def __init__(self, model: nn.Module):
        super().__init__(model, nn.CrossEntropyLoss())
        self.slow = MovingAverage(model, 0.5)

    def updated(self) -> None:
        self.slow.update(self.model)


def test_averages_are_kept_with_the_best_model(tmp_path: Path) -> None:
    task = Task()
    torch.manual_seed(0)
    task.objectives = {"model": Averaged(nn.Linear(4, 2))}
    states: list[torch.Tensor] = []

    class Worsens:
        def __call__(self, batch: Any) -> Any:
            states.append(task.objectives["model"].slow.average.weight.clone())  # type: ignore[attr-defined]
            return {"score": ({1: 1.0, 2: 5.0}.get(len(states), 2.0), 1.0)}

    task.evaluate = Worsens()  # type: ignore[method-assign]
    result = fit(tmp_path, task, train={"epochs": 4})
    saved = load_file(result.directory / "averages.safetensors")
    assert torch.equal(saved["weight"], states[1]), "under the model's own names"
    assert torch.equal(task.objectives["model"].slow.average.weight, states[1]), "and loaded at the end"  # type: ignore[attr-defined]
    assert not torch.equal(states[1], states[3])


def test_what_an_objective_looks_at_is_rank_0s_on_all_ranks(tmp_path: Path) -> None:
    tasks: dict[int, Task] = {}

    def make(rank: int) -> Task:
        task = Task()
        objective = Averaged(nn.Linear(4, 2))
        with torch.no_grad():  # as if every rank had made its own
            for p in (*objective.model.parameters(), *objective.slow.average.parameters()):
                p.fill_(1.0 + rank)
        task.objectives = {"model": objective}
        tasks[rank] = task
        return task

    in_threads(3, as_rank, tmp_path, make, {"log": {"name": "a"}})
    slow = [tasks[rank].objectives["model"].slow.average.weight for rank in range(3)]  # type: ignore[attr-defined]
    assert torch.equal(slow[0], slow[1]) and torch.equal(slow[0], slow[2])


def test_averages_are_never_in_training_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
    average = MovingAverage(model, 0.5)
    assert model.training and not average.train().average.training
    x = torch.randn(3, 4)
    assert torch.equal(average(x), average(x))


def test_batch_statistics_of_averages_are_the_same_on_all_ranks(tmp_path: Path) -> None:
    tasks: dict[int, Task] = {}

    def make(rank: int) -> Task:
        tasks[rank] = Task()
        tasks[rank].objectives = {"model": Averaged(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))}
        return tasks[rank]

    in_threads(2, as_rank, tmp_path, make, {"log": {"name": "b"}, "monitor": {"keep_best": False}})
    first, second = (tasks[rank].objectives["model"].slow.average[0].running_mean for rank in range(2))  # type: ignore[attr-defined]
    assert torch.equal(first, second) and bool(first.any())


class AsModule(nn.Module):
    """An objective may be a module itself, whose attributes are then kept elsewhere; or have slots; or lists."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(4, 2)
        self.slow = MovingAverage(self.model, 0.5)
        self.teachers = [nn.Linear(1, 1)]


class Slotted:
    __slots__ = ("model", "slow", "teachers")

    def __init__(self) -> None:
        self.model = nn.Linear(4, 2)
        self.slow, self.teachers = MovingAverage(self.model, 0.5), (nn.Linear(1, 1),)


@pytest.mark.parametrize("kind", [AsModule, Slotted])
def test_what_an_objective_holds_is_found_however_it_is_held(kind: Any) -> None:
    objective = kind()
    held = held_modules(objective)
    assert list(held) == ["slow", "teachers.0"] or sorted(held) == ["slow", "teachers.0"]
    assert moving_averages({"a": objective})["a.slow"] is objective.slow.average


# -- tasks that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"join": 3}, "task Task: join is a int, not a method"),
        ({"pictures": {}}, "task Task: pictures is a dict, not a method"),
        ({"turns": [2]}, r"task.turns: must be a mapping of learners to numbers, not \[2\]"),
        ({"turns": {"model": 2}}, "some learner must take a turn on every batch"),
    ],
)
def test_attributes_of_another_kind(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, Task(**extra))


def test_models_and_hooks_of_objectives_are_looked_at(tmp_path: Path) -> None:
    task = Task()
    task.objectives["model"].updated = 5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="objective 'model': updated is a int, not a method"):
        fit(tmp_path, task)
    task = Task()
    task.objectives["model"].model = lambda x: x  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"the model of objective 'model' is a function, not a torch.nn.Module"):
        fit(tmp_path, task)


def test_a_summary_may_use_torchmetrics_and_drop_them(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    def task() -> Task:
        given = Task(summarise=lambda metrics: {"both": metrics["loss"] + metrics["right"]})
        given.metrics = {"right": torchmetrics.Accuracy(task="multiclass", num_classes=2)}
        return given

    assert set(fit(tmp_path, task()).metrics) == {"both"}
    with pytest.raises(ConfigError, match="evaluation of the first batch returns no metric 'right'"):
        fit(tmp_path, task(), monitor={"metric": "right"})


# -- samples of a rank's own -----------------------------------------------------------------------------------------


def collecting(answer: Any) -> Any:
    return lambda rank: Task(collect=lambda epoch: answer(rank, epoch))


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (lambda rank, epoch: PerRank(iter(())), DataError, r"PerRank\(samples\): a tuple_iterator has no length"),
        (lambda rank, epoch: PerRank(None), DataError, "no rank collected anything"),
        (
            lambda rank, epoch: PerRank(DATA) if rank else DATA,
            MismatchError,
            r"collect\(0\) returned a data set on rank 0 and samples of its own",
        ),
        (
            lambda rank, epoch: PerRank(DATA) if epoch and rank else DATA,
            MismatchError,
            r"collect\(1\) returned a data set on rank 0",
        ),
        (lambda rank, epoch: PerRank(DATA, 1 + rank), MismatchError, "1 passes on rank 0 and 2 on rank 1"),
    ],
)
def test_bad_collections(tmp_path: Path, answer: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        in_threads(2, as_rank, tmp_path, collecting(answer), {})


def test_a_task_may_return_to_its_data_set(tmp_path: Path) -> None:
    answers = [PerRank(TensorDataset(*(t[:8] for t in DATA.tensors))), DATA, DATA]
    result = fit(tmp_path, Task(collect=lambda epoch: answers[epoch]), train={"epochs": 3})
    assert result.steps == 1 + 3 + 3


@pytest.mark.alone
def test_a_rank_may_have_nothing_in_one_epoch_and_much_in_another(tmp_path: Path) -> None:
    def answer(rank: int, epoch: int) -> PerRank:
        count = [(0, 7), (5, 0), (3, 1)][epoch][rank]
        return PerRank(TensorDataset(*(t[:count] for t in DATA.tensors)) if count else None)

    results = in_threads(2, as_rank, tmp_path, collecting(answer), {"train": {"epochs": 3}, "log": {"name": "u"}})
    assert results[0].steps == 3 and results[0].metrics == results[1].metrics
    idle = [record["idle"] for record in told(results[0], "train")]
    assert 0.3 < idle[0] <= 0.6, "one of two ranks has everything; collecting took no time"
