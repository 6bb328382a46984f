"""A GAN: two learners in turns, the same on any number of ranks, and figures that show what it makes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distloop.build import Builder, Place
from distloop.errors import ConfigError
from distloop.settings import from_file, from_mapping, resolve
from distloop.site import Site
from distloop.tasks import gan, make_task
from distloop.tasks.gan import GAN, judged, means, verdict
from distloop.transports import Alone, Transport
from distloop.world import World
from tests.ranks import in_processes

CONFIG = Path(__file__).parent.parent / "configs" / "gan.yaml"


def test_the_score_is_the_inception_score() -> None:
    sure = 1000.0 * torch.eye(10).repeat(5, 1)
    best = verdict(means(judged(sure)))
    assert best == pytest.approx({"score": 10.0, "confidence": 1.0, "classes": 10.0})
    assert verdict(means(judged(sure[:1].expand(50, 10)))) == pytest.approx(
        {"score": 1.0, "confidence": 1.0, "classes": 1.0}
    ), "one mode alone"
    blank = verdict(means(judged(torch.zeros(50, 10))))
    assert (blank["score"], blank["confidence"]) == pytest.approx((1.0, 0.1))
    scores = 3 * torch.randn(40, 10).double()
    p = scores.softmax(-1)
    divergence = (p * (p.log() - p.mean(0).log())).sum(-1).mean()
    assert verdict(means(judged(scores)))["score"] == pytest.approx(math.exp(float(divergence)), rel=1e-5)


def test_a_class_is_covered_from_two_percent_on() -> None:
    labels = [0] * 979 + [1] * 20 + [2]
    shares = means(judged(1000.0 * nn.functional.one_hot(torch.tensor(labels), 10).float()))
    assert verdict(shares)["classes"] == 2.0


def run(transport: Transport, folder: str, sections: dict[str, Any]) -> list[dict[str, Any]]:
    small = {
        "task": {"width": 8, "samples": 60, "noise": 4},
        "train": {"max_steps": 6},
        "log": {"directory": folder, "every": 1, "tensorboard": False, "picture": False},
    }
    resolved = resolve(from_file(CONFIG), from_mapping(small), from_mapping(sections))
    world = World(transport.rank, transport.size, transport.rank, transport.size, "test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gan, "JUDGE_EPOCHS", 1)  # that it knows digits is tested elsewhere
        result = Builder(resolved).session(Place(world, transport, torch.device("cpu"))).run()
    return [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["ddp", "naive"])
def test_any_number_of_ranks_trains_the_same_gan(strategy: str, tmp_path: Path) -> None:
    alone = in_processes(1, run, str(tmp_path / "1"), {})[0]
    sections = {"strategy": {"name": strategy}, "data": {"micro_batch_size": 9}}
    split = in_processes(3, run, str(tmp_path / "3"), sections)[0]
    compared = 0
    for one, other in zip(alone, split, strict=True):
        for key, value in one.items():
            if key.endswith(("loss", "score", "confidence")) and "best" not in key:
                assert other[key] == pytest.approx(value, rel=2e-4), key
                compared += 1
    assert compared >= 14


def test_the_generator_takes_its_turn_every_so_many_batches(tmp_path: Path) -> None:
    (records,) = in_processes(1, run, str(tmp_path), {"task": {"discriminator_updates": 3}})
    made = [record["generator/loss"] is not None for record in records if record["kind"] == "train"]
    assert made == [False, False, True, False, False, True]
    assert all(record["discriminator/loss"] is not None for record in records if record["kind"] == "train")


def test_samples_are_drawn_after_each_evaluation_and_those_of_the_kept_model_last(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sections = {"log": {"directory": str(tmp_path), "picture": True, "name": "g"}, "evaluate": {"every_steps": 2}}
    in_processes(1, run, str(tmp_path), sections)
    result = json.loads((tmp_path / "g" / "result.json").read_text())
    assert sorted(p.name for p in (tmp_path / "g" / "pictures").iterdir()) == [
        f"samples-{step:06d}.png" for step in (2, 4, 6)
    ]
    kept = tmp_path / "g" / "pictures" / f"samples-{result['kept_step']:06d}.png"
    assert (tmp_path / "g" / "samples.png").read_bytes() == kept.read_bytes()


def test_what_is_evaluated_is_the_average_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gan, "JUDGE_EPOCHS", 1)
    with_average, without = GAN(width=8, samples=40), GAN(width=8, samples=40, average=0.0)
    for task in (with_average, without):
        task.join(Site(World(), Alone(), torch.device("cpu"), 0))
        generator = task.objectives["generator"]
        with torch.no_grad():
            before = task.evaluate(task.validation.tensors)["confidence"][0]
            for p in generator.model.parameters():
                p.add_(0.5)
            after = task.evaluate(task.validation.tensors)["confidence"][0]
        assert (float(before) == float(after)) == (task is with_average)
        generator.updated()
        assert hasattr(generator.average, "average") == (task is with_average)


def test_the_judge_knows_digits() -> None:
    task = GAN(samples=20)
    task.join(Site(World(), Alone(), torch.device("cpu"), 0))
    real = task.summarise(means(judged(torch.randn(9, 10))))
    assert real["real/score"] > 9.0 and real["real/confidence"] > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "minmax"}, "task.loss: unknown 'minmax' .*'minimax'"),
        ({"discriminator_updates": 0}, "task.discriminator_updates: 0 is too small"),
        ({"width": 6}, "task.width: 6 must be divisible by 4"),
        ({"average": 1.0}, "task.average: 1.0 must be at least 0 and below 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task("gan", options, "a file")
