"""DeepSpeed's engine as a guest: half precision, its state and configuration, what is refused, what a user sees."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distloop.averages import MovingAverage
from distloop.build.models import refuse_what_runs_models
from distloop.errors import ConfigError, NonFiniteError, WorldError
from distloop.objective import trained_parameters
from distloop.plan import Plan
from distloop.strategies import Options, Recipe, Strategy, check, make
from distloop.strategies.deepspeed import extension, settings
from distloop.transports import Alone, Transport
from tests.parity import Case, Outcome, difference, make_data, make_objectives, permutation, trained_plainly
from tests.ranks import in_processes, run_command

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason='deepspeed is not installed: pip install "distloop[deepspeed]"'
)

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 8


def strategy_for(case: Case, transport: Transport, objective: Any) -> Strategy:
    parameters = trained_parameters("classifier", objective.model)
    recipe = Recipe(
        objective.model,
        case.rule,
        {"momentum": 0.9} if case.rule == "sgd" else {},
        {name: 0.01 if p.dim() > 1 else 0.0 for name, p in parameters.items()},
        clip_norm=case.clip_norm,
        loss_scale=case.loss_scale,
        growth_interval=2,
    )
    return make("deepspeed", parameters, transport, Options(1e-4, **case.options), recipe)


def trained(strategy: Strategy, transport: Transport, case: Case, objective: Any, steps: range) -> None:
    """Take ``steps`` of the classifier by hand."""
    data, plan = make_data(case), Plan(case.samples, BATCH, case.micro_batch_size)
    for number in steps:
        epoch, step = divmod(number, plan.steps)
        order = permutation(case.seed, epoch, case.samples)
        parts = plan.micro_batches(step, transport.rank, transport.size)
        for part in parts:
            batch = [t[order[part.start : part.stop]] for t in data.tensors]
            with torch.autocast("cpu", HALF.get(case.precision), enabled=case.precision != "fp32"):
                loss = objective.loss(objective.guess(batch), objective.targets(batch))
            strategy.backward(loss.float(), len(part) / len(plan.batch(step)), final=part is parts[-1])
        strategy.lr = 0.05
        assert list(strategy.collect()) == []
        strategy.settle()


def values(strategy: Any) -> dict[str, Tensor]:
    return {f"classifier.{name}": tensors["values"].cpu() for name, tensors in strategy.exported()}


# -- half precision --------------------------------------------------------------------------------------------------


def in_half(transport: Transport, cases: list[Case]) -> list[Outcome]:
    outcomes = []
    for case in cases:
        (objective,), outcome = make_objectives(case).values(), Outcome()
        strategy = strategy_for(case, transport, objective)
        assert {p.dtype for p in objective.model.parameters()} == {HALF[case.precision]}
        for step in range(4):
            trained(strategy, transport, case, objective, range(step, step + 1))
            outcome.trajectory.append(values(strategy))
        outcome.parameters = outcome.trajectory[-1]
        strategy.finish()
        outcomes.append(outcome)
    return outcomes


def plainly_in_half(case: Case, ranks: int) -> Outcome:
    """Train by hand in one process: a model in half precision, gradients added and values updated in fp32."""
    (objective,), outcome, data = make_objectives(case).values(), Outcome(), make_data(case)
    copies = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
    decayed = [p for p in copies.values() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": [p for p in copies.values() if p.dim() < 2]}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    named = dict(objective.model.to(HALF[case.precision]).named_parameters())
    plan = Plan(case.samples, BATCH, case.micro_batch_size)
    for number in range(4):
        epoch, step = divmod(number, plan.steps)
        order = permutation(case.seed, epoch, case.samples)
        optimizer.zero_grad()
        for copy in copies.values():
            copy.grad = torch.zeros_like(copy)
        for part in itertools.chain(*(plan.micro_batches(step, rank, ranks) for rank in range(ranks))):
            batch = [t[order[part.start : part.stop]] for t in data.tensors]
            with torch.autocast("cpu", HALF[case.precision]):
                loss = objective.loss(objective.guess(batch), objective.targets(batch))
            objective.model.zero_grad()
            factor = (case.loss_scale or 1.0) * ranks
            (loss.float() * (factor * len(part) / len(plan.batch(step)))).backward()
            for name, p in named.items():
                copies[name].grad += p.grad.float() / factor
        torch.nn.utils.clip_grad_norm_(list(copies.values()), case.clip_norm or torch.inf)
        optimizer.step()
        for name, p in named.items():
            p.data.copy_(copies[name])
        outcome.trajectory.append({f"classifier.{name}": copy.detach().clone() for name, copy in copies.items()})
    outcome.parameters = outcome.trajectory[-1]
    return outcome


IN_HALF = [
    Case(
        dtype=torch.float32,
        precision=precision,
        clip_norm=0.1,
        micro_batch_size=micro,
        loss_scale=1024.0 if precision == "fp16" else None,
        options={"stage": stage, "weights": HALF[precision], "offload": offload},
    )
    for stage, precision, micro, offload in [
        (1, "bf16", 2, "none"),
        (1, "fp16", None, "optimizer"),
        (2, "bf16", 2, "optimizer"),
        (2, "fp16", 3, "none"),
        (3, "bf16", 2, "none"),
        (3, "fp16", None, "parameters"),
    ]
]


def test_half_precision_is_the_same_arithmetic_as_in_one_process(together: list[Any]) -> None:
    (first, _, _), (second, _, _) = together
    for case, one, other in zip(IN_HALF, first, second, strict=True):
        expected = plainly_in_half(case, 2)
        assert difference(one, expected) <= 1e-6, case
        assert difference(one, other) == 0.0, "every rank reads the same"
        in_single = trained_plainly(replace(case, precision="fp32", epochs=1))
        assert difference(after_three(one), after_three(in_single)) > 1e-4, "it is another precision"


def after_three(outcome: Outcome) -> Outcome:
    """Return the values after three steps, an epoch, alone."""
    return Outcome(parameters={name: value.reshape(-1) for name, value in outcome.trajectory[2].items()})


def overflowing(transport: Transport) -> list[Any]:
    """Let the gradient of rank 1 overflow in the second step; return what every rank makes of it."""
    case = Case(dtype=torch.float32, loss_scale=1024.0, options={"stage": 2})
    (objective,) = make_objectives(case).values()
    strategy, seen = strategy_for(case, transport, objective), []
    for step in range(4):
        weight = torch.inf if step == 1 and transport.rank == 1 else 0.5
        strategy.backward(objective.model(torch.ones(2, 5)).square().mean(), weight, final=True)
        before = objective.model.first.weight.detach().clone()
        strategy.lr = 0.05
        strategy.settle()
        moved = bool((objective.model.first.weight != before).any())
        seen.append((strategy.overflowed, moved, strategy.loss_scale))
    strategy.finish()
    case = replace(case, loss_scale=None)
    strategy = strategy_for(case, transport, objective)
    strategy.backward(objective.model(torch.ones(2, 5)).square().mean(), torch.inf, final=True)
    with pytest.raises(NonFiniteError, match="gradients became infinite"):
        strategy.settle()
    strategy.close()
    return seen


def test_ranks_agree_on_overflows(together: list[Any]) -> None:
    (_, one, _), (_, other, _) = together
    assert one == other
    good = (False, True, 1024.0)
    assert one == [good, (True, False, 512.0), (False, True, 512.0), (False, True, 1024.0)], "it grows after two"


# -- its state -------------------------------------------------------------------------------------------------------


def moved_between_stages(transport: Transport, cases: list[Case]) -> list[tuple[float, dict[str, dict[str, Tensor]]]]:
    """Train three steps, and three more under another stage; return how far off, and the state in between."""
    found = []
    for case in cases:
        (objective,) = make_objectives(case).values()
        other_stage = replace(case, options={**case.options, "stage": case.options["stage"] % 3 + 1})
        uninterrupted = strategy_for(case, transport, objective)
        trained(uninterrupted, transport, case, objective, range(3))
        state = dict(uninterrupted.exported())
        counters = uninterrupted.counters()
        trained(uninterrupted, transport, case, objective, range(3, 6))
        expected = values(uninterrupted)
        uninterrupted.finish()
        (fresh,) = make_objectives(replace(case, seed=99)).values()
        resumed = strategy_for(other_stage, transport, fresh)
        resumed.imported(iter(state.items()), counters)
        assert resumed.counters() == counters
        trained(resumed, transport, other_stage, fresh, range(3, 6))
        off = difference(Outcome(parameters=values(resumed)), Outcome(parameters=expected))
        resumed.finish()
        found.append((off, state))
    return found


MOVED = [
    Case(dtype=torch.float32, rule=rule, clip_norm=0.5, options={"stage": stage, "offload": offload})
    for rule, stage, offload in [
        ("adamw", 1, "none"),
        ("adamw", 2, "none"),
        ("sgd", 3, "none"),
        ("adamw", 3, "optimizer"),
    ]
]


def test_what_was_learned_moves_between_stages(together: list[Any]) -> None:
    for (off, state), case in zip(together[0][2], MOVED, strict=True):
        assert off <= 1e-6, case
        if case.rule == "adamw":
            expected = plain_adamw(case, steps=3)
            for name, tensors in state.items():
                assert tensors.keys() == {"values", "exp_avg", "exp_avg_sq", "step"}
                for key, tensor in tensors.items():
                    assert torch.allclose(tensor, expected[name][key], rtol=1e-4, atol=1e-7), (name, key)


def plain_adamw(case: Case, steps: int) -> dict[str, dict[str, Tensor]]:
    (objective,), data = make_objectives(case).values(), make_data(case)
    named = dict(objective.model.named_parameters())
    decayed = [p for p in named.values() if p.dim() > 1]
    plain = [p for p in named.values() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.05, weight_decay=0.01
    )
    order = permutation(case.seed, 0, case.samples)
    for step in range(steps):
        batch = [t[order[step * BATCH : (step + 1) * BATCH]] for t in data.tensors]
        optimizer.zero_grad()
        objective.loss(objective.guess(batch), objective.targets(batch)).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), case.clip_norm)
        optimizer.step()
    state = {name: optimizer.state[p] for name, p in named.items()}
    keys = ("exp_avg", "exp_avg_sq", "step")
    return {name: {"values": p.detach(), **{key: state[name][key] for key in keys}} for name, p in named.items()}


def everything(transport: Transport) -> tuple[Any, Any, Any]:
    return in_half(transport, IN_HALF), overflowing(transport), moved_between_stages(transport, MOVED)


@pytest.fixture(scope="module")
def together() -> list[Any]:
    """What two ranks found; importing DeepSpeed takes longer than all of it, so they do it once."""
    return in_processes(2, everything)


# -- its configuration -----------------------------------------------------------------------------------------------


def test_every_default_that_matters_is_written_out() -> None:
    recipe = Recipe(torch.nn.Linear(1, 1), "adamw", {}, {})
    written = settings.configuration(Options(), recipe, torch.device("cpu"), 1000)
    assert written["gradient_clipping"] == 0.0, "DeepSpeed's own is 1.0"
    assert written["communication_data_type"] == written["data_types"]["grad_accum_dtype"] == "fp32"
    assert written["zero_optimization"]["reduce_bucket_size"] == 1000
    given = Options(deepspeed={"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": False}})
    merged = settings.configuration(given, replace(recipe, clip_norm=0.5), torch.device("cpu"), 1000)
    assert merged["gradient_clipping"] == 0.5
    assert merged["zero_optimization"] == written["zero_optimization"] | {"overlap_comm": True}
    check("deepspeed", given)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"gradient_cliping": 1.0}, r"no key 'gradient_cliping' \(did you mean 'gradient_clipping'\?\)"),
    ({"zero_optimizaton": {"overlap_comm": True}}, r"did you mean 'zero_optimization'"),
    (
        {"zero_optimization": {"overlap_com": True}},
        r"'zero_optimization.overlap_com' \(did you mean 'overlap_comm'\?\)",
    ),
    ({"zero_optimization": {"overlap_comm": 7}}, r"zero_optimization.overlap_comm: 7 is wrong"),
    ({"zero_optimization": {"offload_optimizer": {"pin_memori": True}}}, r"did you mean 'pin_memory'"),
    ({"activation_checkpointing": {"partition_activation": True}}, r"did you mean 'partition_activations'"),
    ({"comms_logger": {"enable": True}}, r"did you mean 'enabled'"),
    ({"gradient_clipping": 1.0}, r"gradient_clipping is set by gradients.clip_norm"),
    ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage is set by strategy.stage"),
    ({"optimizer": {"type": "Lamb"}}, r"optimizer is set by the section optimizer"),
    ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel is not for here: it cuts models"),
    ({"elasticity": {"enabled": True}}, r"DeepSpeed refuses it: Elastic training has been removed"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_keys_are_checked_against_its_own_schema(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check("deepspeed", Options(deepspeed=keys))


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="offload: parameters can be offloaded under stage 3 alone"):
        check("deepspeed", Options(offload="parameters"))
    with pytest.raises(ConfigError, match="unused_parameters: under stage 3"):
        check("deepspeed", Options(stage=3, unused_parameters="zeros"))


def test_without_deepspeed_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'deepspeed is not installed here: pip install "distloop\[deepspeed\]"'):
        check("deepspeed", Options())


def test_optimizers_that_look_at_several_elements_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    parameters = dict(model.named_parameters())
    recipe = Recipe(model, "my.package:Lamb", {}, dict.fromkeys(parameters, 0.0))
    with pytest.raises(ConfigError, match=r"my.package:Lamb may look at .* sgd, rmsprop, adam, adamw work"):
        make("deepspeed", parameters, Alone(), Options(), recipe)
    with pytest.raises(ConfigError, match=r"cpu_adam: deepspeed is for adam and adamw, and optimizer.name is sgd"):
        make("deepspeed", parameters, Alone(), Options(cpu_adam="deepspeed"), replace(recipe, optimizer="sgd"))
    double = torch.nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(ConfigError, match="'weight' is in float64: DeepSpeed's optimizers compute in fp32"):
        make("deepspeed", dict(double.named_parameters()), Alone(), Options(), replace(recipe, optimizer="sgd"))


# -- its compiled operation ------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path  # type: ignore[return-value]


def test_a_lock_that_a_killed_process_left_is_named(place: Path) -> None:
    lock = place / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with pytest.raises(WorldError, match=f"{lock} was left by a compilation that was killed.*: delete it"):
        extension.prepare()
    with lock.open():
        extension.check_lock(lock)  # somebody has it: not stale


def test_a_missing_or_failing_compiler_is_one_sentence(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        WorldError, match=r"no C\+\+ compiler \(no-such-compiler\) here.*set strategy.cpu_adam to torch"
    ):
        extension.prepare()
    broken = place / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: it does not like it' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(WorldError, match=r"cannot be compiled \(.*\): mend the compiler, or set strategy.cpu_adam"):
        extension.prepare()
    assert not (place / "cpu_adam" / "lock").exists()


def test_what_is_compiled_lies_in_a_folder_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    first = extension.folder()
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert first.parent == extension.folder().parent
    assert first != extension.folder()


@pytest.mark.compiles
@pytest.mark.timeout(400)
def test_its_adam_for_the_cpu_is_compiled_and_agrees(tmp_path: Path) -> None:
    extension._find_tools()
    own = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = ["train", "digits", "--train.max_steps", "20", "--log.directory", "runs", "--world.device", "cpu"]
    command += ["--strategy.name", "deepspeed", "--strategy.offload", "optimizer", "--log.picture", "false"]
    losses = []
    for kernel in ("deepspeed", "torch"):
        ended = run_command(*command, "--strategy.cpu_adam", kernel, folder=tmp_path, ranks=2, seconds=350, **own)
        assert [one.code for one in ended] == [0, 0], ended[0].err
        assert all(one.err == "" for one in ended)
        run = max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        losses.append(json.loads((run / "result.json").read_text())["last_metrics"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- what a user sees ------------------------------------------------------------------------------------------------


def test_a_run_under_stage_3_from_the_command_line(tmp_path: Path) -> None:
    command = ["train", "digits", "--train.max_steps", "30", "--log.directory", "runs", "--log.name", "one"]
    command += ["--strategy.name", "deepspeed", "--strategy.stage", "3", "--strategy.offload", "parameters"]
    command += ["--world.device", "cpu", "--log.picture", "false", "--data.global_batch_size", "100"]
    ended = run_command(*command, folder=tmp_path, ranks=2)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert [one.err for one in ended] == ["", ""], "nothing of what DeepSpeed says is the user's to read"
    assert ended[1].out == ""
    assert "deepspeed, ZeRO stage 3, optimizer and parameters on the CPU" in ended[0].out
    assert "DeepSpeed" not in ended[0].out
    saved = load_file(tmp_path / "runs" / "one" / "model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == 151_306, "whole"
    assert json.loads((tmp_path / "runs" / "one" / "result.json").read_text())["metrics"]["accuracy"] > 0.5


def test_what_cannot_run_in_step_is_refused_under_stage_3() -> None:
    in_step: Any = SimpleNamespace(in_step=True)
    objectives = {"one": SimpleNamespace(model=torch.nn.Linear(1, 1))}
    fit = SimpleNamespace(objectives=objectives)
    refuse_what_runs_models(fit, {"one": in_step})
    with pytest.raises(ConfigError, match="this task has more than one learner"):
        refuse_what_runs_models(fit, {"one": in_step, "two": in_step})
    with pytest.raises(ConfigError, match=r"this task has join\(site\)"):
        refuse_what_runs_models(SimpleNamespace(objectives=objectives, join=print), {"one": in_step})
    objectives["one"].average = MovingAverage(objectives["one"].model)
    with pytest.raises(ConfigError, match=r"this task has updated\(\) of 'one' or a moving average"):
        refuse_what_runs_models(fit, {"one": in_step})
    refuse_what_runs_models(fit, {"one": SimpleNamespace(in_step=False)})  # type: ignore[dict-item]


def test_one_rank_and_the_environment_as_it_was() -> None:
    in_processes(1, in_an_environment, Case(dtype=torch.float32, options={"stage": 3}))


def in_an_environment(transport: Transport, case: Case) -> None:
    before = dict(os.environ)
    for _ in range(2):  # a second run in the same process, as from Python
        (objective,) = make_objectives(case).values()
        strategy = strategy_for(case, transport, objective)
        trained(strategy, transport, case, objective, range(3))
        strategy.finish()
        assert not torch.distributed.is_initialized()
        model = objective.model
        assert model.first.weight.shape == (7, 5)
        assert model(torch.ones(1, 5)).shape == (1, 3), "an ordinary model again"
        assert not any(hasattr(p, "ds_id") for p in model.parameters())
    new = {name for name in os.environ if name not in before}
    of_torch = {"TORCHINDUCTOR_CACHE_DIR", "PYTORCH_NVML_BASED_CUDA_CHECK"}
    assert new - of_torch <= {"DS_ACCELERATOR", "GLOO_SOCKET_IFNAME"}, new
