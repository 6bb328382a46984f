"""Deterministic mode: the final weights have the same sha256 on any number of ranks, whatever draws or adds up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import distloop
from distloop.api import simulate
from distloop.averages import MovingAverage
from distloop.build import Builder, make_place
from distloop.build.deterministic import leaves_of, reproducible
from distloop.collectives import naive
from distloop.collectives.tree import Fold, own_leaves, owner, sum_nodes
from distloop.data import Batches
from distloop.errors import ConfigError, WorldError
from distloop.leaf_state import LeafState
from distloop.leaves import leaves_of_at_most
from distloop.plan import Plan
from distloop.settings import from_mapping, resolve
from distloop.strategies.tree import Tree
from distloop.tasks.base import SupervisedObjective
from distloop.transports import Alone, ThreadCluster, Transport
from distloop.world import World
from tests.parity import Case, trained_by_distloop
from tests.ranks import in_processes, in_threads

WORLDS = (2, 3, 4, 8)


# -- a task with everything that might depend on the number of ranks -------------------------------------------------


def normalised(channels: int) -> list[nn.Module]:
    """Return BatchNorm over channels of two values each, so that a leaf of one sample has a variance."""
    return [nn.Unflatten(1, (channels // 2, 2)), nn.BatchNorm1d(channels // 2), nn.Flatten()]


class Judge:
    """A discriminator with BatchNorm, which the generator's turn moves as well as its own."""

    def __init__(self, generator: nn.Module):
        self.generator = generator
        self.model = nn.Sequential(nn.Linear(5, 8), *normalised(8), nn.ReLU(), nn.Linear(8, 1))

    def guess(self, batch: Any) -> Tensor:
        with torch.no_grad():
            made = self.generator(torch.randn(len(batch[0]), 3))
        return self.model(torch.cat([batch[0], made]))[:, 0]

    def targets(self, batch: Any) -> Tensor:
        return torch.cat([torch.ones(len(batch[0])), torch.zeros(len(batch[0]))])

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(guesses, targets)


class Maker:
    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(3, 8), *normalised(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 5))
        self.judge = Judge(self.model)
        self.average = MovingAverage(self.model, 0.9)

    def updated(self) -> None:
        self.average.update(self.model)
        with torch.no_grad():
            next(self.average.parameters()).add_(1e-3 * torch.randn(8, 3))

    def guess(self, batch: Any) -> Tensor:
        return self.judge.model(self.model(torch.randn(len(batch[0]), 3)))[:, 0]

    def targets(self, batch: Any) -> Tensor:
        return torch.ones(len(batch[0]))

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(guesses, targets)


class Counts(nn.Module):
    """Buffers of other kinds: a step, a flag, a mask that stays infinite, and one that is put anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("level", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.begun.fill_(True)
            self.level = 0.9 * self.level + 0.1 * x.detach().mean(0)[:2]
        return x


class Everything:
    """A classifier with dropout, BatchNorm and weights that are no whole numbers, beside a GAN with turns."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        model = nn.Sequential(nn.Linear(5, 16), *normalised(16), nn.ReLU(), nn.Dropout(0.4), Counts(), nn.Linear(16, 3))
        inputs, classes = torch.randn(45, 5, generator=generator), torch.randint(3, (45,), generator=generator)
        self.data = TensorDataset(inputs, classes, torch.rand(45, generator=generator))
        self.validation = TensorDataset(*(t[:37] for t in self.data.tensors))
        maker = Maker()
        self.model = model
        self.objectives: Mapping[str, Any] = {
            "classifier": SupervisedObjective(
                model, F.cross_entropy, weight=lambda batch: float(batch[2].double().exp().sum())
            ),
            "discriminator": maker.judge,
            "generator": maker,
        }
        self.turns = {"generator": 2}

    def collect(self, epoch: int) -> TensorDataset:
        return self.data

    def evaluate(self, batch: Any) -> dict[str, Any]:
        scores = self.model(batch[0]) + 0.1 * torch.randn(len(batch[0]), 3)
        return {"loss": (F.cross_entropy(scores, batch[1], reduction="sum"), float(len(scores)))}


SECTIONS: dict[str, Any] = {
    "data": {"global_batch_size": 20},  # 20, 20 and 5 samples: leaves of 3, of 2, of one and of none
    "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "schedule": {"name": "plateau", "warmup_steps": 3, "patience": 0},
    "gradients": {"clip_norm": 0.5},
    "train": {"deterministic": True, "epochs": 4, "seed": 5},
    "evaluate": {"batch_size": 4},
    "strategy": {"bucket_mb": 2e-4},
    "monitor": {"keep_best": False, "explosion": None},
}
CLOCKS = {"samples_per_second", "idle", "seconds"}


def trained(transport: Transport, folder: str, sections: Mapping[str, Any] = SECTIONS, kind: Any = Everything) -> str:
    """Train as one rank; return the sha256 of all parameters, buffers and moving averages, and of what was logged."""
    logged: list[Any] = []

    def note(record: distloop.Record) -> None:
        logged.append([record.kind, record.step, {k: v for k, v in record.values.items() if k not in CLOCKS}])

    task, log = kind(), {"directory": folder, "tensorboard": False, "picture": False, "progress": False, "every": 1}
    world = World(transport.rank, transport.size, transport.rank, transport.size, "test")
    resolved = resolve(from_mapping({**sections, "log": log}))
    place = make_place(resolved.config, world, transport)
    with reproducible(resolved.config):
        Builder(resolved, task).session(place, [note]).run()
    found = hashlib.sha256()
    for name, objective in task.objectives.items():
        models = {name: objective.model} | ({f"{name}.average": objective.average} if name == "generator" else {})
        for whose, model in models.items():
            for key, tensor in model.state_dict().items():
                found.update(f"{whose}.{key} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    if transport.rank == 0:
        assert [kind for kind, *_ in logged].count("train") >= 12
        Path(folder, f"logged-{transport.size}").write_text(json.dumps([row for row in logged if row[0] in KINDS]))
    return found.hexdigest()


KINDS = ("train", "evaluate")


def on(ranks: int, folder: Path, *arguments: Any, **options: Any) -> str:
    """Return the sha256 of a run on ranks that are threads, each with generators of its own."""
    work = partial(trained, folder=str(folder), **options)
    if ranks == 1:
        return work(Alone())
    found = ThreadCluster(ranks, ordered=True).run(work)
    assert len(set(found)) == 1, "ranks end with other weights"
    return found[0]


def test_weights_and_logs_are_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    alone = on(1, tmp_path)
    assert {on(ranks, tmp_path) for ranks in WORLDS} == {alone}
    logged = (tmp_path / "logged-1").read_text()
    assert all((tmp_path / f"logged-{ranks}").read_text() == logged for ranks in WORLDS)
    assert on(2, tmp_path, sections={**SECTIONS, "train": SECTIONS["train"] | {"seed": 6}}) != alone


def test_micro_batches_make_more_leaves_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    sections = {**SECTIONS, "data": {"global_batch_size": 20, "micro_batch_size": 2}}
    alone = on(1, tmp_path, sections=sections)
    assert {on(ranks, tmp_path, sections=sections) for ranks in (3, 8)} == {alone}
    assert alone != on(1, tmp_path), "16 leaves are another sum than 8"


@pytest.mark.parametrize(("ranks", "over"), [(2, "torch"), (3, "torch"), (3, "shared_memory"), (4, "sockets")])
def test_processes_find_the_same_bits(tmp_path: Path, ranks: int, over: str) -> None:
    found = in_processes(ranks, trained, str(tmp_path), over=over)
    assert set(found) == {on(1, tmp_path)}


def test_low_precision_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    sections = {**SECTIONS, "precision": {"name": "bf16"}}
    assert on(1, tmp_path, sections=sections) == on(3, tmp_path, sections=sections)


def test_a_number_of_leaves_that_is_no_power_of_two(tmp_path: Path) -> None:
    sections = {**SECTIONS, "train": SECTIONS["train"] | {"leaves": 6}}
    alone = on(1, tmp_path, sections=sections)
    assert {on(ranks, tmp_path, sections=sections) for ranks in (2, 5, 6)} == {alone}


# -- what must be seen -----------------------------------------------------------------------------------------------


def added_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add leaves up as they come, and ranks one after the other."""

    def in_place(self: Tree, loss: Tensor, weight: float, *, final: bool) -> None:
        super(Tree, self).backward(loss, weight, final=final)
        self.leaf += not final

    def add_up(self: Tree, i: int, transport: Transport, flat: Tensor) -> None:
        if transport.size > 1:
            naive.all_reduce(transport, flat)

    monkeypatch.setattr(Tree, "backward", in_place)
    monkeypatch.setattr(Tree, "_add_up", add_up)


def seeded_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LeafState.begin

    def begin(self: LeafState, turn: int, leaf: int) -> None:
        right(self, turn, leaf)
        torch.default_generator.manual_seed(1000 * turn + self._transport.rank)

    monkeypatch.setattr(LeafState, "begin", begin)


def seeded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LeafState.begin

    def begin(self: LeafState, turn: int, leaf: int) -> None:
        state = torch.get_rng_state()
        right(self, turn, leaf)
        torch.set_rng_state(state)

    monkeypatch.setattr(LeafState, "begin", begin)


def buffers_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave in buffers what a rank's own leaves have moved them by."""
    right = LeafState._move

    def move(self: LeafState, together: list[int]) -> None:
        self._transport, transport = Alone(), self._transport
        self._leaves, leaves = len(self._moved), self._leaves
        self._first, first = 0, self._first
        right(self, together)
        self._transport, self._leaves, self._first = transport, leaves, first

    monkeypatch.setattr(LeafState, "_move", move)


def buffers_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each leaf begin with the buffers that the one before it left."""
    monkeypatch.setattr(LeafState, "end", lambda self, share: None)


def weights_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distloop.data.by_leaf", lambda own, leaves, transport: own.sum(0, keepdim=True))


@pytest.mark.parametrize(
    "plant", [added_by_rank, seeded_by_rank, seeded_once, buffers_left, buffers_run_on, weights_by_rank]
)
def test_a_planted_bug_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Any) -> None:
    plant(monkeypatch)
    found, logged = set(), set()
    for ranks in (1, 2, 3):
        work = partial(trained, folder=str(tmp_path))
        found |= set(ThreadCluster(ranks, ordered=True).run(work)) if ranks > 1 else {work(Alone())}
        logged.add((tmp_path / f"logged-{ranks}").read_text())
    # Shares are rounded to the dtype of the loss, and a last bit of theirs seldom shows in more than the logged loss.
    assert len(logged if plant is weights_by_rank else found) > 1


# -- the arithmetic --------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 25), st.integers(1, 17), st.integers(1, 17), st.none() | st.integers(1, 5))
def test_leaves_are_the_same_whoever_has_them(
    samples: int, whole: int, leaves: int, ranks: int, micro: int | None
) -> None:
    leaves = leaves_of_at_most(micro and min(micro, whole), leaves, whole)
    ranks = min(ranks, leaves)
    plan = Plan(samples, whole, None, leaves)
    for step in range(plan.steps):
        alone = plan.micro_batches(step, 0, 1)
        assert len(alone) == leaves
        assert [i for leaf in alone for i in leaf] == list(plan.batch(step))
        assert max(map(len, alone)) - min(map(len, alone)) <= 1
        assert micro is None or max(map(len, alone)) <= micro
        assert [leaf for rank in range(ranks) for leaf in plan.micro_batches(step, rank, ranks)] == alone
    for rank in range(ranks):
        own = own_leaves(rank, leaves, ranks)
        assert 1 <= len(own) <= plan.accumulation(ranks)
        assert all(owner(leaf, leaves, ranks) == rank for leaf in own)


@given(st.integers(1, 40), st.data())
def test_folding_keeps_little_and_adds_along_the_tree(leaves: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, leaves))
    values = [torch.tensor([(-1.1) ** leaf * 1.7**leaf]) for leaf in range(leaves)]

    def expected(start: int, width: int) -> Tensor:
        if width == 1:
            return values[start]
        left = expected(start, width // 2)
        return left if start + width // 2 >= leaves else left + expected(start + width // 2, width // 2)

    nodes: dict[tuple[int, int], Tensor] = {}
    for rank in range(ranks):
        own = own_leaves(rank, leaves, ranks)
        fold = Fold(leaves, own.start)
        for leaf in own:
            fold.add(values[leaf].clone())
            assert len(fold._waiting) <= 2 * leaves.bit_length()
        taken = fold.take()
        assert all(torch.equal(total, expected(*node)) for node, total in taken.items())
        nodes |= taken
    total = torch.empty(1)
    sum_nodes(Alone(), nodes, leaves, into=total)
    assert torch.equal(total, expected(0, 1 << (leaves - 1).bit_length()))


def gradients_of(transport: Transport, case: Case) -> list[dict[str, Tensor]]:
    return trained_by_distloop(transport, case).gradients


@settings(max_examples=25)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 8), st.integers(2, 8), st.sampled_from(["gan", "tokens"]))
def test_gradients_are_the_same_bits_for_any_sizes(
    samples: int, whole: int, leaves: int, ranks: int, task: str
) -> None:
    ranks = min(ranks, leaves)
    case = Case(
        task=task,
        strategy="tree",
        samples=samples,
        global_batch_size=whole,
        clip_norm=0.1,
        rule="adamw",
        dtype=torch.float32,
        epochs=1,
        lengths=(1, 0, 4),
        options={"leaves": leaves},
    )
    alone = gradients_of(Alone(), case)
    assert alone
    for own in in_threads(ranks, gradients_of, case):
        assert all(torch.equal(one[k], other[k]) for one, other in zip(own, alone, strict=True) for k in other)


def test_a_rank_reads_each_leaf_by_itself() -> None:
    """A view into a larger tensor begins elsewhere in memory on another number of ranks."""
    data = TensorDataset(torch.randn(40, 3))
    for minibatch in Batches(data, Plan(40, 20, None, 8)).extract(0, World()):
        assert len(minibatch.micro_batches) == 8
        for micro_batch in minibatch:
            (inputs,) = micro_batch.batch
            assert inputs.untyped_storage().nbytes() == inputs.nbytes
    data = TensorDataset(torch.randn(3, 3))
    (minibatch,) = Batches(data, Plan(3, 20, None, 8)).extract(0, World())
    assert [m.batch is None for m in minibatch] == [m.sample_share == 0.0 for m in minibatch]
    assert sum(m.batch is None for m in minibatch) == 5
    assert [m.final for m in minibatch] == [False] * 7 + [True]


# -- the switch ------------------------------------------------------------------------------------------------------


def test_the_switch_and_the_strategy_are_one() -> None:
    by_switch = resolve(from_mapping({"train": {"deterministic": True}}))
    by_name = resolve(from_mapping({"strategy": {"name": "tree"}}))
    for resolved in (by_switch, by_name):
        assert resolved.config.strategy.name == "tree"
        assert resolved.config.train.deterministic
        again = resolve(from_mapping(resolved.nested() | {"task": {}, "learners": {}}))
        assert again.config == resolved.config
    neither = resolve(from_mapping({"train": {"deterministic": False}}))
    assert (neither.config.strategy.name, leaves_of(neither.config)) == ("ddp", 0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"deterministic": True}, "strategy": {"name": "ring"}},
            r"argument strategy: strategy.name: ring contradicts train.deterministic \(argument train\), whose",
        ),
        (
            {"train": {"deterministic": False}, "strategy": {"name": "tree"}},
            r"argument train: train.deterministic: false contradicts strategy.name \(argument strategy\)",
        ),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(from_mapping(sections))


def test_more_ranks_than_leaves_are_refused(tmp_path: Path) -> None:
    sections = {**SECTIONS, "train": SECTIONS["train"] | {"leaves": 2}}
    with pytest.raises(WorldError, match=r"train.leaves: 2 parts of a global batch are too few for 3 ranks; start at"):
        on(3, tmp_path, sections=sections)
    assert WorldError.exit_code == 3


class Collects(Everything):
    def collect(self, epoch: int) -> Any:
        return distloop.PerRank(self.data)


class Extracts(Everything):
    def collect(self, epoch: int) -> Any:
        return Batches(self.data, Plan(45, 20))


@pytest.mark.parametrize(("kind", "what"), [(Collects, r"samples of its own \(PerRank\)"), (Extracts, "batches")])
def test_what_depends_on_the_ranks_is_refused(tmp_path: Path, kind: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"train.deterministic: collect\(0\) returned {what}"):
        on(2, tmp_path, kind=kind)


def test_a_buffer_that_changes_its_shape_is_refused(tmp_path: Path) -> None:
    class Grows(Counts):
        def forward(self, x: Tensor) -> Tensor:
            self.level = torch.cat([self.level, self.level])
            return x

    class Growing(Everything):
        def __init__(self) -> None:
            super().__init__()
            self.model[6] = Grows()

    with pytest.raises(ConfigError, match="gave buffer 'level' of a Grows another shape or dtype"):
        on(1, tmp_path, kind=Growing)


def test_torch_is_as_before_afterwards() -> None:
    config = resolve(from_mapping({"train": {"deterministic": True}})).config
    before = torch.are_deterministic_algorithms_enabled()
    with reproducible(config):
        with reproducible(config):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled(), "another rank of this process still needs it"
    assert torch.are_deterministic_algorithms_enabled() == before
    with reproducible(config.model_copy(update={"train": config.train.model_copy(update={"deterministic": False})})):
        assert torch.are_deterministic_algorithms_enabled() == before


def test_what_is_shown_says_so(tmp_path: Path) -> None:
    shown: dict[str, str] = {}

    def note(record: distloop.Record) -> None:
        shown.update(record.values if record.kind == "start" else {})

    sections = {
        "task": {"name": "digits", "model": "mlp"},
        "train": {"deterministic": True, "max_steps": 1},
        "log": {"directory": str(tmp_path), "tensorboard": False, "picture": False},
    }
    simulate(resolve(from_mapping(sections)), 2, observers=[note])
    assert shown["strategy"].startswith("tree, 8 leaves added along one tree: the same bits on 1 to 8 ranks")
    assert shown["batch"].startswith("64 samples = 8 leaves of at most 8, on 2 ranks; ")
    assert "by train.deterministic" in shown["threads"]


def test_a_strategy_that_is_given_other_leaves_says_so() -> None:
    def miscounted(transport: Transport) -> None:
        case = replace(Case(strategy="tree", task="classifier"), options={"leaves": 4})
        trained_by_distloop(transport, case, {"batches": Fewer})

    with pytest.raises(
        ConfigError, match="rank 0 has 4 of the 4 leaves of a global batch, and no more than 1 backward"
    ):
        in_threads(1, miscounted)


class Fewer(Batches):
    def __init__(self, samples: Any, plan: Plan, **options: Any):
        super().__init__(samples, replace(plan, leaves=0), **options)
