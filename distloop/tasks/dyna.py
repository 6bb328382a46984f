"""Model-based reinforcement learning: a learned model of the environment supplies the targets of Q-learning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distloop.tasks.checks import check_sizes
from distloop.tasks.dqn import DQN, QLearning, Transitions
from distloop.tasks.environments import network
from distloop.uneven import PerRank

Outcome = tuple[Tensor, Tensor, Tensor]  # change of the observation in units of its scale, reward, logit of the end


class WorldModel(nn.Module):
    """What follows from an action: the change of the observation, the reward, and whether the episode ends.

    Args:
        observations: size of an observation.
        actions: how many there are.
        hidden: units of each of two hidden layers.
    """

    scale: Tensor

    def __init__(self, observations: int, actions: int, hidden: int):
        super().__init__()
        self.actions, self.size = actions, observations
        self.body = network(observations, hidden, actions * (observations + 2), activation=nn.SiLU)
        self.register_buffer("scale", torch.ones(observations))  # of changes, from the first experience

    def forward(self, observations: Tensor) -> Outcome:
        """Return for observations (n, size) what each action does: (n, actions, size), (n, actions), (n, actions)."""
        answer = self.body(observations).view(-1, self.actions, self.size + 2)
        return answer[..., : self.size], answer[..., -2], answer[..., -1]

    def imagine(self, observations: Tensor) -> Outcome:
        """Return next observations, rewards and probabilities of the end, of each action."""
        change, reward, end = self(observations)
        return observations[:, None] + change * self.scale, reward, end.sigmoid()


class Dynamics:
    """The world model learns from what happened: squared errors of change and reward, cross-entropy of the end."""

    def __init__(self, model: WorldModel):
        self.model: nn.Module = model
        self._world = model

    def guess(self, batch: Transitions) -> Outcome:
        change, reward, end = self.model(batch.observations)
        each = torch.arange(len(batch.actions), device=batch.actions.device)
        return change[each, batch.actions], reward[each, batch.actions], end[each, batch.actions]

    def targets(self, batch: Transitions) -> Outcome:
        change = (batch.following - batch.observations) / self._world.scale
        return change, batch.rewards, batch.terminated.float()

    def loss(self, guesses: Outcome, targets: Outcome) -> Tensor:
        return (
            F.mse_loss(guesses[0], targets[0])
            + F.mse_loss(guesses[1], targets[1])
            + F.binary_cross_entropy_with_logits(guesses[2], targets[2])
        )


class Imagination(QLearning):
    """Q-learning of every action in remembered states; what would follow comes from the world model."""

    def __init__(self, model: nn.Module, world: WorldModel, *constants: Any):
        super().__init__(model, *constants)
        self.world = world

    def guess(self, batch: Transitions) -> Tensor:
        values: Tensor = self.model(batch.observations)
        return values

    @torch.no_grad()
    def targets(self, batch: Transitions) -> tuple[Tensor, Transitions]:
        following, rewards, ended = self.world.imagine(batch.observations)
        return self.backed_up(rewards, following, ended), batch

    def loss(self, values: Tensor, targets: tuple[Tensor, Transitions]) -> Tensor:
        return F.smooth_l1_loss(values, targets[0])


class Dyna(DQN):
    """Dyna (Sutton 1991) in gymnasium's environments: act, learn a model of the world, and plan by imagining with it.

    Two learners take turns on what is drawn from the memory: the world model learns what followed, and the values of
    all actions learn from what the model says would follow. Fewer steps are acted for each update than without a model.

    Args:
        model_hidden: units of each of the world model's two hidden layers.
        others: as :class:`distloop.tasks.dqn.DQN` has them.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        environments: int = 8,
        steps: int = 64,
        warm_up: int = 512,
        replay_ratio: float = 64.0,
        capacity: int = 50_000,
        hidden: int = 256,
        model_hidden: int = 128,
        discount: float = 0.99,
        explore_from: float = 1.0,
        explore_to: float = 0.05,
        explore_steps: int = 2_000,
        target_decay: float = 0.99,
        target_every: int = 1,
        evaluation_episodes: int = 20,
    ):
        check_sizes(model_hidden=model_hidden)
        self._model_hidden = model_hidden
        super().__init__(
            environment,
            environments=environments,
            steps=steps,
            warm_up=warm_up,
            replay_ratio=replay_ratio,
            capacity=capacity,
            hidden=hidden,
            discount=discount,
            explore_from=explore_from,
            explore_to=explore_to,
            explore_steps=explore_steps,
            target_decay=target_decay,
            target_every=target_every,
            evaluation_episodes=evaluation_episodes,
        )
        self.objectives = {"dynamics": Dynamics(self._world), **self.objectives}

    def make_learned(self, model: nn.Module, *constants: Any) -> QLearning:
        self._world = WorldModel(self.make.observations, self.make.actions, self._model_hidden)
        return Imagination(model, self._world, *constants)

    def collect(self, epoch: int) -> PerRank:
        collected = super().collect(epoch)
        if epoch == 0:
            self._measure()
        return collected

    def _measure(self) -> None:
        """Take the scale of changes from the warm-up of all ranks."""
        held = self.memory.draw(1024).rows if len(self.memory) else None
        size = self.make.observations
        own = torch.zeros(size + 1, dtype=torch.float64)
        if held is not None:
            changes = (held[3] - held[0]).double()
            own = torch.cat([changes.square().sum(0), torch.tensor([float(len(changes))], dtype=torch.float64)])
        total = self._site.total(own)
        self._world.scale.copy_((total[:size] / total[size]).sqrt().clamp(min=1e-6))
