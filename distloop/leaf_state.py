"""What forward passes draw, and what they leave in buffers: the same whatever the number of ranks."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from distloop.collectives.tree import Fold, sum_nodes
from distloop.data import derive_seed
from distloop.errors import ConfigError
from distloop.strategies import Strategy


def seed_generators(device: torch.device, *parts: int | str) -> None:
    """Seed torch's generators, Python's and numpy's by ``parts``."""
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


class LeafState:
    """One learner's random numbers and its models' buffers, leaf by leaf.

    Each leaf begins with generators seeded by (seed, turn, learner, leaf), and with the buffers as they were at the
    beginning of the turn. After the turn each buffer has moved by the mean of what the leaves have moved it, weighted
    by their shares of the global batch, in double precision and along the tree of leaves; integers are rounded.

    Args:
        name: of the learner.
        seed: of the run.
        models: all that a forward pass of the learner may run; a buffer that none of them moves costs a comparison.
        strategy: the learner's.
    """

    def __init__(self, name: str, seed: int, models: Iterable[nn.Module], strategy: Strategy):
        self._name, self._seed = name, seed
        self._transport, self._leaves = strategy.transport, strategy.leaves
        self._device = next(iter(strategy.parameters.values())).device
        found = {
            id(buffer): (module, key)
            for module in dict.fromkeys(module for model in models for module in model.modules())
            for key, buffer in module._buffers.items()
            if buffer is not None
        }
        self._places = list(found.values())
        self._moving: list[int] = []  # the numbers of those that a forward pass has been seen to move
        self._base: list[Tensor] = []  # as they were at the beginning of the turn
        self._moved: list[tuple[list[int], Tensor]] = []  # by leaf, weighted; beside it whose movements these are
        self._first = 0

    def begin(self, turn: int, leaf: int) -> None:
        """Get ready for the forward pass of a leaf."""
        seed_generators(self._device, "leaf", self._seed, turn, self._name, leaf)
        if self._places and not self._base:
            self._first, self._base = leaf, [buffer.clone() for buffer in self._buffers(range(len(self._places)))]

    @torch.no_grad()
    def end(self, share: float) -> None:
        """Take note of how a leaf has moved the buffers, and put them back."""
        if not self._places:
            return
        every = range(len(self._places))
        moving = set(self._moving)
        still = [i for i in every if i not in moving]
        moving |= {i for i, now in zip(still, self._buffers(still), strict=True) if not torch.equal(now, self._base[i])}
        self._moving = sorted(moving)
        if not self._moving:
            self._moved.append(([], torch.empty(0)))
            return
        buffers, base = self._buffers(self._moving), [self._base[i] for i in self._moving]
        now, before = _flat(buffers), _flat(base)
        by = (now - before).masked_fill_(now == before, 0.0)  # infinity has not moved from infinity
        self._moved.append((self._moving, by.mul_(share) if share else torch.zeros_like(by)))
        torch._foreach_copy_(buffers, base)

    @torch.no_grad()
    def settle(self, turn: int) -> None:
        """Move the buffers on, alike on every rank, and get ready for what follows a turn; all ranks call it."""
        seed_generators(self._device, "turn", self._seed, turn, self._name)
        if not self._places:
            return
        flags = torch.zeros(len(self._places), dtype=torch.uint8)
        flags[self._moving] = 1
        together = self._transport.all_gather(flags).wait().amax(0).nonzero().flatten().tolist()
        if together:
            self._move(together)
        self._moving, self._base, self._moved = together, [], []

    def _move(self, together: list[int]) -> None:
        base = [self._base[i] for i in together]
        sizes = [buffer.numel() for buffer in base]
        fold = Fold(self._leaves, self._first)
        for numbers, moved in self._moved:
            parts = dict(zip(numbers, moved.split([self._base[i].numel() for i in numbers]), strict=True))
            rows = [parts[i] if i in parts else torch.zeros_like(self._base[i]).view(-1).double() for i in together]
            fold.add(torch.cat(rows))
        total = torch.empty(sum(sizes), dtype=torch.float64, device=base[0].device)
        sum_nodes(self._transport, fold.take(), self._leaves, into=total)
        for buffer, before, part in zip(self._buffers(together), base, total.split(sizes), strict=True):
            by = part.view(before.shape)
            if before.is_floating_point():
                moved = (before.double() + by).to(before.dtype)
            else:
                moved = (before.double() + by).round().to(before.dtype)
            buffer.copy_(torch.where(by == 0.0, before, moved))

    def _buffers(self, numbers: Sequence[int]) -> list[Tensor]:
        """Return buffers as they are now: a module may have put another tensor where one was."""
        found = []
        for i in numbers:
            module, key = self._places[i]
            buffer = module._buffers[key]
            if buffer is not None:
                buffer = torch.view_as_real(buffer.detach()) if buffer.is_complex() else buffer.detach()
            before = self._base[i] if self._base else buffer
            if buffer is None or before is None or buffer.shape != before.shape or buffer.dtype != before.dtype:
                raise ConfigError(
                    f"objective {self._name!r}: a forward pass gave buffer {key!r} of a {type(module).__name__} "
                    "another shape or dtype, so that there is no mean over the leaves of a global batch; keep them, or "
                    "turn train.deterministic off"
                )
            found.append(buffer)
        return found


def _flat(buffers: Sequence[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1).double() for buffer in buffers])
