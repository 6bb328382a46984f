"""Replicas that differ in one bit are found and named, and those that do not differ never are."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from distloop import replicas
from distloop.errors import MismatchError
from distloop.replicas import Replicas, compare, digest
from distloop.transports import Transport
from tests.ranks import in_processes, in_threads

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.complex64, torch.float8_e5m2]


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flip a bit where it lies, as a cosmic ray does: nobody is told."""
    octets = tensor.detach().untyped_storage()
    at = tensor.storage_offset() * tensor.itemsize
    index = [int(i) for i in torch.unravel_index(torch.tensor(element), tensor.shape)] if tensor.dim() else []
    at += sum(i * s for i, s in zip(index, tensor.stride(), strict=True)) * tensor.itemsize + bit // 8
    octets[at] = octets[at] ^ (1 << bit % 8)


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(0, 9),
    st.sampled_from(["dense", "turned", "gaps"]),
    st.data(),
)
def test_one_flipped_bit_changes_the_digest(
    dtype: torch.dtype, numel: int, offset: int, layout: str, data: st.DataObject
) -> None:
    memory = torch.randint(0, 2, (3 * numel + offset,)).to(torch.float32).to(dtype)
    tensor = memory[offset : offset + numel]
    if layout == "turned":
        tensor = memory[offset : offset + 3 * numel].view(3, numel).t()
    elif layout == "gaps":
        tensor = memory[offset : offset + 3 * numel].view(numel, 3)[:, 1]
    before = digest(tensor)
    assert digest(tensor) == before
    element = data.draw(st.integers(0, tensor.numel() - 1))
    bit = data.draw(st.integers(0, 8 * dtype.itemsize - 1)) if dtype != torch.bool else 0
    flip(tensor, element, bit)
    assert digest(tensor) != before


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.tensor(3.0), torch.ones(4).expand(5, 4)])
def test_of_anything_there_is_a_digest(tensor: Tensor) -> None:
    assert digest(tensor) == digest(tensor.clone())


class Model(nn.Module):
    """With parameters of odd sizes, a constant buffer, and one that each rank writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.sum().detach())
        return self.norm(self.inner(x)) * self.mask


def made(transport: Transport) -> Any:
    """Return a learner of the naive strategy with AdamW."""
    from distloop.learner import Learner
    from distloop.optimizer import Adam, Optimizer
    from distloop.schedules import Constant
    from distloop.strategies import Options, make

    torch.manual_seed(0)
    model = Model()
    parameters = dict(model.named_parameters())
    strategy = make("naive", parameters, transport, Options())
    objective = SimpleNamespace(model=model, guess=lambda b: model(b[0]), targets=lambda b: b[1], loss=F.mse_loss)
    optimizer = Optimizer(Adam(decoupled=True), strategy.shards, dict.fromkeys(parameters, 0.01))
    return Learner("net", objective, strategy, optimizer, lr=1e-3, schedule=Constant())


def steps(transport: Transport, learner: Any, count: int, after: Callable[[int], None]) -> None:
    """Train; every rank has its own data."""
    draws = torch.Generator().manual_seed(transport.rank)
    share = 1.0 / transport.size
    for step in range(1, count + 1):
        batch = (torch.randn(4, 5, generator=draws), torch.randn(4, 3, generator=draws))
        micro = SimpleNamespace(batch=batch, final=True, share=lambda _: share)
        loss = learner.loss(learner.guess(micro), learner.targets(micro))
        for i, collected in learner.gradients(loss, micro).collect():
            learner.optimizer.apply(collected, learner.parameters[i])
            learner.broadcast(i)
        learner.take_losses()
        after(step)


def one_flip(transport: Transport, choose: random.Random, kind: str) -> tuple[str, str]:
    """Flip a bit of a replica of a kind, on some rank at some step; return what it was, and what was said of it."""
    learner = made(transport)
    own = compare([learner], transport, every=5)
    victim, when = choose.randrange(transport.size), choose.randrange(2, 12)
    chance = choose.random(), choose.random(), choose.random()
    flipped = ""

    def after(step: int) -> None:
        nonlocal flipped
        if step == when:
            found = {k: t for k, t in {**own._tensors(), **own._buffers()}.items() if k.startswith(kind)}
            names = sorted(name for name in found if "seen" not in name)
            name = names[int(chance[0] * len(names))]
            if transport.rank == victim:
                # Not the upper bits of an exponent: what has become infinite spreads to all ranks.
                flip(found[name], int(chance[1] * found[name].numel()), int(chance[2] * 23))
            flipped = f"{name} on rank {victim} (of {transport.size})"
        own(step)

    try:
        steps(transport, learner, 20, after)
    except MismatchError as found:
        return flipped, str(found)
    return flipped, ""


def every_flip(transport: Transport, seed: int) -> list[tuple[str, str]]:
    choose = random.Random(seed)
    kinds = ("parameter", "optimizer state", "buffer")
    return [one_flip(transport, choose, kinds[trial % 3]) for trial in range(10)]


def test_flipped_bits_are_found_and_named() -> None:
    by_rank = in_processes(3, every_flip, 1)
    assert by_rank[0] == by_rank[1] == by_rank[2], "all ranks say the same"
    for flipped, said in by_rank[0]:
        assert re.match(r"replicas differ at step \d+: ", said) and flipped in said, (flipped, said)
    assert len(by_rank[0]) == 10


def test_without_digests_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_digest", lambda tensor: torch.zeros((), dtype=torch.int64))
    assert all(said == "" for _, said in in_threads(3, every_flip, 1)[0])


def between_two(transport: Transport) -> str:
    values = {"w": torch.ones(8)}
    own = Replicas(transport, lambda: values, every=1)
    own(1)
    own(2)
    if transport.rank == 1:
        flip(values["w"], 3, 0)
    own(3)
    with pytest.raises(MismatchError) as found:
        own(4)
    return str(found.value)


def test_of_two_ranks_both_are_named() -> None:
    said = in_threads(2, between_two)
    assert said[0] == said[1]
    assert said[0].startswith("replicas differ at step 3: w between rank 0 and rank 1 (of 2")


def hundreds(transport: Transport, count: int) -> tuple[int, int]:
    learner = made(transport)
    own, compared = compare([learner], transport, every=1), []

    def after(step: int) -> None:
        own(step)
        compared.append(len(own._names))

    steps(transport, learner, count, after)
    return len(compared), compared[-1]


def test_there_is_no_false_alarm() -> None:
    for count, names in in_processes(2, hundreds, 500):
        assert count == 500
        assert names == 4 + 3 * 4 + 1, "parameters, AdamW's state, and the buffer that no rank writes to"


def interval(transport: Transport, slowness: float) -> list[int]:
    """Return the intervals chosen where time stands still but for steps of 10 ms and comparisons."""
    clock = [0.0]

    def tensors() -> dict[str, Tensor]:
        clock[0] += slowness * (1 + transport.rank)
        return {"w": torch.ones(8)}

    own, chosen = Replicas(transport, tensors), []
    own_time = SimpleNamespace(monotonic=lambda: clock[0])
    before, replicas_time = replicas.time, own_time
    try:
        replicas.time = replicas_time  # type: ignore[assignment]
        for step in range(1, 400):
            clock[0] += 0.01
            own(step)
            chosen.append(own.interval)
    finally:
        replicas.time = before
    return chosen


def test_the_interval_keeps_the_cost_below_a_percent_and_is_agreed_on() -> None:
    by_rank = in_processes(2, interval, 0.005)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0][0] == 1
    cost, pace = 0.01, 0.01  # of the slower rank, in seconds
    last = by_rank[0][-1]
    assert cost / (last * pace) < 0.01 and last < 200
