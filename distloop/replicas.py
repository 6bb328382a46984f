"""Whether ranks that should hold the same values do: one flipped bit, or one rank that computes otherwise, is named.

Each rank adds up the memory of its replicas as whole numbers modulo 2**64; one flipped bit changes such a sum by a
power of two, which is never zero. The sums travel while the next step is computed, and are compared after it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from distloop.errors import MismatchError
from distloop.learner import Learner
from distloop.strategies.base import is_dense
from distloop.transports import Rows, Transport

PART = 0.008  # of the time of a step that comparing may cost, where the interval is its own to choose
MOST = 100_000  # steps between two comparisons
SHOWN = 3  # tensors that a sentence names
ODD = -7046029254386353131  # 2**64 divided by the golden ratio; odd, so no single change is lost in the product


def digest(tensor: Tensor) -> int:
    """Return a number that one flipped bit always changes; of any dtype, any strides, any device."""
    return int(_digest(tensor.detach()))


def _digest(tensor: Tensor) -> Tensor:
    """Return it as a scalar, without device synchronisation."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    # Of what fills its memory the order there will do: replicas lie alike.
    flat = tensor.as_strided((tensor.numel(),), (1,)) if is_dense(tensor) else tensor.contiguous().view(-1)
    itemsize, first = flat.itemsize, flat.storage_offset()
    if 8 % itemsize == 0 and (first * itemsize) % 8 == 0 and (flat.numel() * itemsize) % 8 == 0:
        return flat.view(torch.int64).sum()
    if itemsize == 4:  # a scalar, mostly
        return flat.view(torch.int32).sum()
    octets = flat.view(torch.uint8)
    head = min(-octets.storage_offset() % 8, octets.numel())
    body = (octets.numel() - head) // 8 * 8
    rest = octets[:head].sum() + octets[head + body :].sum()
    return octets[head : head + body].view(torch.int64).sum() + rest if body else rest


class Replicas:
    """Compares what every rank has a copy of, now and then.

    Args:
        transport: to the other ranks.
        tensors: returns the replicas by name, the same names in the same order on all ranks. They are looked up at each
            comparison, and may become more.
        every: steps between two comparisons (None: as many as keep the cost below 1 % of the time, which all ranks
            agree on).
        whole: returns the context in which tensors may be read.
        buffers: returns those tensors that training may write to without the other ranks. A difference in one that has
            been written to, on any rank, is no alarm, and it is looked at no more.
    """

    def __init__(
        self,
        transport: Transport,
        tensors: Callable[[], Mapping[str, Tensor]],
        every: int | None = None,
        *,
        whole: Callable[[], AbstractContextManager[object]] = nullcontext,
        buffers: Callable[[], Mapping[str, Tensor]] = dict,
    ):
        self._transport, self._tensors, self._every, self._whole, self._buffers = (
            transport,
            tensors,
            every,
            whole,
            buffers,
        )
        self.interval = 1 if every is None else every
        self._versions = {name: tensor._version for name, tensor in buffers().items()}
        self._own_business: set[str] = set()
        self._next = self.interval
        self._last: tuple[int, float] | None = None  # step and time of the last comparison
        self._names: list[str] = []
        self._digests = torch.zeros(0, dtype=torch.int64)
        self._pending: tuple[int, Rows] | None = None

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Note that ``step`` is done; call it on every rank at every step.

        Raises:
            MismatchError: on all ranks alike, if replicas differed at the last comparison; names tensors and ranks.
        """
        if self._transport.size == 1:
            return
        if self._pending is not None:
            (compared, rows), self._pending = self._pending, None
            self._read(compared, rows.wait(), step)
        if step >= self._next:
            self._begin(step)
            self._next = step + self.interval + (self._every is None)  # where it is chosen, it is so at the next step

    def _begin(self, step: int) -> None:
        begun = time.monotonic()
        pace = 0.0 if self._last is None else (begun - self._last[1]) / max(step - self._last[0], 1)
        with self._whole():
            found = {**self._tensors(), **self._buffers()}
            self._names = [name for name in found if name not in self._own_business]
            self._digests = _on_host([_digest(found[name]) for name in self._names])
        weights = torch.arange(len(self._names), dtype=torch.int64) * 2 + ODD
        self._last = step, time.monotonic()
        figures = [len(self._names), int((self._digests * weights).sum())]
        times = [int(1e9 * (self._last[1] - begun)), int(1e9 * pace)]
        row = torch.tensor(figures + times, dtype=torch.int64)
        self._pending = step, self._transport.all_gather(row)

    def _read(self, compared: int, rows: Tensor, step: int) -> None:
        if self._every is None:
            cost, pace = int(rows[:, 2].max()), int(rows[:, 3].max())
            # The first comparison knows no pace yet; the next is soon, and measures it.
            self.interval = min(max(math.ceil(cost / (PART * pace)), 1), MOST) if pace else 10
            self._next = step + self.interval
        if (rows[:, :2] == rows[0, :2]).all():
            return
        if (rows[:, 0] != rows[0, 0]).any():
            raise MismatchError(
                f"replicas differ at step {compared}: the numbers of tensors by rank are {rows[:, 0].tolist()}"
            )
        self._name(compared)

    def _name(self, compared: int) -> None:
        """Find the tensors that differed, and on which ranks."""
        buffers = self._buffers()
        written = [name in buffers and buffers[name]._version != self._versions.get(name, -1) for name in self._names]
        own = torch.stack([self._digests, torch.tensor(written, dtype=torch.int64)])
        digests, written_by = self._transport.all_gather(own).wait().unbind(1)
        differing = (digests != digests[0]).any(0).nonzero().flatten().tolist()
        excused = {i for i in differing if written_by[:, i].any()}
        self._own_business |= {self._names[i] for i in excused}
        found = [f"{self._names[i]} {_whose(digests[:, i].tolist())}" for i in differing if i not in excused]
        if found:
            more = f", and {len(found) - SHOWN} tensors more" if len(found) > SHOWN else ""
            raise MismatchError(f"replicas differ at step {compared}: {', '.join(found[:SHOWN])}{more}")


def _whose(digests: Sequence[int]) -> str:
    """Return in words which ranks are to blame: those outside the majority, if there is one."""
    (value, count), size = Counter(digests).most_common(1)[0], len(digests)
    if 2 * count > size:
        odd = [rank for rank, other in enumerate(digests) if other != value]
        return f"on rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))} (of {size})"
    groups: dict[int, list[int]] = {}
    for rank, other in enumerate(digests):
        groups.setdefault(other, []).append(rank)
    sides = [f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" for ranks in groups.values()]
    return f"between {' and '.join(sides)} (of {size}; nobody knows who is right)"


def _on_host(digests: Sequence[Tensor]) -> Tensor:
    """Return scalars in one tensor on the CPU, with one copy from each device."""
    places: dict[torch.device, list[int]] = {}
    for i, one in enumerate(digests):
        places.setdefault(one.device, []).append(i)
    result = torch.zeros(len(digests), dtype=torch.int64)
    for indices in places.values():
        result[indices] = torch.stack([digests[i] for i in indices]).cpu()
    return result


def compare(learners: Sequence[Learner], transport: Transport, every: int | None = None) -> Replicas | None:
    """Return what compares all that these learners should hold alike on every rank; nothing does ``every`` 0 steps."""
    if every == 0 or transport.size == 1:
        return None

    def whole() -> AbstractContextManager[object]:
        stack = ExitStack()
        for learner in learners:
            stack.enter_context(learner.strategy.still())
        return stack

    return Replicas(
        transport,
        lambda: {name: tensor for learner in learners for name, tensor in _of(learner).items()},
        every,
        whole=whole,
        buffers=lambda: {name: tensor for learner in learners for name, tensor in _buffers(learner).items()},
    )


def _of(learner: Learner) -> dict[str, Tensor]:
    """Return the model's parameters, and the optimizer's state where every rank updates whole parameters."""
    found: dict[str, Tensor] = {
        f"parameter {learner.name}.{name}": p for name, p in learner.objective.model.named_parameters()
    }
    segments = [segment for shard in learner.strategy.shards for segment in shard]
    whole = {segment.name for segment in segments if segment.stop - segment.start == segment.parameter.numel()}
    if learner.strategy.updates_itself or whole != set(learner.strategy.parameters) or learner.strategy.on_host:
        return found
    for shard, parts in zip(learner.strategy.shards, learner.parameters, strict=True):
        for group in parts.groups:
            states = [(key, group.indices, tensors) for key, tensors in group.state.items()]
            instances = getattr(learner.optimizer.rule, "_instances", {})
            if (torch_optimizer := instances.get(id(group))) is not None:
                for index, values in zip(group.indices, group.values, strict=True):
                    kept = torch_optimizer.state[values].items()
                    states += [(key, [index], [t]) for key, t in kept if isinstance(t, Tensor)]
            for key, indices, tensors in states:
                for index, tensor in zip(indices, tensors, strict=True):
                    found[f"optimizer state {key} of {learner.name}.{shard[index].name}"] = tensor
    return found


def _buffers(learner: Learner) -> dict[str, Tensor]:
    """Return the model's buffers but BatchNorm's: those are each rank's own between evaluations."""
    return {
        f"buffer {learner.name}.{prefix}{'.' * bool(prefix)}{name}": buffer
        for prefix, module in learner.objective.model.named_modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module.named_buffers(recurse=False)
    }
