"""The test that matters: distloop against a few lines of plain PyTorch that see the whole global batch at once.

A case says what is trained and how; ``trained_by_distloop`` trains it as one rank of many, ``trained_plainly`` in one
process. Both return every gradient that was applied and the final parameters.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distloop import optimizer as optimizers
from distloop.averages import MovingAverage
from distloop.data import Batches, derive_seed
from distloop.learner import Learner
from distloop.loop import train
from distloop.objective import trained_parameters
from distloop.order import Order
from distloop.plan import Plan
from distloop.schedules import Constant
from distloop.strategies import Options, Recipe, Segment, Strategy, by_leaves, make
from distloop.tasks import actor_critic
from distloop.transforms import ClipByNorm, ClipByValue, LossScale, Stream, Total, Transform
from distloop.transports import Transport
from distloop.turns import Turns
from distloop.uneven import PerRank, UnevenBatches
from distloop.world import World


@dataclass(frozen=True)
class Case:
    """What is trained: small enough to run hundreds of times."""

    task: str = "classifier"
    strategy: str = "naive"
    samples: int = 23
    global_batch_size: int = 8
    micro_batch_size: int | None = None
    epochs: int = 2
    clip_norm: float | None = None
    clip_value: float | None = None
    loss_scale: float | None = None
    rule: str = "sgd"
    dtype: torch.dtype = torch.float64
    bucket_mb: float | None = 1e-4  # about a hundred bytes: several buckets even here
    lengths: tuple[int, ...] = ()  # of the token task's samples
    seed: int = 3
    unused: bool = False
    precision: str = "fp32"
    counts: tuple[int, ...] = ()  # of the actor-critic task: how many samples each rank collected
    every: int = 1  # of the GAN: batches per turn of the generator
    options: Mapping[str, Any] = field(default_factory=dict)  # more of the strategy's


@dataclass
class Outcome:
    """What was applied, step by step and learner by learner, and where it ended."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    trajectory: list[dict[str, Tensor]] = field(default_factory=list)  # in place of gradients that nobody can see
    seen: list[list[int]] = field(default_factory=list)  # sample numbers by epoch


# -- tasks: each a mapping of objectives over batches (numbers, inputs, targets) -------------------------------------


class Net(nn.Module):
    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, spare: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 7, dtype=dtype), nn.Linear(7, outputs, dtype=dtype)
        if spare:
            self.spare = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Classifier:
    def __init__(self, case: Case):
        self.model = Net(5, 3, case.dtype, spare=case.unused)

    def guess(self, batch: Any) -> Tensor:
        return self.model(batch[1])

    def targets(self, batch: Any) -> Tensor:
        return batch[2]

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(guesses, targets)


class Convolution(Classifier):
    """Parameters in channels_last lie in memory in another order than their gradient's bucket would by itself."""

    def __init__(self, case: Case):
        convolution = nn.Conv2d(5, 6, (1, 3), padding=(0, 1), dtype=case.dtype)
        self.model = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3, dtype=case.dtype))
        self.model.to(memory_format=torch.channels_last)

    def guess(self, batch: Any) -> Tensor:
        return self.model(torch.stack([batch[1], batch[1].flip(1)], dim=-1)[:, :, None, :])


class Tokens(Classifier):
    """A mean over the valid tokens of samples of different lengths; some samples may have none."""

    def guess(self, batch: Any) -> Tensor:
        return self.model(batch[1].unflatten(1, (4, 5)))

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(guesses.flatten(0, 1), targets.flatten(), ignore_index=-100)  # NaN if there is no token

    def weight(self, batch: Any) -> float:
        return float((batch[2] != -100).sum())


class Discriminator:
    def __init__(self, case: Case, generator: nn.Module):
        self.model, self.generator = Net(5, 1, case.dtype), generator

    def guess(self, batch: Any) -> Tensor:
        with torch.no_grad():
            fake = self.generator(batch[1][:, :4])
        return self.model(torch.cat([batch[1], fake]))[:, 0]

    def targets(self, batch: Any) -> Tensor:
        half = torch.ones(len(batch[1]), dtype=batch[1].dtype)
        return torch.cat([half, 0 * half])

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(guesses, targets)


class Generator:
    """Its loss runs through the discriminator, whose parameters must not collect a gradient from it."""

    def __init__(self, case: Case, discriminator: nn.Module, model: nn.Module):
        self.model, self.discriminator = model, discriminator
        self.average = MovingAverage(model, 0.9)

    def updated(self) -> None:
        self.average.update(self.model)

    def guess(self, batch: Any) -> Tensor:
        return self.discriminator(self.model(batch[1][:, :4]))[:, 0]

    def targets(self, batch: Any) -> Tensor:
        return torch.ones(len(batch[1]), dtype=batch[1].dtype)

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(guesses, targets)


class Actor(actor_critic.Actor):
    def __init__(self, case: Case):
        super().__init__(Net(5, 3, case.dtype), clip=0.2, entropy=0.1)

    def guess(self, batch: Any) -> Tensor:
        return super().guess(batch[1:])

    def targets(self, batch: Any) -> Any:
        return super().targets(batch[1:])


class Critic(actor_critic.Critic):
    def __init__(self, case: Case):
        super().__init__(Net(5, 1, case.dtype))

    def guess(self, batch: Any) -> Tensor:
        return super().guess(batch[1:])

    def targets(self, batch: Any) -> Any:
        return super().targets(batch[1:])


_ONE_GENERATOR = threading.Lock()  # ranks that are threads share torch's


def make_objectives(case: Case) -> dict[str, Any]:
    with _ONE_GENERATOR:
        torch.manual_seed(case.seed)
        return _make_objectives(case)


def _make_objectives(case: Case) -> dict[str, Any]:
    if case.task == "classifier":
        return {"classifier": Classifier(case)}
    if case.task == "convolution":
        return {"classifier": Convolution(case)}
    if case.task == "tokens":
        return {"tokens": Tokens(case)}
    if case.task == "actor_critic":
        return {"actor": Actor(case), "critic": Critic(case)}
    generating = Net(4, 5, case.dtype)
    discriminator = Discriminator(case, generating)
    return {"discriminator": discriminator, "generator": Generator(case, discriminator.model, generating)}


def make_data(case: Case) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(case.seed + 1)
    n = case.samples
    numbers = torch.arange(n)
    if case.task == "actor_critic":
        n = sum(case.counts)
        inputs = torch.randn(n, 5, generator=generator, dtype=case.dtype)
        actions = torch.randint(3, (n,), generator=generator)
        # Log probabilities, advantages and returns; small, as larger ones blow rounding up from step to step.
        rest = 0.3 * torch.randn(3, n, generator=generator, dtype=case.dtype)
        return torch.utils.data.TensorDataset(torch.arange(n), inputs, actions, rest[0] - 1.1, rest[1], rest[2])
    if case.task != "tokens":
        inputs = torch.randn(n, 5, generator=generator, dtype=case.dtype)
        return torch.utils.data.TensorDataset(numbers, inputs, torch.randint(3, (n,), generator=generator))
    inputs = torch.randn(n, 20, generator=generator, dtype=case.dtype)
    targets = torch.randint(3, (n, 4), generator=generator)
    lengths = torch.tensor([(case.lengths or (4, 1, 2, 0, 3))[i % len(case.lengths or "12345")] for i in range(n)])
    targets[torch.arange(4) >= lengths[:, None]] = -100
    return torch.utils.data.TensorDataset(numbers, inputs, targets)


# -- distloop --------------------------------------------------------------------------------------------------------


SHARDED = ("zero_offload",)  # strategies under which a rank sees the gradients of what it owns alone


class Spy(Transform):
    """Keeps what is about to be applied, zeros where that is another rank's, and how often each element was there."""

    def __init__(self, learner: str, strategy: Strategy, outcome: Outcome):
        self.learner, self.strategy, self.outcome = learner, strategy, outcome
        self.seen: dict[str, Tensor] = {}

    def __call__(self, stream: Stream, total: Total) -> Stream:
        held = list(stream)
        if held:
            found, self.seen = self._zeros(), self._zeros()
            for i, collected in held:
                divisor = 1.0 if collected.divisor is None else collected.divisor
                for segment, g in zip(self.strategy.shards[i], collected.gradients, strict=True):
                    name = f"{self.learner}.{segment.name}"
                    self._place(found[name], segment, g.detach() / divisor)
                    self._place(self.seen[name], segment, torch.ones_like(g))
            self.outcome.gradients.append({name: g.reshape(-1) for name, g in found.items()})
        yield from held

    def _zeros(self) -> dict[str, Tensor]:
        parameters = {f"{self.learner}.{name}": p for name, p in self.strategy.parameters.items()}
        return {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()
        }

    def _place(self, whole: Tensor, segment: Segment, part: Tensor) -> None:
        in_memory = whole.as_strided((whole.numel(),), (1,))
        order = part if part.dim() == 1 else part.as_strided((part.numel(),), (1,), part.storage_offset())
        in_memory[segment.start : segment.stop] = order


def put_together(transport: Transport, parts: dict[str, Tensor]) -> None:
    """Add up what each rank has seen of its own part."""
    row = torch.cat([part.detach().double().reshape(-1) for part in parts.values()])
    whole = transport.all_gather(row).wait().sum(0).split([part.numel() for part in parts.values()])
    parts |= dict(zip(parts, whole, strict=True))


def trained_by_distloop(transport: Transport, case: Case, plant: Mapping[str, Any] | None = None) -> Outcome:
    """Train ``case`` as rank ``transport.rank``; ``plant`` replaces parts by broken ones (see test_planted_bugs)."""
    plant = plant or {}
    outcome = Outcome()
    objectives = make_objectives(case)
    spies: list[Spy] = []
    learners = [_learner(name, o, transport, case, outcome, plant, spies) for name, o in objectives.items()]
    in_step = any(learner.strategy.in_step for learner in learners)
    batches = _batches(transport, case, objectives, plant, **({"in_step": True} if in_step else {}))
    world = World(transport.rank, transport.size, transport.rank, transport.size)
    watched = Watched(batches, outcome)
    for update in train(watched, plant.get("turns", Turns)(learners, every(case)), range(case.epochs), world):
        if update.learner.strategy.updates_itself:  # what it applied is its secret, what came of it is not
            with update.learner.strategy.whole():
                outcome.trajectory.append(_trained(update.learner.name, update.learner.objective))
    for learner in learners:
        learner.strategy.finish()
    if case.strategy in SHARDED and transport.size > 1:
        for seen in outcome.gradients:
            put_together(transport, seen)
        for spy in (spy for spy in spies if spy.seen):
            put_together(transport, spy.seen)
            assert all((count == 1).all() for count in spy.seen.values()), "every element has one owner"
    for name, o in objectives.items():
        outcome.parameters |= {f"{name}.{k}": p.detach().clone() for k, p in o.model.named_parameters()}
        if hasattr(o, "average"):
            outcome.parameters |= {f"{name}.{k}": p.clone() for k, p in o.average.named_parameters()}
    return outcome


def every(case: Case) -> dict[str, int]:
    return {"generator": case.every} if case.task == "gan" else {}


def _trained(name: str, objective: Any) -> dict[str, Tensor]:
    return {f"{name}.{k}": p.detach().clone().reshape(-1) for k, p in objective.model.named_parameters()}


def _batches(
    transport: Transport, case: Case, objectives: Mapping[str, Any], plant: Mapping[str, Any], **more: Any
) -> Any:
    weighers = {name: o.weight for name, o in objectives.items() if hasattr(o, "weight")}
    options = {"seed": case.seed, "weighers": weighers, "transport": transport}
    data = make_data(case)
    if case.task != "actor_critic":
        leaves = Options(**case.options).leaves if by_leaves(case.strategy) else 0
        plan = Plan(case.samples, case.global_batch_size, case.micro_batch_size, leaves)
        return plant.get("batches", Batches)(data, plan, **options, **more)
    first = sum(case.counts[: transport.rank])
    own = [t[first : first + case.counts[transport.rank]] for t in data.tensors]
    return plant.get("uneven", UnevenBatches)(
        PerRank(torch.utils.data.TensorDataset(*own), passes=2),
        case.counts,
        global_batch_size=case.global_batch_size,
        micro_batch_size=case.micro_batch_size,
        **options,
    )


def _learner(
    name: str,
    objective: Any,
    transport: Transport,
    case: Case,
    outcome: Outcome,
    plant: Mapping[str, Any],
    spies: list[Spy],
) -> Learner:
    parameters = trained_parameters(name, objective.model)
    options = Options(case.bucket_mb, "zeros" if case.unused else "refuse", **case.options)
    recipe = Recipe(
        objective.model,
        case.rule,
        {"momentum": 0.9} if case.rule == "sgd" else {},
        dict.fromkeys(parameters, 0.01),
        clip_norm=case.clip_norm,
        clip_value=case.clip_value,
        loss_scale=case.loss_scale,
    )
    given = [case.strategy, parameters, transport, options]
    strategy = plant["make"](*given) if "make" in plant else make(*given, recipe)
    spies.append(Spy(name, strategy, outcome))
    chain = [] if strategy.updates_itself else _transforms(case, plant, spies[-1])
    rules = {"sgd": optimizers.SGD(0.9), "adamw": optimizers.Adam(decoupled=True)}
    rule = plant.get("optimizer", optimizers.Optimizer)(
        rules[case.rule], strategy.shards, dict.fromkeys(parameters, 0.01)
    )
    make_learner: type[Learner] = plant.get("learner", Learner)
    return make_learner(
        name,
        objective,
        strategy,
        rule,
        lr=0.05,
        schedule=Constant(),
        transforms=chain,
        precision=case.precision,
        unused="zeros" if case.unused else "refuse",
    )


def _transforms(case: Case, plant: Mapping[str, Any], spy: Spy) -> list[Transform]:
    chain: list[Transform] = []
    if case.loss_scale is not None:
        chain.append(LossScale(case.loss_scale))
    if case.clip_norm is not None:
        chain.append(plant.get("clip", ClipByNorm)(case.clip_norm))
    if case.clip_value is not None:
        chain.append(ClipByValue(case.clip_value))
    return [*chain, spy]


class Watched:
    """A task that notes which samples its rank is given."""

    def __init__(self, batches: Batches, outcome: Outcome):
        self.batches, self.outcome = batches, outcome

    def collect(self, epoch: int) -> Watched:
        self.outcome.seen.append([])
        return self

    def extract(self, epoch: int, world: World) -> Iterator[Any]:
        for minibatch in self.batches.extract(epoch, world):
            for micro_batch in minibatch:
                if micro_batch.batch is not None:
                    self.outcome.seen[-1] += micro_batch.batch[0].tolist()
            yield minibatch


# -- the law ---------------------------------------------------------------------------------------------------------


def trained_plainly(case: Case) -> Outcome:
    """Train ``case`` by hand, on whole global batches."""
    outcome, objectives, data = Outcome(), make_objectives(case), make_data(case)
    classes = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.01),
    }
    hands = {name: classes[case.rule](list(o.model.parameters())) for name, o in objectives.items()}
    averages = {k: p.detach().clone() for k, p in _generator(objectives)}
    for step, order in enumerate(global_batches(case)):
        batch = [t[order] for t in data.tensors]
        for name, o in objectives.items():
            if (step + 1) % every(case).get(name, 1):
                continue
            for other in objectives.values():
                other.model.zero_grad()
            loss = o.loss(o.guess(batch), o.targets(batch))
            if loss.isfinite():  # else there was no token in the whole global batch
                loss.backward()
            named = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in o.model.named_parameters()}
            for k, p in o.model.named_parameters():
                p.grad = named[k]
            if case.clip_norm is not None:
                nn.utils.clip_grad_norm_(o.model.parameters(), case.clip_norm)
            if case.clip_value is not None:
                nn.utils.clip_grad_value_(o.model.parameters(), case.clip_value)
            outcome.gradients.append(
                {f"{name}.{k}": p.grad.clone().reshape(-1) for k, p in o.model.named_parameters() if p.grad is not None}
            )
            hands[name].step()
            outcome.trajectory.append(_trained(name, o))
            if name == "generator":
                averages = {k: 0.9 * averages[k] + 0.1 * p.detach() for k, p in _generator(objectives)}
    for name, o in objectives.items():
        outcome.parameters |= {f"{name}.{k}": p.detach().clone() for k, p in o.model.named_parameters()}
    outcome.parameters |= {f"generator.average.{k}": average for k, average in averages.items()}
    return outcome


def _generator(objectives: Mapping[str, Any]) -> Sequence[tuple[str, Tensor]]:
    return list(objectives["generator"].model.named_parameters()) if "generator" in objectives else []


def permutation(seed: int, epoch: int, samples: int) -> Tensor:
    """Return the order of an epoch."""
    return Order(derive_seed("order", seed, epoch), samples)(torch.arange(samples))


def global_batches(case: Case) -> Iterator[Tensor]:
    """Yield the numbers of the samples of each global batch, in the order of training."""
    for epoch in range(case.epochs):
        if case.task != "actor_critic":
            yield from permutation(case.seed, epoch, case.samples).split(case.global_batch_size)
            continue
        for number in range(2):
            places = []
            for rank, n in enumerate(case.counts):
                order = permutation(derive_seed("own", case.seed, rank, number), epoch, n).tolist()
                places += [((j + 0.5) / n, rank, sum(case.counts[:rank]) + i) for j, i in enumerate(order)]
            yield from torch.tensor([i for _, _, i in sorted(places)]).split(case.global_batch_size)


def trained_plainly_in_parts(case: Case, ranks: int) -> Outcome:
    """Train a classifier in one process under autocast, with the micro-batches that ``ranks`` ranks would run.

    Low precision rounds each micro-batch's gradient, so the parts must be the same for the sums to be.
    """
    outcome, data = Outcome(), make_data(case)
    (objective,) = make_objectives(case).values()
    plan = Plan(case.samples, case.global_batch_size, case.micro_batch_size)
    named = dict(objective.model.named_parameters())
    optimizer = torch.optim.SGD(named.values(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for epoch, step in itertools.product(range(case.epochs), range(plan.steps)):
        order = permutation(case.seed, epoch, case.samples)
        optimizer.zero_grad()
        for rank in range(ranks):
            for part in plan.micro_batches(step, rank, ranks):
                batch = [t[order[part.start : part.stop]] for t in data.tensors]
                with torch.autocast("cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[case.precision]):
                    loss = objective.loss(objective.guess(batch), objective.targets(batch))
                (loss * (len(part) / len(plan.batch(step)))).backward()
        outcome.gradients.append({f"classifier.{k}": p.grad.clone().view(-1) for k, p in named.items()})
        optimizer.step()
        outcome.trajectory.append(_trained("classifier", objective))
    outcome.parameters = {f"classifier.{k}": p.detach().clone() for k, p in named.items()}
    return outcome


def difference(one: Outcome, other: Outcome) -> float:
    """Return the largest relative difference at any step and at the end.

    At any step it is that of the gradients; where a strategy keeps them to itself, that of the parameters they led to.
    """
    hidden = one.trajectory and not one.gradients
    steps, others = (one.trajectory, other.trajectory) if hidden else (one.gradients, other.gradients)
    assert len(steps) == len(others), (len(steps), len(others))
    pairs = [*zip(steps, others, strict=True), (one.parameters, other.parameters)]
    return max(_relative(a, b) for a, b in pairs)


def _relative(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    x, y = (torch.cat([d[k].flatten().double() for k in sorted(d)]) for d in (a, b))
    return float((x - y).norm() / y.norm().clamp(min=1e-30))


def tolerance(case: Case) -> float:
    """Return what the contract allows: 1e-12 in double precision, 1e-6 in single."""
    return 1e-12 if case.dtype == torch.float64 else 1e-6


def run_cases(transport: Transport, cases: Sequence[Case]) -> list[Outcome]:
    """Train several cases in one process group."""
    return [trained_by_distloop(transport, case) for case in cases]
