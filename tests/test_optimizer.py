"""Rules against torch.optim's classes; clipping and loss scale against torch.nn.utils."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from distloop import optimizer as optimizers
from distloop.errors import NonFiniteError
from distloop.strategies.base import whole
from distloop.transforms import ClipByNorm, ClipByValue, Collected, LossScale, Stream

RULES: dict[str, tuple[Any, Any]] = {
    "sgd": (optimizers.SGD(), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (optimizers.SGD(0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (optimizers.SGD(0.9, True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "adam": (optimizers.Adam(), lambda p: torch.optim.Adam(p, lr=0.1)),
    "adam, constants": (
        optimizers.Adam((0.8, 0.9), 1e-4),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), eps=1e-4),
    ),
    "adamw": (optimizers.Adam(decoupled=True), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0)),
    "rmsprop": (optimizers.RMSProp(), lambda p: torch.optim.RMSprop(p, lr=0.1)),
    "rmsprop, momentum": (
        optimizers.RMSProp(0.9, 1e-6, 0.5),
        lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, eps=1e-6, momentum=0.5),
    ),
    "by class": (optimizers.Torch(torch.optim.NAdam, {}), lambda p: torch.optim.NAdam(p, lr=0.1)),
}


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (5, 3), "bias": (5,), "other": (7,)}
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for n, s in shapes.items()}


def gradients(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=dtype) for p in parameters(dtype).values()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("name", RULES)
def test_same_values_as_torch(name: str, decay: float, dtype: torch.dtype) -> None:
    rule, make = RULES[name]
    if isinstance(rule, optimizers.Torch):  # it keeps instances, so each run needs one of its own
        rule = optimizers.Torch(torch.optim.NAdam, {})
    ours, theirs = parameters(dtype), parameters(dtype)
    decays = {n: decay if n == "weight" else 0.0 for n in ours}
    optimizer = optimizers.Optimizer(rule, [whole(ours)], decays)
    groups = [{"params": [p], "weight_decay": decays[n]} for n, p in theirs.items()]
    reference = make(groups)
    for step in range(6):
        optimizer.lr = reference.param_groups[0]["lr"] = 0.1 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = optimizer.lr
        optimizer.apply(Collected(gradients(step, dtype)), optimizer.shards[0])
        for p, g in zip(theirs.values(), gradients(step, dtype), strict=True):
            p.grad = g
        reference.step()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for n in ours:
        assert torch.allclose(ours[n], theirs[n], rtol=tolerance, atol=tolerance), n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["momentum", "adamw", "rmsprop", "by class"])
def test_a_pending_division_is_carried_out(name: str, dtype: torch.dtype) -> None:
    """Folded into the fused kernel or not, dividing later is the same as having divided."""
    ends = []
    for divided in (False, True):
        rule = optimizers.Torch(torch.optim.NAdam, {}) if name == "by class" else RULES[name][0]
        own = parameters(dtype)
        optimizer = optimizers.Optimizer(rule, [whole(own)], dict.fromkeys(own, 0.0))
        optimizer.lr = 0.1
        for step in range(3):
            grads = gradients(step, dtype)
            divisor = torch.tensor(8.0)
            collected = Collected([g / 8 for g in grads]) if divided else Collected(grads, divisor)
            optimizer.apply(collected, optimizer.shards[0])
        ends.append(torch.cat([p.detach().view(-1) for p in own.values()]))
    assert torch.allclose(*ends, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


def test_a_class_decays_what_it_is_told_to_and_nothing_else() -> None:
    """torch.optim.AdamW's own default would decay biases by 0.01."""
    own = parameters(torch.float64)
    optimizer = optimizers.Optimizer(
        optimizers.Torch(torch.optim.AdamW, {}), [whole(own)], {"weight": 0.1, "bias": 0.0, "other": 0.0}
    )
    optimizer.lr = 0.5
    before = {n: p.detach().clone() for n, p in own.items()}
    optimizer.apply(Collected([torch.zeros_like(p) for p in own.values()]), optimizer.shards[0])
    assert torch.allclose(own["weight"], before["weight"] * 0.95)
    assert torch.equal(own["bias"], before["bias"])


def one_by_one(values: list[torch.Tensor]) -> Stream:
    yield from ((i, Collected([value])) for i, value in enumerate(values))


def identity(amount: torch.Tensor) -> torch.Tensor:
    return amount


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clip_by_norm_as_torch_over_several_shards(max_norm: float) -> None:
    ours, theirs = gradients(0, torch.float64), parameters(torch.float64)
    for p, g in zip(theirs.values(), gradients(0, torch.float64), strict=True):
        p.grad = g
    norm = nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    clip = ClipByNorm(max_norm)
    expected, order = list(theirs.values()), []
    for i, collected in clip(one_by_one(ours), identity):
        assert torch.allclose(collected.settle()[0], expected[i].grad, rtol=1e-13, atol=0)
        order.append(i)
    assert order == list(range(len(expected)))[::-1], "what forward needs first is behind"
    assert float(clip.norm) == pytest.approx(float(norm), rel=1e-13)


def test_clip_by_norm_asks_the_other_owners() -> None:
    clip = ClipByNorm(1.0)
    list(clip(one_by_one([torch.full((4,), 3.0)]), lambda amount: amount + 64.0))  # the other rank's shard has norm 8
    assert float(clip.norm) == pytest.approx(10.0)


def test_clip_by_value_lets_the_stream_flow() -> None:
    seen: list[str] = []

    def stream() -> Stream:
        for i in range(2):
            seen.append(f"collected {i}")
            yield i, Collected([torch.tensor([-3.0, 0.5, 3.0])], torch.tensor(2.0))

    for i, collected in ClipByValue(1.0)(stream(), identity):
        seen.append(f"applied {i}")
        assert collected.settle()[0].tolist() == [-1.0, 0.25, 1.0]
    assert seen == ["collected 0", "applied 0", "collected 1", "applied 1"]


def test_loss_scale_halves_on_overflow_grows_after_good_steps_and_unscales() -> None:
    scale = LossScale(8.0, growth_interval=2)
    good, bad = [torch.tensor([16.0])], [torch.tensor([math.inf])]

    def step(values: list[torch.Tensor], total: Any = identity) -> list[float]:
        return [float(c.settle()[0]) for _, c in scale(one_by_one([v.clone() for v in values]), total)]

    assert step(good) == [2.0]
    assert step(bad) == [], "an overflow is not applied"
    assert (scale.scale, scale.good_steps) == (4.0, 0)
    assert step(good) == [4.0]
    assert step(good) == [4.0], "the gradients at hand were scaled by 4, whatever the scale is next"
    assert scale.scale == 8.0
    assert step([torch.tensor([math.nan])]) == []
    assert scale.scale == 4.0
    scale.scale = LossScale.SMALLEST
    with pytest.raises(NonFiniteError, match="overflow at any loss scale"):
        step(bad)
    scale.scale = 1.0
    # Another rank's shard overflowed: this rank must skip as well.
    assert step(good, lambda amount: amount + math.inf) == []
