"""Reinforcement learning: what is acted, what is learned from it, and that ranks stay alike."""

from __future__ import annotations

import copy
import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.user_environments  # noqa: F401 (registers Corridor)
from distloop.build import Builder, Place
from distloop.errors import ConfigError
from distloop.settings import from_file, from_mapping, resolve
from distloop.site import Site
from distloop.tasks.actor_critic import Actor, ActorCritic, Both, Critic, advantage
from distloop.tasks.dqn import DQN, Draws, QLearning, Transitions
from distloop.tasks.dyna import Dyna, Imagination, WorldModel
from distloop.tasks.environments import Chances, Maker, Stream, play
from distloop.transports import Alone, Transport
from distloop.world import World
from tests.ranks import in_processes, in_threads

CONFIGS = Path(__file__).parent.parent / "configs"
ONWARDS = 1  # action 6 of Corridor


def site(transport: Transport | None = None, seed: int = 5) -> Site:
    transport = transport or Alone()
    return Site(World(transport.rank, transport.size), transport, torch.device("cpu"), seed)


def onwards(observations: Tensor, running: Any) -> Tensor:
    return torch.full((len(observations),), ONWARDS)


# -- environments ----------------------------------------------------------------------------------------------------


def test_episodes_are_those_of_their_seeds_however_they_are_grouped() -> None:
    make = Maker("Corridor-v0")
    assert (make.observations, make.actions, make.first_action) == (2, 2, 5)
    together = play(make, range(8), onwards)
    apart = [play(make, [seed], onwards)[0] for seed in range(8)]
    assert [e.total for e in together] == [e.total for e in apart]
    assert len({e.total for e in together}) > 2, "seeds make a difference"
    for episode in together:
        length = episode.observations[0][1]
        assert episode.terminated and episode.total == len(episode.actions) == length
        assert [place for place, _ in episode.observations] == list(range(int(length) + 1))


def test_an_episode_that_its_time_limit_ends_is_not_terminated() -> None:
    (episode,) = play(Maker("Corridor-v0"), [0], lambda observations, running: torch.zeros(1, dtype=torch.int64))
    assert not episode.terminated and len(episode.actions) == 12 and len(episode.observations) == 13
    assert episode.total == -6.0


def test_a_stream_goes_on_in_new_episodes() -> None:
    stream = Stream(Maker("Corridor-v0"), [3, 4], site())
    lengths = stream.observations()[:, 1].tolist()
    rows = [stream.step([ONWARDS, ONWARDS]) for _ in range(12)]
    for (before, actions, rewards, after, ended), (following, *_) in pairwise(rows):
        assert actions.tolist() == [1, 1] and rewards.tolist() == [1.0, 1.0]
        assert torch.equal(after[:, 0], before[:, 0] + 1), "what follows an end is where it ended, not a new beginning"
        assert torch.equal(ended, after[:, 0] == after[:, 1])
        assert torch.equal(following[:, 0], torch.where(ended, 0.0, after[:, 0]))
    assert stream.finished[:2] in (sorted(lengths), lengths), "the sums of rewards of the first episodes"
    again = Stream(Maker("Corridor-v0"), [4], site())
    assert again.observations()[0, 1] == lengths[1], "an environment's seeds follow from its number, not its rank"
    assert Stream(Maker("Corridor-v0"), range(12), site(seed=6)).observations()[:, 1].unique().numel() > 1


def test_chances_are_each_generator_s_own() -> None:
    chances = Chances([torch.Generator().manual_seed(i) for i in (1, 2)], block=3)
    drawn = torch.stack([chances() for _ in range(7)])
    alone = Chances([torch.Generator().manual_seed(2)], block=3)
    assert torch.equal(drawn[:, 1], torch.cat([alone() for _ in range(7)]))
    assert ((drawn >= 0) & (drawn < 1)).all() and drawn.unique().numel() == 14


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pendulum-v1", r"Pendulum-v1 takes Box actions of shape \(1,\); this task chooses one of finitely many"),
        ("Taxi-v4", r"Taxi-v4 gives Discrete observations of shape \(\); this task reads vectors"),
        ("Matrices-v0", r"Matrices-v0 gives Box observations of shape \(3, 4\)"),
        ("CartPol-v1", r"CartPol-v1: .*CartPole"),
        ("CartPole-v9", r"CartPole-v9: .*v9"),
        ("no.such.module:Thing-v0", r"no.such.module:Thing-v0: .*no"),
    ],
)
def test_environments_that_do_not_fit(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Maker(name)


@pytest.mark.skipif(importlib.util.find_spec("Box2D") is not None, reason="Box2D is installed, so nothing is missing")
def test_an_environment_that_is_not_installed_comes_with_its_pip_line() -> None:
    with pytest.raises(ConfigError, match=r"LunarLander-v3 is not installed: .*pip install"):
        Maker("LunarLander-v3")


def test_without_gymnasium_there_is_a_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs gymnasium: pip install 'distloop\[rl\]'"):
        Maker("CartPole-v1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActorCritic(episodes=0), "task.episodes: 0 is too small"),
        (lambda: ActorCritic(discount=1.5), r"task.discount: 1.5 must be at least 0 and at most 1"),
        (lambda: ActorCritic(body="shred"), r"task.body: unknown 'shred' .*'shared'"),
        (lambda: DQN(target_decay=1.0), "task.target_decay: 1.0 must be at least 0 and below 1"),
        (lambda: DQN(environments=2.5), "task.environments: 2.5 is no whole number"),
        (lambda: Dyna(model_hidden=0), "task.model_hidden: 0 is too small"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# -- actor and critic ------------------------------------------------------------------------------------------------


def test_advantages_are_the_discounted_sum_of_errors() -> None:
    rewards, values = torch.randn(6).double(), torch.randn(7).double()
    gamma, trace = 0.9, 0.7
    errors = [float(rewards[t] + gamma * values[t + 1] - values[t]) for t in range(6)]
    expected = [sum((gamma * trace) ** k * errors[t + k] for k in range(6 - t)) for t in range(6)]
    assert torch.allclose(
        advantage(rewards, values, gamma, trace), torch.tensor(expected, dtype=torch.float64), rtol=1e-12
    )
    to_the_end = [sum(gamma**k * float(rewards[t + k]) for k in range(6 - t)) for t in range(6)]
    values[-1] = 0.0
    found = advantage(rewards, values, gamma, 1.0) + values[:-1]
    assert torch.allclose(found, torch.tensor(to_the_end, dtype=torch.float64), rtol=1e-12), (
        "lambda 1 gives the returns"
    )


def test_the_first_pass_is_the_plain_policy_gradient_and_clipping_stops_it() -> None:
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    actions, advantages = torch.tensor([0, 1, 2, 1, 0]), torch.randn(5).double()
    log_policy = scores.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    actor = Actor(nn.Linear(1, 1), clip=0.2, entropy=0.0)
    (found,) = torch.autograd.grad(actor.loss(scores, (actions, log_policy.detach(), advantages)), scores)
    (expected,) = torch.autograd.grad(-(log_policy * advantages).mean(), scores)
    assert torch.allclose(found, expected, rtol=1e-12)
    # Where the ratio has moved beyond the clip in the direction that the advantage wants, nothing pulls any further.
    before = log_policy.detach() - 0.5 * advantages.sign()
    (stopped,) = torch.autograd.grad(actor.loss(scores, (actions, before, advantages)), scores)
    assert torch.equal(stopped, torch.zeros_like(stopped))
    bonus = Actor(nn.Linear(1, 1), clip=0.2, entropy=0.3)
    policy = scores.softmax(-1)
    entropy = -(policy * policy.log()).sum(-1).mean()
    difference = bonus.loss(scores, (actions, before, advantages)) - actor.loss(scores, (actions, before, advantages))
    assert float(difference.detach()) == pytest.approx(-0.3 * float(entropy.detach()))


@torch.no_grad()
def test_a_shared_body_has_the_sum_of_the_losses() -> None:
    n = 7
    batch = (torch.randn(n, 4), torch.randint(2, (n,)), -torch.rand(n), torch.randn(n), torch.randn(n))
    both = Both(nn.Linear(4, 3), 0.2, 0.1, 0.5)
    outputs = both.guess(batch)
    actor = Actor(nn.Linear(1, 1), 0.2, 0.1).loss(outputs[:, :2], batch[1:4])
    critic = Critic(nn.Linear(1, 1)).loss(outputs[:, 2], batch[4])
    assert float(both.loss(outputs, both.targets(batch))) == pytest.approx(float(actor + 0.5 * critic))


def collected(transport: Transport, original: ActorCritic) -> list[Tensor]:
    task = copy.deepcopy(original)
    task.join(site(transport))
    own = task.collect(0)
    played = torch.tensor(task.report()["return"])
    fields = [] if own.samples is None else list(own.samples.tensors)
    return [played, *fields]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_any_number_of_ranks_plays_the_same_episodes(size: int) -> None:
    task = ActorCritic("Corridor-v0", episodes=5, hidden=8)
    (alone,) = in_threads(1, collected, task)
    by_rank = in_threads(size, collected, task)
    assert sum(float(played[1]) for played, *_ in by_rank) == 5
    assert [len(own) for own in by_rank].count(1) == max(0, size - 5), "a rank may have no episode"
    joined = [torch.cat(parts) for parts in zip(*(own[1:] for own in by_rank if len(own) > 1), strict=True)]
    for together, apart in zip(alone[1:], joined, strict=True):
        assert torch.allclose(together, apart, atol=1e-5)
    advantages = joined[3].double()
    assert abs(float(advantages.mean())) < 1e-6 and float(advantages.std(correction=0)) == pytest.approx(1.0, rel=1e-5)


# -- Q-learning ------------------------------------------------------------------------------------------------------


def transitions(n: int) -> Transitions:
    return Transitions(
        torch.randn(n, 4),
        torch.randint(2, (n,)),
        torch.randn(n),
        torch.randn(n, 4),
        torch.rand(n) < 0.4,
        torch.arange(n),
        torch.rand(n),
    )


def test_targets_are_double_q_from_the_target_network() -> None:
    q = QLearning(nn.Linear(4, 2), discount=0.9, target_decay=0.0, target_every=3)
    with torch.no_grad():
        for p in q.model.parameters():
            p.add_(torch.randn_like(p))  # since the copy was made
    batch = transitions(9)
    values, kept = q.targets(batch)
    assert kept is batch and not values.requires_grad
    assert q.guess(batch).requires_grad
    with torch.no_grad():
        check_targets(q, batch, values)


def check_targets(q: QLearning, batch: Transitions, values: Tensor) -> None:
    for i in range(9):
        choice = int(q.model(batch.following[i]).argmax())
        follows = 0.0 if batch.terminated[i] else 0.9 * float(q.target(batch.following[i])[choice])
        assert float(values[i]) == pytest.approx(float(batch.rewards[i]) + follows, rel=1e-5)
    guesses = q.guess(batch)
    assert float(guesses[2]) == pytest.approx(float(q.model(batch.observations)[2, batch.actions[2]]))
    errors = (values - guesses).abs()
    huber = torch.where(errors < 1, errors**2 / 2, errors - 0.5)
    assert float(q.loss(guesses, (values, batch))) == pytest.approx(float((batch.weights * huber).mean()), rel=1e-6)


def test_the_target_network_follows_every_so_many_updates() -> None:
    q = QLearning(nn.Linear(4, 2), discount=0.9, target_decay=0.0, target_every=3)
    before = q.target.average.weight.clone()
    for update in range(1, 7):
        with torch.no_grad():
            q.model.weight.add_(1.0)
        q.updated()
        assert torch.allclose(q.target.average.weight, before + update // 3 * 3)


def test_draws_come_from_the_memory_and_tell_it_their_errors() -> None:
    task = DQN("Corridor-v0", environments=2, steps=8, warm_up=8, replay_ratio=2.0, priority_exponent=0.5, hidden=8)
    task.join(site())
    own = task.collect(0)
    assert len(task.memory) == 16 and len(own.samples) == 16
    batch = own.samples.__getitems__([0, 1, 2])
    assert batch.places.tolist() != own.samples.__getitems__([0, 1, 2]).places.tolist(), "each reading draws anew"
    before = task.memory.state_dict()["priorities"].clone()
    task.learned.loss(task.learned.guess(batch), task.learned.targets(batch))
    changed = (task.memory.state_dict()["priorities"] != before).nonzero().flatten().tolist()
    assert changed and set(changed) <= set(batch.places.tolist())


def test_exploring_falls_in_a_line_with_the_steps_acted() -> None:
    task = DQN("Corridor-v0", environments=4, steps=10, warm_up=5, explore_steps=48, explore_to=0.2, hidden=8)
    task.join(site())
    parts = []
    for epoch in range(5):
        task.collect(epoch)
        parts.append(task.exploring())
    # 12 steps an epoch: 3 rounds of 4 environments; the warm-up does not count.
    assert parts == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])


# -- Dyna ------------------------------------------------------------------------------------------------------------


def test_imagined_targets_are_backed_up_through_the_model() -> None:
    world = WorldModel(4, 2, hidden=8)
    world.scale.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    q = Imagination(nn.Linear(4, 2), world, 0.9, 0.0, 1)
    batch = transitions(3)
    values, _ = q.targets(batch)
    assert values.shape == (3, 2)
    assert q.loss(q.guess(batch), (values, batch)).requires_grad
    with torch.no_grad():
        check_imagined(q, world, batch, values)


def check_imagined(q: Imagination, world: WorldModel, batch: Transitions, values: Tensor) -> None:
    change, rewards, ends = world(batch.observations)
    for i in range(3):
        for action in range(2):
            following = batch.observations[i] + change[i, action] * world.scale
            best = int(q.model(following).argmax())
            goes_on = 1.0 - float(ends[i, action].sigmoid())
            expected = float(rewards[i, action]) + 0.9 * goes_on * float(q.target(following)[best])
            assert float(values[i, action]) == pytest.approx(expected, rel=1e-4)


def test_the_world_model_learns_the_corridor() -> None:
    task = Dyna("Corridor-v0", environments=4, steps=400, warm_up=400, model_hidden=32)
    task.join(site())
    draws: Draws = task.collect(0).samples
    dynamics = task.objectives["dynamics"]
    optimizer = torch.optim.Adam(dynamics.model.parameters(), lr=1e-2)
    for _ in range(300):
        batch = draws.__getitems__(range(64))
        optimizer.zero_grad()
        loss = dynamics.loss(dynamics.guess(batch), dynamics.targets(batch))
        loss.backward()
        optimizer.step()
    following, rewards, ended = task.objectives["dynamics"].model.imagine(torch.tensor([[1.0, 3.0], [2.0, 3.0]]))
    wanted = torch.tensor([[[1.0, 3.0], [2.0, 3.0]], [[2.0, 3.0], [3.0, 3.0]]])
    assert torch.allclose(following, wanted, atol=0.2)
    assert torch.allclose(rewards, torch.tensor([[-0.5, 1.0], [-0.5, 1.0]]), atol=0.2)
    assert (ended > 0.5).tolist() == [[False, False], [False, True]]


def scale_of(transport: Transport, original: Dyna) -> tuple[int, Tensor]:
    task = copy.deepcopy(original)
    task.join(site(transport))
    task.collect(0)
    return len(task.memory), task.objectives["dynamics"].model.scale  # type: ignore[return-value]


def test_the_scale_of_changes_is_that_of_all_ranks() -> None:
    task = Dyna("CartPole-v1", environments=2, steps=16, warm_up=64, hidden=8)
    (_, first), (_, second), (nothing, third) = in_threads(3, scale_of, task)
    assert torch.equal(first, second) and torch.equal(first, third) and bool((first > 0).all())
    assert nothing in (0, 40) and not torch.equal(first, torch.ones(4))


# -- runs ------------------------------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "actor_critic": {"episodes": 3, "passes": 2, "hidden": 8},
    "dqn": {"environments": 2, "steps": 32, "warm_up": 32, "replay_ratio": 2, "hidden": 8, "target_every": 2},
    "dyna": {"environments": 2, "steps": 16, "warm_up": 32, "replay_ratio": 2, "hidden": 8, "model_hidden": 8},
}


def run(transport: Transport, folder: str, kind: str, sections: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """Train a supplied configuration for a moment; return its records and a sum over all parameters of this rank."""
    small = {
        "task": SMALL[kind] | {"evaluation_episodes": 3},
        "train": {"epochs": 2},
        "evaluate": {"every_epochs": 1},
        "log": {"directory": folder, "every": 1, "picture": False, "tensorboard": False},
        "data": {"global_batch_size": 16, "micro_batch_size": 5},
    }
    resolved = resolve(from_file(CONFIGS / f"{kind}.yaml"), from_mapping(small), from_mapping(sections))
    world = World(transport.rank, transport.size, transport.rank, transport.size, "test")
    session = Builder(resolved).session(Place(world, transport, torch.device("cpu")))
    result = session.run()
    lines = (result.directory / "metrics.jsonl").read_text().splitlines()
    modules = [m for learner in session.learners for m in vars(learner.objective).values() if isinstance(m, nn.Module)]
    total = sum(float(t.detach().double().abs().sum()) for m in modules for t in (*m.parameters(), *m.buffers()))
    return [json.loads(line) for line in lines], total


@pytest.mark.parametrize("strategy", ["ddp", "naive"])
@pytest.mark.parametrize("kind", SMALL)
def test_replicas_and_target_networks_stay_equal(kind: str, strategy: str, tmp_path: Path) -> None:
    by_rank = in_processes(3, run, str(tmp_path), kind, {"strategy": {"name": strategy}})
    assert len({total for _, total in by_rank}) == 1, "also where a rank has no environment or episode"
    trained = [record for record in by_rank[0][0] if record["kind"] == "train"]
    assert any(record.get("idle", 0.0) > 0.0 for record in trained), "two of three ranks act: the loss of time is told"
    assert any("return" in record for record in trained)
    assert all(record["environment_steps"] > 0 for record in trained)


@pytest.mark.parametrize("kind", SMALL)
def test_a_run_is_reproducible_from_its_seed(kind: str, tmp_path: Path) -> None:
    def told(seed: int, name: str) -> list[Any]:
        ((records, total),) = [run(Alone(), str(tmp_path / name), kind, {"train": {"seed": seed}})]
        learned = [
            {k: v for k, v in r.items() if k.endswith(("loss", "return"))} for r in records if r["kind"] != "end"
        ]
        return [*learned, total]

    assert told(1, "a") == told(1, "b")
    assert told(1, "c") != told(2, "d")


def test_a_shared_body_runs(tmp_path: Path) -> None:
    task = {"name": "actor_critic", "body": "shared", "episodes": 3, "passes": 1, "evaluation_episodes": 2}
    resolved = resolve(from_mapping({"task": task, "train": {"epochs": 1}, "log": {"directory": str(tmp_path)}}))
    session = Builder(resolved).session(Place(World(), Alone(), torch.device("cpu")))
    assert [learner.name for learner in session.learners] == ["actor_critic"]
    assert session.run().metrics["return"] > 0


@pytest.mark.slow
def test_actor_and_critic_balance_the_pole(tmp_path: Path) -> None:
    resolved = resolve(from_file(CONFIGS / "actor_critic.yaml"), from_mapping({"log": {"directory": str(tmp_path)}}))
    result = Builder(resolved).session(Place(World(), Alone(), torch.device("cpu"))).run()
    assert result.metrics["return"] >= 400
    assert "reached monitor.target" in result.reason
