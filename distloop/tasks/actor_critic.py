"""On-policy reinforcement learning: an actor and a critic learn from episodes that the actor has just played."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distloop.objective import Objective
from distloop.site import Site
from distloop.tasks.checks import check_choice, check_range, check_sizes
from distloop.tasks.environments import Chances, Episode, Figures, Maker, network, play, returns, stacked
from distloop.uneven import PerRank

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # observations, actions, log probabilities, advantages, returns


class Actor:
    """The policy. Its loss is the clipped surrogate of proximal policy optimisation, minus an entropy bonus.

    ``-mean(min(r A, clip(r, 1 - c, 1 + c) A)) - b mean(H)``, with r the probability of the action over that when it was
    taken (Schulman et al. 2017, equations 7 and 9); before the first update r is 1, and the gradient the plain actor's.
    """

    def __init__(self, model: nn.Module, clip: float, entropy: float):
        self.model, self.clip, self.entropy = model, clip, entropy

    def guess(self, batch: Batch) -> Tensor:
        scores: Tensor = self.model(batch[0])
        return scores

    def targets(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return batch[1], batch[2], batch[3]

    def loss(self, scores: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        actions, before, advantages = targets
        policy = Categorical(logits=scores, validate_args=False)
        ratio: Tensor = (policy.log_prob(actions) - before).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1.0 - self.clip, 1.0 + self.clip) * advantages)
        uncertainty: Tensor = policy.entropy()
        return -surrogate.mean() - self.entropy * uncertainty.mean()


class Critic:
    """The value of a state: the mean squared difference to the returns that followed."""

    def __init__(self, model: nn.Module):
        self.model = model

    def guess(self, batch: Batch) -> Tensor:
        values: Tensor = self.model(batch[0])
        return values[:, 0]

    def targets(self, batch: Batch) -> Tensor:
        return batch[4]

    def loss(self, values: Tensor, returns: Tensor) -> Tensor:
        return F.mse_loss(values, returns)


class Both:
    """Actor and critic on a shared body: one model whose last output is the value, one loss that is a sum."""

    def __init__(self, model: nn.Module, clip: float, entropy: float, value_weight: float):
        self.model, self.value_weight = model, value_weight
        self._actor, self._critic = Actor(model, clip, entropy), Critic(model)

    def guess(self, batch: Batch) -> Tensor:
        outputs: Tensor = self.model(batch[0])
        return outputs

    def targets(self, batch: Batch) -> Batch:
        return batch

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        actor = self._actor.loss(outputs[:, :-1], self._actor.targets(batch))
        critic = self._critic.loss(outputs[:, -1], self._critic.targets(batch))
        return actor + self.value_weight * critic


class ActorCritic:
    """Actor and critic in one of gymnasium's environments with numbered actions.

    Each epoch plays ``episodes`` whole episodes over all ranks and learns from them. Episodes are numbered over all
    ranks, and each has seeds of its own for the environment and for the choice of actions: on any number of ranks the
    same episodes are played, as long as the policies are the same to the last bit.

    Args:
        environment: gymnasium's name of it.
        episodes: played in an epoch, over all ranks; a rank may get none.
        passes: how often each transition is learned from.
        body: ``separate`` networks, taking turns as two learners, or one ``shared`` network with the sum of the losses.
        hidden: units of each of two hidden layers.
        discount: gamma.
        trace: lambda of generalised advantage estimation (Schulman et al. 2016, equation 16).
        clip: how far the policy's ratio may move before it stops counting; see :class:`Actor`.
        entropy: weight of the entropy bonus.
        value_weight: of the critic's loss, with a shared body.
        evaluation_episodes: played to evaluate, always the same ones, taking the likeliest actions.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        episodes: int = 16,
        passes: int = 4,
        body: Literal["separate", "shared"] = "separate",
        hidden: int = 64,
        discount: float = 0.99,
        trace: float = 0.95,
        clip: float = 0.2,
        entropy: float = 0.0,
        value_weight: float = 0.5,
        evaluation_episodes: int = 20,
    ):
        check_sizes(episodes=episodes, passes=passes, hidden=hidden, evaluation_episodes=evaluation_episodes)
        check_range(0.0, 1.0, discount=discount, trace=trace, clip=clip)
        check_range(0.0, entropy=entropy, value_weight=value_weight)
        check_choice("body", body, ("separate", "shared"))
        self._make, self._episodes, self._passes = Maker(environment), episodes, passes
        self._discount, self._trace, self._shared = discount, trace, body == "shared"
        inputs, actions = self._make.observations, self._make.actions
        if self._shared:
            both = network(inputs, hidden, actions + 1)
            self.objectives: Mapping[str, Objective] = {"actor_critic": Both(both, clip, entropy, value_weight)}
        else:
            actor, critic = network(inputs, hidden, actions, scale=0.01), network(inputs, hidden, 1)
            self.objectives = {"actor": Actor(actor, clip, entropy), "critic": Critic(critic)}
        self.validation = TensorDataset(torch.arange(evaluation_episodes))
        self._returns: list[float] = []  # of the episodes played since the last report
        self._steps = 0
        self._site: Site

    def join(self, site: Site) -> None:
        self._site = site

    def collect(self, epoch: int) -> PerRank:
        """Play this rank's episodes."""
        numbers = self._site.part(self._episodes)
        seeds = [self._site.seed_of("episode", epoch, number) for number in numbers]
        chances = Chances([self._site.generator("actions", epoch, number) for number in numbers])
        log_probabilities: list[list[Tensor]] = [[] for _ in numbers]

        def act(observations: Tensor, running: Sequence[int]) -> Tensor:
            log_policy = self._scores(observations).log_softmax(-1)
            chance = chances()[list(running)]
            # The last action gets what rounding leaves of 1.
            actions = (log_policy.exp().cumsum(-1)[:, :-1] <= chance[:, None]).sum(-1)
            for i, chosen in zip(running, log_policy.gather(1, actions[:, None])[:, 0], strict=True):
                log_probabilities[i].append(chosen)
            return actions

        with torch.no_grad():
            episodes = play(self._make, seeds, act) if numbers else []
            advantages, returns = self._judge(episodes)
        self._returns += [episode.total for episode in episodes]
        self._steps += sum(len(episode.actions) for episode in episodes)
        if not episodes:
            return PerRank(None, self._passes)
        observations = torch.cat([stacked(episode.observations[:-1]) for episode in episodes])
        actions = torch.tensor([action for episode in episodes for action in episode.actions])
        before = torch.stack([chosen for own in log_probabilities for chosen in own])
        return PerRank(TensorDataset(observations, actions, before, advantages, returns), self._passes)

    def evaluate(self, batch: tuple[Tensor]) -> Figures:
        """Return the mean return of episodes in which the likeliest action is taken."""
        return returns(self._make, batch[0], lambda observations: self._scores(observations).argmax(-1))

    def report(self) -> Mapping[str, tuple[float, float] | float]:
        """Return the mean return of the episodes learned from, and the steps acted so far by all ranks."""
        played, self._returns = self._returns, []
        return {
            "return": (sum(played), float(len(played))),
            "environment_steps": self._steps,
        }

    def state(self) -> dict[str, Any]:
        """Return what is still to be reported; the episodes of an epoch are in the checkpoint as its data."""
        return {"returns": list(self._returns), "steps": self._steps}

    def restore(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of all ranks; of other ranks than before, the first has what is to be reported."""
        rank, same = self._site.world.rank, len(states) == self._site.world.size
        own = [states[rank]] if same else states if rank == 0 else []
        self._returns = [value for state in own for value in state["returns"]]
        self._steps = sum(state["steps"] for state in own)

    def _scores(self, observations: Tensor) -> Tensor:
        (name, *_) = self.objectives
        outputs: Tensor = self.objectives[name].model(observations.to(self._site.device)).cpu()
        return outputs[:, :-1] if self._shared else outputs

    def _values(self, observations: Tensor) -> Tensor:
        (*_, name) = self.objectives
        outputs: Tensor = self.objectives[name].model(observations.to(self._site.device)).cpu()
        return outputs[:, -1]

    def _judge(self, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        """Return advantages, normalised over the episodes of all ranks, and the returns that the critic learns."""
        parts, returns = [torch.empty(0)], [torch.empty(0)]
        for episode in episodes:
            values = self._values(stacked(episode.observations)).double()
            if episode.terminated:
                values[-1] = 0.0
            advantages = advantage(torch.tensor(episode.rewards), values, self._discount, self._trace)
            parts.append(advantages.float())
            returns.append((advantages + values[:-1]).float())
        own = torch.cat(parts).double()
        count, total, squares = self._site.total(
            torch.stack([torch.tensor(float(len(own))).double(), own.sum(), own.square().sum()])
        ).tolist()
        mean = total / count
        deviation = max(squares / count - mean**2, 0.0) ** 0.5
        return ((own - mean) / (deviation + 1e-8)).float(), torch.cat(returns)


def advantage(rewards: Tensor, values: Tensor, discount: float, trace: float) -> Tensor:
    """Return generalised advantage estimates (Schulman et al. 2016, equation 16).

    Args:
        rewards: of T steps, shape (T,).
        values: of the T + 1 states, the last being 0 if the episode ended there; shape (T + 1,).
        discount: gamma.
        trace: lambda.
    """
    errors = (rewards + discount * values[1:] - values[:-1]).tolist()
    found = [0.0] * len(errors)
    running = 0.0
    for t in reversed(range(len(errors))):
        found[t] = running = errors[t] + discount * trace * running
    return torch.tensor(found, dtype=torch.float64)
