"""ZeRO-Offload: what streams is what would have been computed in order, whatever is late; what cannot be is refused."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distloop import optimizer as optimizers
from distloop.build.method import Method
from distloop.collectives.sharded import all_gather, reduce_scatter, unit
from distloop.errors import ConfigError, RankDiedError
from distloop.learner import Learner
from distloop.plan import Plan
from distloop.schedules import Constant
from distloop.settings import from_arguments, resolve
from distloop.strategies import Options, Parameters, Strategy
from distloop.strategies.zero_offload import ZeroOffload
from distloop.strategies.zero_offload.gates import Gates
from distloop.transforms import ClipByNorm
from distloop.transports import Alone, ThreadCluster, Transport
from tests.parity import (
    Case,
    Outcome,
    difference,
    make_data,
    make_objectives,
    permutation,
    run_cases,
    tolerance,
    trained_by_distloop,
    trained_plainly,
)
from tests.ranks import in_processes, in_threads, run_command
from tests.slow_link import SlowLink

CASES = [
    Case(strategy="zero_offload", micro_batch_size=3),
    Case(strategy="zero_offload", clip_norm=0.1, rule="adamw"),
    Case(strategy="zero_offload", task="tokens", clip_norm=0.1, clip_value=0.02, loss_scale=1024.0, micro_batch_size=3),
    Case(strategy="zero_offload", task="gan", clip_norm=0.1, every=2),
]
SEVERAL = pytest.mark.parametrize("size", [1, 2, 3])


def slow(name: str, parameters: Parameters, transport: Transport, options: Options) -> Strategy:
    return ZeroOffload(parameters, transport, options, SlowLink(seed=transport.rank))


# -- the same numbers ------------------------------------------------------------------------------------------------


@SEVERAL
@pytest.mark.parametrize("options", [{}, {"device_fraction": 0.5}, {"accumulate": "shard"}], ids=str)
def test_a_device_apart_from_the_host_changes_nothing(size: int, options: dict[str, Any]) -> None:
    for case in (replace(case, options=options) for case in CASES):
        outcomes = in_threads(size, trained_by_distloop, case, {"make": slow})
        assert max(difference(outcome, trained_plainly(case)) for outcome in outcomes) <= tolerance(case), case


@SEVERAL
@pytest.mark.parametrize("plant", [{}, {"make": slow}], ids=["direct", "slow"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_weights_are_the_arithmetic_of_one_process(size: int, plant: dict[str, Any], precision: str) -> None:
    weights = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    scale = 1024.0 if precision == "fp16" else None
    case = Case(precision=precision, dtype=torch.float32, micro_batch_size=3, loss_scale=scale, clip_norm=0.3)
    expected = trained_in_halves(case, size, weights)
    case = replace(case, strategy="zero_offload", options={"weights": weights})
    for outcome in in_threads(size, trained_by_distloop, case, plant):
        assert all(p.dtype == weights for p in outcome.parameters.values())
        assert difference(outcome, expected) <= 1e-6
    whole = trained_plainly(replace(case, precision="fp32"))
    assert difference(expected, whole) > 1e-4, "it is another precision indeed"


def trained_in_halves(case: Case, ranks: int, weights: torch.dtype) -> Outcome:
    """Train a classifier in one process: a model in half precision, of which an optimizer in single has copies."""
    outcome, data = Outcome(), make_data(case)
    (objective,) = make_objectives(case).values()
    masters = {k: p.detach().clone() for k, p in objective.model.named_parameters()}
    objective.model.to(weights)
    named = dict(objective.model.named_parameters())
    optimizer = torch.optim.SGD(masters.values(), lr=0.05, momentum=0.9, weight_decay=0.01)
    plan = Plan(case.samples, case.global_batch_size, case.micro_batch_size)
    scale = case.loss_scale or 1.0
    for epoch, step in itertools.product(range(case.epochs), range(plan.steps)):
        order = permutation(case.seed, epoch, case.samples)
        total = {k: torch.zeros_like(m) for k, m in masters.items()}
        for rank in range(ranks):
            own = {k: torch.zeros_like(m) for k, m in masters.items()}
            for part in plan.micro_batches(step, rank, ranks):
                batch = [t[order[part.start : part.stop]] for t in data.tensors]
                with torch.autocast("cpu", weights):
                    loss = objective.loss(objective.guess(batch), objective.targets(batch))
                loss.backward(torch.tensor(len(part) / len(plan.batch(step)) * scale))
                for k, p in named.items():
                    own[k] += p.grad.float()
                    p.grad = None
            for k in total:
                total[k] += own[k]
        for k, m in masters.items():
            m.grad = total[k] / scale
        nn.utils.clip_grad_norm_(masters.values(), case.clip_norm)
        # What is applied is kept before clipping, as the optimizer's kernel clips.
        outcome.gradients.append({f"classifier.{k}": m.grad.clone().view(-1) for k, m in masters.items()})
        optimizer.step()
        for k, p in named.items():
            p.data.copy_(masters[k])
    outcome.parameters = {f"classifier.{k}": p.detach().clone() for k, p in named.items()}
    return outcome


@SEVERAL
@pytest.mark.parametrize("plant", [{}, {"make": slow}], ids=["direct", "slow"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_delayed_updates_are_those_of_the_step_before(size: int, plant: dict[str, Any], clip: float | None) -> None:
    case = Case(strategy="zero_offload", options={"delayed_update": True}, clip_norm=clip, micro_batch_size=3)
    expected = trained_with_delay(case)
    for outcome in in_threads(size, trained_by_distloop, case, plant):
        assert difference(outcome, expected) <= tolerance(case)
    assert difference(expected, trained_plainly(case)) > 1e-4, "it is another training indeed"


def trained_with_delay(case: Case) -> Outcome:
    """Train a classifier in one process, with each gradient taken where the model was before the last update."""
    outcome, data = Outcome(), make_data(case)
    (objective,) = make_objectives(case).values()
    named = dict(objective.model.named_parameters())
    masters = [p.detach().clone() for p in named.values()]
    optimizer = torch.optim.SGD(masters, lr=0.05, momentum=0.9, weight_decay=0.01)
    for epoch in range(case.epochs):
        for order in permutation(case.seed, epoch, case.samples).split(case.global_batch_size):
            batch = [t[order] for t in data.tensors]
            objective.model.zero_grad()
            objective.loss(objective.guess(batch), objective.targets(batch)).backward()
            for p, m in zip(named.values(), masters, strict=True):
                p.data.copy_(m)  # the update of the step before
                m.grad = p.grad.clone()
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(masters, case.clip_norm)
            outcome.gradients.append(
                {f"classifier.{k}": m.grad.clone().view(-1) for k, m in zip(named, masters, strict=True)}
            )
            optimizer.step()
    outcome.parameters = {f"classifier.{k}": m for k, m in zip(named, masters, strict=True)}
    return outcome


# -- what modules wait for -------------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Layers whose parameters lie in many buckets."""

    def __init__(self, width: int = 16, depth: int = 6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else torch.tanh(layer(x))
        return x


class Fit:
    """Fits a tower to noise; ``penalty`` is computed before the tower is called."""

    def __init__(self, penalty: Callable[[nn.Module, int], Tensor | float] = lambda model, step: 0.0):
        torch.manual_seed(0)
        self.model, self._penalty, self._step = Tower(), penalty, 0

    def guess(self, batch: Any) -> Any:
        self._step += 1
        return self._penalty(self.model, self._step), self.model(batch[0])

    def targets(self, batch: Any) -> Tensor:
        return batch[1]

    def loss(self, guesses: Any, targets: Tensor) -> Tensor:
        return (guesses[1] - targets).square().mean() + guesses[0]


class Micro:
    """One micro-batch, the whole of a global batch."""

    def __init__(self, batch: Any):
        self.batch, self.final = batch, True

    def share(self, learner: str) -> float:
        return 1.0


def learner_of(objective: Any, link: SlowLink | None, **options: Any) -> Learner:
    parameters = dict(objective.model.named_parameters())
    strategy = ZeroOffload(parameters, Alone(), Options(bucket_mb=1e-3, **options), link)
    rule = optimizers.Optimizer(optimizers.SGD(), strategy.shards, dict.fromkeys(parameters, 0.0))
    return Learner("fit", objective, strategy, rule, lr=0.3, schedule=Constant(), transforms=[ClipByNorm(0.5)])


def turn(learner: Learner, batch: Any) -> None:
    micro: Any = Micro(batch)
    loss = learner.loss(learner.guess(micro), learner.targets(micro))
    for i, collected in learner.gradients(loss, micro).collect():
        learner.optimizer.apply(collected, learner.parameters[i])
        learner.broadcast(i)


def batches(count: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, 4, 16, generator=generator)) for _ in range(count)]


def fitted(objective: Any, link: SlowLink | None = None, count: int = 8, **options: Any) -> dict[str, Tensor]:
    learner = learner_of(objective, link, **options)
    try:
        for batch in batches(count):
            turn(learner, batch)
        learner.strategy.finish()
    finally:
        learner.strategy.close()
    return {k: p.detach().clone() for k, p in objective.model.named_parameters()}


def fitted_plainly(objective: Any, count: int = 8) -> dict[str, Tensor]:
    sgd = torch.optim.SGD(objective.model.parameters(), lr=0.3)
    for batch in batches(count):
        sgd.zero_grad()
        objective.loss(objective.guess(batch), objective.targets(batch)).backward()
        nn.utils.clip_grad_norm_(objective.model.parameters(), 0.5)
        sgd.step()
    return {k: p.detach().clone() for k, p in objective.model.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def exponentials(model: nn.Module, step: int) -> Tensor:
    return torch.stack([p.exp().sum() for p in model.parameters()]).sum()  # whose gradient is kept from here


@pytest.mark.alone
def test_forward_begins_while_values_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    link, early = SlowLink(seconds=0.01), []
    learner = learner_of(Fit(), link)
    first = learner.objective.model.layers[0]
    first.register_forward_hook(lambda *_: early.append(len(learner.strategy._traffic.pending)))
    for batch in batches(4):
        turn(learner, batch)
    learner.strategy.finish()
    count = len(learner.strategy.buckets)
    assert count > 5 and all(n > 1 for n in early[1:]), "the first layer did not wait for the last one's values"


def test_activation_checkpoints_run_modules_inside_backward() -> None:
    objective, plain = Fit(), Fit()
    objective.model.recomputes = plain.model.recomputes = True
    assert_same(fitted(objective, SlowLink()), fitted_plainly(plain))


def test_parameters_used_outside_their_modules_are_waited_for() -> None:
    assert_same(fitted(Fit(exponentials), SlowLink(seconds=0.01)), fitted_plainly(Fit(exponentials)))


@pytest.mark.alone
def test_without_looking_for_them_they_would_be_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gates, "_used", lambda self, parameter: None)
    monkeypatch.setattr(Gates, "check", lambda self, parameter, stale: None)
    found, expected = fitted(Fit(exponentials), SlowLink(seconds=0.01)), fitted_plainly(Fit(exponentials))
    assert max((found[k] - expected[k]).abs().max() for k in found) > 1e-5


def test_parameters_used_outside_their_modules_from_some_step_on_are_refused() -> None:
    class Bare(Fit):
        def guess(self, batch: Any) -> Any:
            self._step += 1
            if self._step <= 5:
                return 0.0, self.model(batch[0])
            layers = list(self.model.layers)
            x = batch[0]
            for layer in layers:
                x = torch.tanh(x @ layer.weight.T + layer.bias)  # by hand
            return 0.0, x

    with pytest.raises(ConfigError, match="was used before its module was called"):
        fitted(Bare(), SlowLink(seconds=0.01))


def test_bf16_on_the_wire_is_rounded_once_per_rank() -> None:
    case = Case(strategy="zero_offload", dtype=torch.float32, options={"wire_dtype": "bf16"}, micro_batch_size=3)
    for outcome in in_threads(2, trained_by_distloop, case):
        assert 1e-5 < difference(outcome, trained_plainly(case)) < 2**-8


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_gradients_that_a_user_clears_between_micro_batches_are_missed() -> None:
    objective = Fit()
    learner = learner_of(objective, None)
    micro: Any = Micro(batches(1)[0])
    micro.final = False
    learner.gradients(learner.loss(learner.guess(micro), learner.targets(micro)), micro)
    objective.model.zero_grad()
    with pytest.raises(ConfigError, match=r"'layers\.\d\.(weight|bias)' was lost between two micro-batches"):
        learner.gradients(learner.loss(learner.guess(micro), learner.targets(micro)), micro)
    learner.strategy.close()


def test_parameters_that_are_given_other_memory_are_missed() -> None:
    learner = learner_of(Fit(), None)
    turn(learner, batches(1)[0])
    weight = learner.objective.model.layers[0].weight
    weight.data = weight.data.clone()
    with pytest.raises(ConfigError, match=r"parameter 'layers\.0\.weight' no longer lies in its bucket"):
        turn(learner, batches(1)[0])
    learner.strategy.close()


WORKING = "sgd, rmsprop, adam, adamw work, torch.optim:CLASS"


@pytest.mark.parametrize("strategy", ["zero_offload", "deepspeed"])
def test_optimizers_that_need_whole_parameters_are_refused(strategy: str) -> None:
    for name, refused in [("torch.optim:Adafactor", True), ("torch.optim:Muon", True), ("torch.optim:NAdam", False)]:
        resolved = resolve(from_arguments(["--strategy.name", strategy, "--optimizer.name", name]))
        method = Method(resolved)
        if not refused:
            method.refuse_whole_parameters(strategy)
            continue
        kind = name.partition(":")[2]
        with pytest.raises(ConfigError, match=f"cuts of parameters, and {kind} may need all of one; {WORKING}"):
            method.refuse_whole_parameters(strategy)


def test_any_element_wise_optimizer_works(tmp_path: Path) -> None:
    losses = {}
    for strategy in ("ddp", "zero_offload"):
        result = run_command(
            *["train", "digits", "--train.max_steps", "12", "--optimizer.name", "torch.optim:NAdam"],
            *["--strategy.name", strategy, "--log.name", strategy, "--world.device", "cpu"],
            folder=tmp_path,
            ranks=2,
        )
        assert [rank.code for rank in result] == [0, 0], result
        if strategy == "zero_offload":
            assert "zero_offload, optimizer in the host's memory, 1 bucket by reduce-scatter" in result[0].out
        losses[strategy] = json.loads((tmp_path / "runs" / strategy / "result.json").read_text())["metrics"]["loss"]
    assert losses["ddp"] == pytest.approx(losses["zero_offload"], rel=1e-5)


def test_a_failing_update_ends_the_training_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(Fit(), SlowLink())
    turn(learner, batches(1)[0])
    monkeypatch.setattr(learner.optimizer, "apply", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for batch in batches(3):
            turn(learner, batch)
    learner.strategy.close()


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    for _ in range(3):
        fitted(Fit(), count=2)
    in_threads(2, trained_by_distloop, CASES[1])
    deadline = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_rank_that_dies_meanwhile_is_named() -> None:
    def rank(transport: Transport) -> str:
        if transport.rank == 1:
            raise RuntimeError("this rank is gone")
        try:
            trained_by_distloop(transport, CASES[1])
        except RankDiedError as failure:
            return str(failure)
        return "nothing happened"

    cluster = ThreadCluster(3, timeout=20)
    with pytest.raises(RuntimeError, match="this rank is gone"):
        cluster.run(rank)


def test_an_overflow_leaves_everything_as_it_was() -> None:
    case = Case(strategy="zero_offload", loss_scale=2.0**1023, samples=8, epochs=1)
    for outcome in in_threads(2, trained_by_distloop, case):
        assert outcome.gradients == []
        for name, o in make_objectives(case).items():
            for k, p in o.model.named_parameters():
                assert torch.equal(outcome.parameters[f"{name}.{k}"], p), "no update"


# -- how memory is used ----------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_gradients_are_held_only_as_long_as_they_must_be() -> None:
    def allocated(clip: list[Any]) -> int:
        objective, link = Fit(), SlowLink(seconds=1e-4)
        learner = learner_of(objective, link, weights=torch.bfloat16)
        learner.transforms[:] = clip
        for batch in batches(4):
            turn(learner, [t.bfloat16() for t in batch])
        learner.strategy.finish()
        return link.allocated

    count = sum(p.numel() for p in Fit().model.parameters())
    bucket = 512  # parameters
    assert allocated([ClipByNorm(1.0)]) <= (4 + 2) * count + 8 * bucket, "masters, gradients in bf16, a few buckets"
    assert allocated([]) <= 4 * count + 4 * bucket * 4, "masters, and a few buckets of gradients and of new values"


def test_every_rank_owns_an_even_cut() -> None:
    def owned(transport: Transport) -> int:
        parameters = dict(Tower().named_parameters())
        strategy = ZeroOffload(parameters, transport, Options(bucket_mb=2e-3))
        strategy.close()
        return sum(segment.stop - segment.start for shard in strategy.shards for segment in shard)

    counts = in_threads(4, owned)
    assert sum(counts) == sum(p.numel() for p in Tower().parameters())
    assert max(counts) - min(counts) <= 4 * 64, "but for padding"


# -- reduce-scatter and all-gather -----------------------------------------------------------------------------------

LENGTHS = (1, 5, 64, 1000, 150_000)


def halves(transport: Transport) -> list[tuple[Tensor, Tensor]]:
    results = []
    for length, dtype in itertools.product(LENGTHS, (torch.float32, torch.bfloat16)):
        step = unit(length, transport.size)
        flat = transport.allocate(-(-length // step) * step, dtype, torch.device("cpu"))
        flat.copy_(torch.randn(len(flat), generator=torch.Generator().manual_seed(transport.rank)))
        own = slice(len(flat) * transport.rank // transport.size, len(flat) * (transport.rank + 1) // transport.size)
        out = torch.empty(len(flat) // transport.size)
        reduce_scatter(transport, flat, out)
        flat[own] = out
        all_gather(transport, flat)
        results.append((out.clone(), flat.clone()))
    return results


@pytest.mark.parametrize(("over", "size"), [("threads", 3), ("torch", 2), ("sockets", 3), ("shared_memory", 2)])
def test_the_two_halves_of_an_all_reduce(over: str, size: int) -> None:
    by_rank = in_threads(size, halves) if over == "threads" else in_processes(size, halves, over=over)
    for case, (length, dtype) in enumerate(itertools.product(LENGTHS, (torch.float32, torch.bfloat16))):
        n = len(by_rank[0][case][1])
        assert n >= length
        parts = [torch.randn(n, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        for rank, own in enumerate(total.chunk(size)):
            assert torch.equal(by_rank[rank][case][0], own), "summed in rank order, in single precision"
            assert torch.equal(by_rank[rank][case][1], total.to(dtype))


@pytest.mark.parametrize(("over", "size"), [("sockets", 2), ("shared_memory", 3)])
def test_between_processes(over: str, size: int) -> None:
    cases = [replace(case, bucket_mb=mb, options=o) for case in CASES for mb, o in [(1e-4, {}), (4.0, SHARDED_SUMS)]]
    outcomes = in_processes(size, run_cases, cases, over=over)
    for i, case in enumerate(cases):
        assert max(difference(rank[i], trained_plainly(case)) for rank in outcomes) <= tolerance(case), case


SHARDED_SUMS = {"accumulate": "shard"}
