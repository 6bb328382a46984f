"""Step time on the emulated accelerator against what bounds it, ours and the serial order taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distloop.optimizer import Optimizer, OptimizerShard
from distloop.strategies import Options, Strategy
from distloop.strategies.zero_offload import ZeroOffload
from distloop.strategies.zero_offload.links import Mark
from distloop.transforms import ClipByNorm, Collected
from distloop.transports import Alone
from offloading.device import Accelerator, EmulatedLink
from offloading.serial import Serial
from offloading.training import learner_of, train

LAYERS, WIDTH = 64, 2**19  # parameters of a layer, which is a bucket: as many buckets as 0.8 B parameters have on a GPU
PARAMETERS = LAYERS * WIDTH
OPTIONS = {"bucket_mb": 2 * WIDTH / 2**20, "weights": torch.bfloat16}
CLIP = 1.0  # of a norm of about 80: it always clips
WARM_UP = 2  # steps of a turn that are not timed: nothing of a step before is under way yet
ADAM = 0.15  # seconds for all parameters, of which its arithmetic is a part


@dataclass(frozen=True)
class Regime:
    """How long the accelerator and each direction of the link take, as multiples of Adam's time."""

    accelerator: float
    link: float
    must: bool = False  # whether the must holds here: Adam fits into the forward pass, as it does with large batches

    @property
    def name(self) -> str:
        return f"{self.accelerator:g} : {self.link:g} : 1"


REGIMES = [
    Regime(4.0, 0.5, must=True),
    Regime(2.0, 0.5),
    Regime(1.0, 0.5),
    Regime(0.5, 0.5),
    Regime(1.0, 2.0),
]


class PacedOptimizer(Optimizer):
    """Does the arithmetic, then waits until an emulated host would have done it: the cores here are not ours alone.

    That a wait ends late is taken off the next one.
    """

    late = 0.0

    def apply(self, collected: Collected, shard: OptimizerShard) -> None:
        begin = time.perf_counter()
        super().apply(collected, shard)
        numel = sum(values.numel() for group in shard.groups for values in group.values)
        end = begin + ADAM * numel / PARAMETERS - self.late
        time.sleep(max(0.0, end - time.perf_counter()))
        self.late = min(max(0.0, time.perf_counter() - end), 1e-3)


class Side:
    """A model with its strategy, which trains by the loop's own lines."""

    def __init__(self, name: str, make: Callable[[dict[str, nn.Parameter], EmulatedLink], Strategy], *, clip: bool):
        self.name = name
        self.accelerator = Accelerator(LAYERS, WIDTH, torch.bfloat16)
        self.link = EmulatedLink(self.accelerator.clock, 1e9)
        self.strategy = make(dict(self.accelerator.model.named_parameters()), self.link)
        self.learner = learner_of(
            self.accelerator.model, self.strategy, clip=CLIP if clip else None, optimizer=PacedOptimizer
        )

    def train(self, steps: int) -> list[float]:
        """Return when each step began, and when the model had the values of the last."""
        times, batch = [], torch.ones(())
        for _ in range(steps):
            times.append(time.perf_counter())
            train(self.learner, batch)
            self.accelerator.step += 1
        with self.strategy.whole():
            times.append(time.perf_counter())
        return times

    def adam(self) -> float:
        """Update all shards once, with nothing beside it; return how long that took."""
        shards = self.learner.parameters
        own = [[segment.values for segment in shard] for shard in self.strategy.shards]
        row = self.accelerator.gradient(0)
        gradients = [[row[: len(values)] for values in segments] for segments in own]
        begin = time.perf_counter()
        for shard, some in zip(shards, gradients, strict=True):
            self.learner.optimizer.apply(Collected(some, torch.tensor(2.0)), shard)
        return time.perf_counter() - begin

    def values(self) -> list[Tensor]:
        return [segment.values for shard in self.strategy.shards for segment in shard]


def alone(side: Side) -> dict[str, float]:
    """Return how long each part of a step takes by itself, which should be what is asked for; least of three."""
    accelerator, link = side.accelerator, side.link
    row = torch.zeros(WIDTH, dtype=torch.bfloat16)
    to = [torch.empty_like(row) for _ in range(2)]

    def work(seconds: float) -> None:
        for _ in range(LAYERS):
            accelerator.clock.work(seconds)

    def copy(there: Callable[[Tensor, Tensor], Mark]) -> None:
        marks = [there(row, to[i % 2]) for i in range(LAYERS)]
        marks[-1].wait()

    parts = {
        "forward": lambda: work(accelerator.forward_seconds),
        "backward": lambda: work(accelerator.backward_seconds),
        "down": lambda: copy(link.down),
        "up": lambda: copy(link.up),
        "norm": lambda: norm_of_all(side),
    }
    return {name: min(_seconds(part) for _ in range(3)) for name, part in parts.items()}


def norm_of_all(side: Side) -> None:
    row = side.accelerator.gradient(0)
    stream = ((i, Collected([row])) for i in range(LAYERS))
    next(iter(ClipByNorm(CLIP)(stream, lambda amount: amount)))


def _seconds(do: Callable[[], None]) -> float:
    begin = time.perf_counter()
    do()
    return time.perf_counter() - begin


def measure(
    regimes: list[Regime], *, turns: int, steps: int, clip: bool, delayed: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a row for each regime: times alone, and times per step of ours and of the serial orders."""
    options = Options(**OPTIONS, delayed_update=delayed)  # type: ignore[arg-type]
    sides = [
        Side("ours", lambda p, link: ZeroOffload(p, Alone(), options, link), clip=clip),
        Side("serial", lambda p, link: Serial(p, options, link), clip=clip),
        Side("early", lambda p, link: Serial(p, options, link, early=True), clip=clip),
    ]
    for side in sides:
        side.train(2)
    for regime in regimes:
        for side in sides:
            side.accelerator.set_seconds(regime.accelerator * ADAM)
            side.link.set_rate(2 * PARAMETERS / (regime.link * ADAM))
        times: dict[str, list[float]] = {side.name: [] for side in sides}
        for turn in range(turns):
            for side in sides if turn % 2 else sides[::-1]:
                stamps = side.train(WARM_UP + steps)
                times[side.name] += [b - a for a, b in zip(stamps[WARM_UP:-2], stamps[WARM_UP + 1 :], strict=False)]
        row = {"regime": regime.name, "must": regime.must and clip, "clip": clip, "delayed": delayed, "times": times}
        seconds, link = regime.accelerator * ADAM, regime.link * ADAM
        row |= {"forward": seconds / 3, "backward": seconds * 2 / 3, "down": link, "up": link, "cpu": ADAM}
        row["alone"] = alone(sides[0]) | {"cpu": min(side.adam() for _ in range(2) for side in sides)}
        own, *others = (side.values() for side in sides)
        row["equal"] = all(torch.equal(a, b) for other in others for a, b in zip(own, other, strict=True))
        yield row
    for side in sides:
        side.strategy.close()


def bounds(row: dict[str, Any]) -> tuple[float, float]:
    """Return the issue's floor, and what the order of a step leaves of it.

    Gradients exist in backward alone. Nothing may be applied before the norm is known, which is after backward; values
    that are delayed are all of the step before, so they too begin to go up then.
    """
    forward, backward, down, up, cpu = (row[key] for key in ("forward", "backward", "down", "up", "cpu"))
    floor = max(forward + backward, down, up, cpu)
    if row["delayed"]:
        return floor, max(max(backward, down) + max(forward, up), cpu)
    if row["clip"]:
        return floor, max(backward, down) + max(forward, cpu, up)
    return floor, max(max(backward, down) + forward, up, cpu)
