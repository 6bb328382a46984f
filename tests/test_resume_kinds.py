"""Kinds of learning whose data is made on the way go on too: what was remembered, acted and drawn is in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distloop.memory import ReplayMemory
from distloop.tasks.actor_critic import ActorCritic
from distloop.tasks.dqn import DQN
from distloop.tasks.dyna import Dyna
from distloop.tasks.gan import GAN
from tests.test_resume import logged, run

pytest.importorskip("gymnasium")

SMALL = {"environments": 3, "steps": 24, "warm_up": 48, "replay_ratio": 8.0, "hidden": 8, "explore_steps": 400}


def acting(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "dqn":
        return DQN(**SMALL, target_every=3, evaluation_episodes=2)
    if kind == "prioritised":
        return DQN(**SMALL, target_every=3, evaluation_episodes=2, priority_exponent=0.6, capacity=90)
    if kind == "dyna":
        return Dyna(**SMALL, model_hidden=8, evaluation_episodes=2)
    if kind == "gan":
        return GAN(noise=4, width=4, samples=40, discriminator_updates=2)
    return ActorCritic(episodes=5, passes=2, hidden=8, evaluation_episodes=2)


def options(kind: str) -> dict[str, Any]:
    batches = {"gan": 512}
    return {
        "data": {"global_batch_size": batches.get(kind, 32)},
        "optimizer": {"name": "adam", "lr": 0.003, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "train": {"epochs": 4},
        "evaluate": {"every_epochs": 2},
        "log": {"every": 2},
    }


@pytest.mark.parametrize("kind", ["dqn", "prioritised", "dyna", "actor_critic", "gan"])
@pytest.mark.parametrize("size", [1, 2])
def test_what_is_made_on_the_way_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    monkeypatch.setattr("distloop.tasks.gan.JUDGE_EPOCHS", 1)  # it judges, and has no part in the training
    whole = run(size, tmp_path / "a", make=lambda: acting(kind), **options(kind))
    steps = whole[0][0].steps
    assert steps > 8
    for stop in (2, 5, steps - 3, None):
        parts = run(
            size, tmp_path / "b", make=lambda: acting(kind), stop=stop, **options(kind), checkpoint={"resume": "auto"}
        )
    for (_, expected), (result, found) in zip(whole, parts, strict=True):
        assert result.steps == steps
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key
    assert logged(tmp_path / "b") == logged(tmp_path / "a")


@pytest.mark.parametrize("kind", ["dqn", "prioritised", "dyna"])
def test_acting_goes_on_on_other_ranks(tmp_path: Path, kind: str) -> None:
    steps = None
    for number, size in enumerate((2, 3, 1)):
        stop = None if number == 2 else 3 + 5 * number
        ends = run(size, tmp_path, make=lambda: acting(kind), stop=stop, **options(kind), checkpoint={"resume": "auto"})
        steps = ends[0][0].steps
    assert steps == 4 * 24 * 8 // 32


def test_episodes_are_learned_from_once_on_other_ranks_too(tmp_path: Path) -> None:
    """The episodes of an epoch that was begun on two ranks, gone on with on three, then one: every sample twice."""
    seen: list[list[float]] = []

    def make() -> Any:
        task = acting("actor_critic")
        own: list[float] = []
        seen.append(own)
        inner = task.objectives["critic"].guess

        def guess(batch: Any) -> Any:
            own.extend(batch[0].double().sum(1).tolist())
            return inner(batch)

        task.objectives["critic"].guess = guess
        return task

    changes = options("actor_critic") | {"train": {"epochs": 1}, "data": {"global_batch_size": 16}}
    for number, size in enumerate((2, 3, 1)):
        stop = None if number == 2 else 2 + 3 * number
        run(size, tmp_path, make=make, stop=stop, **changes, checkpoint={"resume": "auto"})
    everything = sorted(value for own in seen for value in own)
    assert everything[0::2] == everything[1::2] and len(everything) > 60, "two passes"


def test_memories_are_dealt_anew_by_age() -> None:
    old = [ReplayMemory(6, 1, priority_exponent=0.5), ReplayMemory(6, 2, priority_exponent=0.5)]
    old[0].add(torch.arange(9.0))  # 3 to 8 are left
    old[1].add(torch.arange(100.0, 104.0))
    old[1].prioritise(torch.tensor([2]), torch.tensor([9.0]))
    states = [memory.state_dict() for memory in old]
    shares = []
    for rank in range(3):
        memory = ReplayMemory(4, rank, priority_exponent=0.5)
        memory.take_from(states, torch.tensor([rank == 0, rank == 1, rank == 2]))
        assert memory.draw(3).rows[0].numel() == 3
        rows = memory.state_dict()["field_0"].tolist()
        assert [row for row in rows if row < 50] == sorted(row for row in rows if row < 50), "the oldest first"
        shares += rows
        if 102.0 in rows:
            place = rows.index(102.0)
            assert float(memory.state_dict()["priorities"][place]) == pytest.approx(3.0)
    assert sorted(shares) == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 100.0, 101.0, 102.0, 103.0]
