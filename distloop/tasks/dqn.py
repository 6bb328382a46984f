"""Off-policy reinforcement learning: deep Q-learning from a replay memory, with a target network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distloop.averages import MovingAverage
from distloop.memory import ReplayMemory
from distloop.objective import Objective
from distloop.site import Site
from distloop.tasks.checks import check_positive, check_range, check_sizes
from distloop.tasks.environments import Chances, Figures, Maker, Stream, network, returns
from distloop.uneven import PerRank


class Transitions(NamedTuple):
    """What is drawn from the memory, n transitions at a time."""

    observations: Tensor  # (n, size)
    actions: Tensor  # (n,)
    rewards: Tensor  # (n,)
    following: Tensor  # (n, size), what was observed after
    terminated: Tensor  # (n,), whether nothing follows
    places: Tensor  # (n,), in the memory
    weights: Tensor  # (n,), of importance sampling


class Draws:
    """A data set of ``samples`` draws from a memory, each drawn when it is read."""

    def __init__(self, memory: ReplayMemory, samples: int):
        self._memory, self._samples = memory, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Any:
        return tuple(field[0] for field in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> Transitions:
        """Return as many new draws as there are indices; which indices makes no difference."""
        rows, places, weights = self._memory.draw(len(indices))
        observations, actions, rewards, following, terminated = rows
        return Transitions(observations, actions, rewards, following, terminated, places, weights)


class QLearning:
    """The value of each action in a state; its loss is the Huber loss of the temporal-difference error.

    The target of the value of action a is ``r + discount * Q'(s', argmax Q(s'))``, or r at an end, with Q' the target
    network (Mnih et al. 2015; van Hasselt et al. 2016, equation 4, for the choice of the next action).

    Args:
        model: maps observations (n, size) to values (n, actions).
        discount: gamma.
        target_decay: of the target network, a moving average of the model; 0 makes it a copy.
        target_every: updates between two of its steps.
    """

    def __init__(self, model: nn.Module, discount: float, target_decay: float, target_every: int):
        self.model, self.discount, self.every = model, discount, target_every
        self.target = MovingAverage(model, target_decay)
        self.memory: ReplayMemory | None = None  # told the errors, if it draws by priority
        self.updates = 0

    def guess(self, batch: Transitions) -> Tensor:
        values: Tensor = self.model(batch.observations)
        return values.gather(1, batch.actions[:, None])[:, 0]

    @torch.no_grad()
    def targets(self, batch: Transitions) -> tuple[Tensor, Transitions]:
        return self.backed_up(batch.rewards, batch.following, batch.terminated.float()), batch

    def loss(self, values: Tensor, targets: tuple[Tensor, Transitions]) -> Tensor:
        wanted, batch = targets
        if self.memory is not None:
            self.memory.prioritise(batch.places, (wanted - values).abs() + 1e-3)
        return (batch.weights * F.smooth_l1_loss(values, wanted, reduction="none")).mean()

    def backed_up(self, rewards: Tensor, following: Tensor, ended: Tensor) -> Tensor:
        """Return the value of acting, given what follows and with which probability nothing does."""
        best = self.model(following).argmax(-1, keepdim=True)
        values: Tensor = self.target(following).gather(-1, best)[..., 0]
        return rewards + self.discount * (1.0 - ended) * values

    def updated(self) -> None:
        """Let the target network follow."""
        self.updates += 1
        if self.updates % self.every == 0:
            self.target.update(self.model)


class DQN:
    """Q-learning in gymnasium's environments with numbered actions.

    Environments are numbered over all ranks; each has its own seeds for its episodes and for what is explored in it,
    whatever the number of ranks. Each rank has a memory of what its own environments saw; a rank without an environment
    learns nothing and waits for the others.

    Args:
        environment: gymnasium's name of it.
        environments: acted in side by side, over all ranks.
        steps: acted in an epoch, over all environments.
        warm_up: steps acted at random before the first update, over all environments.
        replay_ratio: samples drawn from the memory per step acted.
        capacity: transitions remembered, over all ranks.
        priority_exponent: 0 draws them uniformly; see :class:`distloop.memory.ReplayMemory`.
        correction_from: of the weights that make up for that, the exponent at first; 1 after ``explore_steps``.
        hidden: units of each of two hidden layers.
        discount: gamma.
        explore_from, explore_to: part of actions that are random, at first and after ``explore_steps``; linear between.
        explore_steps: acted over all environments.
        target_decay, target_every: of the target network; see :class:`QLearning`.
        evaluation_episodes: played to evaluate, always the same ones, taking the best actions.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        environments: int = 8,
        steps: int = 256,
        warm_up: int = 1024,
        replay_ratio: float = 32.0,
        capacity: int = 50_000,
        priority_exponent: float = 0.0,
        correction_from: float = 0.4,
        hidden: int = 256,
        discount: float = 0.99,
        explore_from: float = 1.0,
        explore_to: float = 0.05,
        explore_steps: int = 8_000,
        target_decay: float = 0.0,
        target_every: int = 128,
        evaluation_episodes: int = 20,
    ):
        check_sizes(environments=environments, steps=steps, warm_up=warm_up, capacity=capacity, hidden=hidden)
        check_sizes(explore_steps=explore_steps, target_every=target_every, evaluation_episodes=evaluation_episodes)
        check_range(0.0, 1.0, discount=discount, explore_from=explore_from, explore_to=explore_to)
        check_range(0.0, 1.0, priority_exponent=priority_exponent, correction_from=correction_from)
        check_range(0.0, 1.0, target_decay=target_decay, below=True)
        check_positive(replay_ratio=replay_ratio)
        self.make = Maker(environment)
        self._environments, self._steps, self._warm_up, self._ratio = environments, steps, warm_up, replay_ratio
        self._capacity, self._exponent, self._acted = capacity, priority_exponent, 0
        self._exploring, self._correction = (explore_from, explore_to), correction_from
        self._explore_steps = explore_steps
        q = network(self.make.observations, hidden, self.make.actions, activation=nn.ReLU)
        self.learned = self.make_learned(q, discount, target_decay, target_every)
        self.objectives: Mapping[str, Objective] = {"q": self.learned}
        self.validation = TensorDataset(torch.arange(evaluation_episodes))

    def make_learned(self, model: nn.Module, *constants: Any) -> QLearning:
        """Return the objective of the values; ``constants`` are those of :class:`QLearning`."""
        return QLearning(model, *constants)

    def join(self, site: Site) -> None:
        self._site = site
        self._numbers = site.part(self._environments)
        # Each rank remembers in proportion to the environments that it acts in.
        own = max(1, self._capacity * len(self._numbers) // self._environments)
        seed = site.seed_of("memory", site.world.rank)
        self.memory = ReplayMemory(own, seed, priority_exponent=self._exponent)
        if self._exponent:
            self.learned.memory = self.memory
        self._stream = Stream(self.make, self._numbers, site)

    def collect(self, epoch: int) -> PerRank:
        """Act in this rank's environments, and draw from what it remembers in proportion to that."""
        if epoch == 0:
            self._act("warm-up", self._warm_up, random=True)
        self._act(epoch, self._steps)
        if self._exponent:
            self.memory.correction = self._along(self._correction, 1.0)
            self.memory.floor = float(self._site.gather(torch.tensor([self.memory.least()])).min())
        return self.recall(epoch)

    def recall(self, epoch: int) -> PerRank:
        """Return the draws of an epoch after its acting; each is drawn when it is read."""
        acted = -(-self._steps // self._environments) * len(self._numbers)
        return PerRank(Draws(self.memory, round(self._ratio * acted)) if acted else None)

    def state(self) -> dict[str, Any]:
        """Return memory, environments and counters of this rank."""
        return {
            "acted": self._acted,
            "updates": self.learned.updates,
            "floor": self.memory.floor,
            "memory": self.memory.state_dict(),
            "stream": self._stream.state(),
        }

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of all ranks; of other ranks than before, what they remembered is dealt anew."""
        world = self._site.world
        self._acted, self.learned.updates = states[0]["acted"], states[0]["updates"]
        self.memory.correction, self.memory.floor = self._along(self._correction, 1.0), states[0]["floor"]
        self._stream.restore([state["stream"] for state in states])
        memories = [state["memory"] for state in states]
        if len(states) == world.size:
            self.memory.load_state_dict(memories[world.rank])
            return
        owners = [rank for rank in range(world.size) for _ in self._site.part(self._environments, rank)]
        mine = torch.tensor([owner == world.rank for owner in owners])
        self.memory.take_from(memories, mine)

    def evaluate(self, batch: tuple[Tensor]) -> Figures:
        """Return the mean return of episodes in which the best action is taken."""
        return returns(self.make, batch[0], self._best)

    def report(self) -> Figures:
        """Return the mean return of episodes that have ended, the part of random actions, and the steps acted."""
        ended, self._stream.finished = self._stream.finished, []
        return {
            "return": (sum(ended), float(len(ended))),
            "exploring": (self.exploring(), 1.0),
            "environment_steps": (float(self._acted), 1.0),
        }

    def exploring(self) -> float:
        """Return the part of actions that are now taken at random."""
        return self._along(*self._exploring)

    def _along(self, first: float, last: float) -> float:
        """Return where a straight line is now that reaches ``last`` after the steps of exploration."""
        return first + (last - first) * min(self._acted / self._explore_steps, 1.0)

    @torch.no_grad()
    def _act(self, label: int | str, steps: int, *, random: bool = False) -> None:
        """Take ``steps`` steps over all environments."""
        rounds = -(-steps // self._environments)
        chances = Chances([self._site.generator("exploring", label, number) for number in self._numbers])
        for _ in range(rounds):
            if self._numbers:
                explore = torch.ones(len(self._numbers), dtype=torch.bool) if random else chances() < self.exploring()
                anything = (chances() * self.make.actions).long()
                best = anything if random else self._best(self._stream.observations())
                self.memory.add(*self._stream.step(torch.where(explore, anything, best).tolist()))
            self._acted += 0 if random else self._environments

    def _best(self, observations: Tensor) -> Tensor:
        values: Tensor = self.learned.model(observations.to(self._site.device))
        return values.argmax(-1).cpu()
