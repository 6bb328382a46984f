"""A small environment whose every number can be foreseen."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Corridor(gymnasium.Env[Any, Any]):
    """Stand at 0 of a corridor whose length the seed decides (2 to 6); action 5 stays, 6 goes on; the end ends it.

    Observations are (place, length); the reward is 1 for a step onwards and -0.5 for staying.
    """

    observation_space = gymnasium.spaces.Box(-100.0, 100.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2, start=5)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.length, self.place = int(self.np_random.integers(2, 7)), 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.place += int(action) - 5
        return self._seen(), 1.0 if action == 6 else -0.5, self.place == self.length, False, {}

    def _seen(self) -> Any:
        return np.array([self.place, self.length], dtype=np.float32)


class Matrices(Corridor):
    observation_space = gymnasium.spaces.Box(0.0, 1.0, (3, 4), np.float32)


gymnasium.register("Corridor-v0", Corridor, max_episode_steps=12)
gymnasium.register("Matrices-v0", Matrices)
