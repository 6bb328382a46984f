"""Metrics are those of the whole data set: any number of ranks, any size, plain sums or torchmetrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distloop
from distloop.evaluation import Evaluation
from distloop.transports import Transport
from distloop.world import World
from tests.ranks import in_processes, in_threads

CPU = torch.device("cpu")


def data(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))


def model() -> nn.Module:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.arange(12.0).view(3, 4).sin())
        linear.bias.zero_()
    return linear


def evaluated(transport: Transport, n: int, metrics: Any = None, batch_size: int = 5) -> dict[str, float]:
    net = model()
    if metrics is None:
        metrics = {"accuracy": distloop.accuracy}
    elif callable(metrics):
        metrics = metrics()
    task = distloop.Supervised(net, nn.CrossEntropyLoss(), data(n), metrics=metrics)
    world = World(transport.rank, transport.size, transport.rank, transport.size)
    evaluation = Evaluation(
        task, data(n), n, batch_size=batch_size, models=[net], world=world, transport=transport, device=CPU
    )
    net.train()
    values = evaluation()
    assert net.training, "evaluating leaves the model as it was"
    return values


def expected(n: int) -> dict[str, float]:
    inputs, labels = data(n).tensors
    scores = model()(inputs).detach()
    right = (scores.argmax(1) == labels).sum().item()
    return {"loss": nn.functional.cross_entropy(scores, labels).item(), "accuracy": right / n}


@pytest.mark.parametrize("n", [1, 2, 7, 13, 23])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exact_on_any_number_of_ranks(size: int, n: int) -> None:
    for values in in_threads(size, evaluated, n):
        assert values == pytest.approx(expected(n), rel=1e-6)


def torchmetrics_objects() -> dict[str, Any]:
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is an extra")
    return {
        "f1": torchmetrics.F1Score("multiclass", num_classes=3, average="macro"),
        "auroc": torchmetrics.AUROC("multiclass", num_classes=3),  # keeps all scores: ranks hold unequally many
    }


def torchmetrics_by_hand(n: int) -> dict[str, float]:
    inputs, labels = data(n).tensors
    values = {}
    for name, metric in torchmetrics_objects().items():
        metric.update(model()(inputs).detach().softmax(1), labels)
        values[name] = float(metric.compute())
    return values


def evaluated_with_torchmetrics(transport: Transport, n: int) -> dict[str, float]:
    values = evaluated(transport, n, softmaxed, batch_size=4)
    values.pop("loss")
    return values


def softmaxed() -> dict[str, Any]:
    objects = torchmetrics_objects()
    for metric in objects.values():
        update = metric.update
        metric.update = lambda guesses, targets, update=update: update(guesses.softmax(1), targets)
    return objects


@pytest.mark.parametrize("n", [13, 23])
def test_torchmetrics_are_exact_too(n: int) -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is an extra")
    for values in in_processes(3, evaluated_with_torchmetrics, n):
        assert values == pytest.approx(torchmetrics_by_hand(n), rel=1e-5)


class Named:
    """Ranks meet different metrics, in different orders."""

    def evaluate(self, batch: Any) -> Any:
        labels = batch[1].tolist()
        return {f"class {label}": (float(label), 1.0) for label in dict.fromkeys(labels)} | {"big": (2.0**24 + 1, 1)}


def evaluated_by_name(transport: Transport) -> dict[str, float]:
    samples = TensorDataset(torch.zeros(6, 1), torch.tensor([0, 1, 1, 2, 2, 0]))
    world = World(transport.rank, transport.size, transport.rank, transport.size)
    return Evaluation(Named(), samples, 6, batch_size=6, models=[], world=world, transport=transport, device=CPU)()


def test_metrics_are_added_by_name() -> None:
    for values in in_threads(3, evaluated_by_name):
        assert values == {"class 0": 0.0, "class 1": 1.0, "class 2": 2.0, "big": 2.0**24 + 1}


def test_evaluating_twice_gives_the_same() -> None:
    net, total = model(), []
    task = distloop.Supervised(net, nn.CrossEntropyLoss(), data(9), metrics=softmaxed())
    evaluation = Evaluation(
        task, data(9), 9, batch_size=4, models=[net], world=World(), transport=in_threads(1, lambda t: t)[0], device=CPU
    )
    for _ in range(2):
        total.append(evaluation())
    assert total[0] == total[1], "metrics are reset in between"


def evaluated_with_nothing_valid() -> Any:
    """A batch whose mean is over nothing (0/0) counts for nothing."""
    task = distloop.Supervised(model(), nn.CrossEntropyLoss(ignore_index=0), data(2), weight=lambda batch: 0.0)
    with torch.no_grad():
        return task.evaluate((torch.randn(2, 4), torch.zeros(2).long()))["loss"]


def test_a_weighted_loss_is_a_mean_over_what_it_counts() -> None:
    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores, targets, ignore_index=0)

    net = model()
    task = distloop.Supervised(net, loss, data(20), weight=lambda batch: float((batch[1] != 0).sum()))
    evaluation = Evaluation(
        task,
        data(20),
        20,
        batch_size=3,
        models=[net],
        world=World(),
        transport=in_threads(1, lambda t: t)[0],
        device=CPU,
    )
    inputs, labels = data(20).tensors
    assert any((part == 0).all() for part in labels.split(3)) or evaluated_with_nothing_valid() == (0.0, 0.0)
    assert evaluation()["loss"] == pytest.approx(loss(net(inputs), labels).item(), rel=1e-6)
