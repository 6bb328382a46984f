"""Acting in gymnasium's environments: whole episodes, or a stream of transitions; each episode has its own seed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distloop.data import derive_seed
from distloop.errors import ConfigError
from distloop.site import Site

Act = Callable[[Tensor, Sequence[int]], Tensor]
Figures = dict[str, tuple[float, float]]  # (sum, count) by name
Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # observations, actions, rewards, next ones, terminated


class Maker:
    """Makes environments of one kind, whose observations are vectors and whose actions are numbered.

    Args:
        name: as ``gymnasium.make`` takes it.

    Raises:
        ConfigError: gymnasium or the environment is not installed, there is no such environment, or its observations
            or actions are of another kind.
    """

    def __init__(self, name: str):
        if importlib.util.find_spec("gymnasium") is None:
            raise ConfigError("task.environment: needs gymnasium: pip install 'distloop[rl]'")
        self.name = name
        first = self()
        actions, observations = first.action_space, first.observation_space
        kind = type(actions).__name__
        if kind != "Discrete":
            raise ConfigError(
                f"task.environment: {name} takes {kind} actions of shape {actions.shape}; this task chooses one of "
                "finitely many (Discrete)"
            )
        if type(observations).__name__ != "Box" or len(observations.shape or ()) != 1:
            raise ConfigError(
                f"task.environment: {name} gives {type(observations).__name__} observations of shape "
                f"{observations.shape}; this task reads vectors (a Box of one dimension)"
            )
        self.actions, self.first_action = int(actions.n), int(actions.start)
        self.observations = int(observations.shape[0])
        self._idle = [first]

    def __call__(self) -> Any:
        """Return a new environment."""
        import gymnasium

        try:
            return gymnasium.make(self.name, disable_env_checker=True)
        except gymnasium.error.DependencyNotInstalled as failure:
            raise ConfigError(f"task.environment: {self.name} is not installed: {failure}") from failure
        except (gymnasium.error.Error, ImportError) as failure:
            raise ConfigError(f"task.environment: {self.name}: {' '.join(str(failure).split())}") from failure

    def borrow(self) -> Any:
        """Return an environment that is not in use."""
        return self._idle.pop() if self._idle else self()

    def give_back(self, environment: Any) -> None:
        """Take an environment to be used again."""
        self._idle.append(environment)


@dataclass
class Episode:
    """What happened from a reset to the end; of T steps there are T + 1 observations."""

    observations: list[np.ndarray[Any, Any]]
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False  # by the environment itself, not by its time limit

    @property
    def total(self) -> float:
        """The sum of rewards."""
        return sum(self.rewards)


def play(make: Maker, seeds: Sequence[int], act: Act) -> list[Episode]:
    """Play one episode per seed, side by side until the last has ended.

    Args:
        make: of the environments.
        seeds: of the resets.
        act: ``act(observations (n, size), indices of the n episodes that go on) -> actions (n,)``.
    """
    environments = [make.borrow() for _ in seeds]
    episodes = [Episode([_copy(e.reset(seed=seed)[0])]) for e, seed in zip(environments, seeds, strict=True)]
    running = list(range(len(seeds)))
    while running:
        observations = stacked([episodes[i].observations[-1] for i in running])
        going_on = []
        for i, action in zip(running, act(observations, running).tolist(), strict=True):
            episode = episodes[i]
            seen, reward, terminated, truncated, _ = environments[i].step(action + make.first_action)
            episode.observations.append(_copy(seen))
            episode.actions.append(action)
            episode.rewards.append(float(reward))
            episode.terminated = bool(terminated)
            if not (terminated or truncated):
                going_on.append(i)
        running = going_on
    for environment in environments:
        make.give_back(environment)
    return episodes


def returns(make: Maker, numbers: Tensor, choose: Callable[[Tensor], Tensor]) -> Figures:
    """Return the mean return of evaluation episodes, which have the same seeds in every run.

    Args:
        make: of the environments.
        numbers: of the episodes.
        choose: ``choose(observations (n, size)) -> actions (n,)``.
    """
    seeds = [derive_seed("evaluation", number) for number in numbers.tolist()]
    episodes = play(make, seeds, lambda observations, _: choose(observations))
    return {"return": (sum(episode.total for episode in episodes), float(len(episodes)))}


def stacked(observations: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """Return observations as one tensor of shape (observations, size)."""
    return torch.from_numpy(np.stack(observations))


class Stream:
    """Environments that go on for ever; each new episode's seed follows from the environment's and its own number."""

    def __init__(self, make: Maker, numbers: Sequence[int], site: Site):
        self._make, self._site = make, site
        self.numbers = list(numbers)
        self._environments = [make.borrow() for _ in self.numbers]
        self._begun = [0 for _ in self.numbers]
        self._returns = [0.0 for _ in self.numbers]
        self._actions: list[list[int]] = [[] for _ in self.numbers]  # since the reset
        self._seen = [self._reset(i) for i in range(len(self.numbers))]
        self.finished: list[float] = []  # sums of rewards of episodes that have ended since someone emptied this list

    def observations(self) -> Tensor:
        """Return what is seen now, of shape (environments, size)."""
        return stacked(self._seen)

    def step(self, actions: Sequence[int]) -> Rows:
        """Act once in each environment; one that has ended begins anew."""
        before, after, rewards, ends = self.observations(), [], [], []
        for i, action in enumerate(actions):
            seen, reward, terminated, truncated, _ = self._environments[i].step(action + self._make.first_action)
            after.append(_copy(seen))
            rewards.append(float(reward))
            ends.append(bool(terminated))
            self._returns[i] += float(reward)
            self._actions[i].append(action)
            if terminated or truncated:
                self.finished.append(self._returns[i])
                self._seen[i] = self._reset(i)
            else:
                self._seen[i] = after[-1]
        return (
            before,
            torch.tensor(actions),
            torch.tensor(rewards),
            stacked(after),
            torch.tensor(ends),
        )

    def state(self) -> dict[str, Any]:
        """Return how to bring the environments to where they are: their episodes, and what was done in them."""
        own = {
            str(number): {"begun": self._begun[i], "actions": torch.tensor(self._actions[i], dtype=torch.int64)}
            for i, number in enumerate(self.numbers)
        }
        return {"environments": own, "finished": list(self.finished)}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Bring this rank's environments to where they were, whichever rank had them, by doing the same again.

        An environment that is not a function of its seed and of the actions will be elsewhere.
        """
        every = {int(number): one for state in states for number, one in state["environments"].items()}
        for i, number in enumerate(self.numbers):
            self._begun[i] = every[number]["begun"] - 1
            self._seen[i] = self._reset(i)
            for action in every[number]["actions"].tolist():
                seen, reward, *_ = self._environments[i].step(action + self._make.first_action)
                self._seen[i] = _copy(seen)
                self._returns[i] += float(reward)
                self._actions[i].append(action)
        same = len(states) == self._site.world.size
        rank = self._site.world.rank
        # Of other ranks than before, the first has what is still to be reported.
        self.finished = list(states[rank]["finished"]) if same else []
        if not same and rank == 0:
            self.finished = [value for state in states for value in state["finished"]]

    def _reset(self, i: int) -> Any:
        seed = self._site.seed_of("environment", self.numbers[i], self._begun[i])
        self._begun[i] += 1
        self._returns[i] = 0.0
        self._actions[i] = []
        return _copy(self._environments[i].reset(seed=seed)[0])


def _copy(observation: Any) -> np.ndarray[Any, Any]:
    """Return an observation that stays as it is: an environment may hand out its own buffer."""
    return np.array(observation, dtype=np.float32)


class Chances:
    """Uniform numbers in [0, 1) for episodes or environments, each from a generator of its own."""

    def __init__(self, generators: Sequence[torch.Generator], block: int = 256):
        self._generators, self._block = list(generators), block
        self._drawn = torch.empty(len(self._generators), 0)
        self._next = 0

    def __call__(self) -> Tensor:
        """Return the next number of each, of shape (generators,)."""
        if self._next == self._drawn.shape[1]:
            self._drawn = torch.stack([torch.rand(self._block, generator=g) for g in self._generators])
            self._next = 0
        self._next += 1
        return self._drawn[:, self._next - 1]


def network(
    inputs: int, hidden: int, outputs: int, *, scale: float = 1.0, activation: type[nn.Module] = nn.Tanh
) -> nn.Sequential:
    """Return an MLP of two hidden layers with orthogonal weights, its last layer ``scale`` times as large."""
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, scale), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], activation(), layers[1], activation(), layers[2])
