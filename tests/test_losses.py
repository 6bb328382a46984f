"""Losses against numbers worked out by hand, against torch, and against loops over triplets."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from distloop.errors import ConfigError
from distloop.losses import (
    LOSSES,
    BatchTriplet,
    BinaryFocal,
    Contrastive,
    CrossEntropyDice,
    Dice,
    Focal,
    discriminator_loss,
    generator_loss,
    make_loss,
    weigher,
)

MINING = ["hard", "semi_hard", "all"]
DISTANCES = ["euclidean", "squared", "cosine"]
WEIGHTS = [0.1, 2.0, 0.7]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Callable[..., Tensor], guesses: Any, targets: Any) -> list[Tensor]:
    """Return the gradients of the loss by its guesses, one tensor or several."""
    several = [g.clone().requires_grad_() for g in (guesses if isinstance(guesses, tuple) else (guesses,))]
    loss(tuple(several) if isinstance(guesses, tuple) else several[0], targets).backward()
    return [g.grad for g in several]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


# Numbers worked out by hand


def test_focal_by_hand() -> None:
    # softmax of (log 1, log 3) is (1/4, 3/4); of (log 4, log 1), (4/5, 1/5)
    guesses = tensor([0.0, math.log(3.0)], [math.log(4.0), 0.0])
    targets = torch.tensor([0, 0])
    plain = (0.75**2 * math.log(4.0) + 0.2**2 * math.log(1.25)) / 2
    assert Focal()(guesses, targets).item() == pytest.approx(plain, rel=1e-14)
    mixed = torch.tensor([0, 1])
    weighted = (2.0 * 0.75**3 * math.log(4.0) + 0.5 * 0.8**3 * math.log(5.0)) / 2.5
    assert Focal(3.0, [2.0, 0.5])(guesses, mixed).item() == pytest.approx(weighted, rel=1e-14)
    one = Focal(ignore_index=0)(guesses, mixed).item()
    assert one == pytest.approx(0.8**2 * math.log(5.0), rel=1e-14)


def test_binary_focal_by_hand() -> None:
    guesses, targets = tensor(math.log(3.0), math.log(3.0)), torch.tensor([1, 0])  # probability 3/4
    expected = (0.25 * 0.25**2 * math.log(4 / 3) + 0.75 * 0.75**2 * math.log(4.0)) / 2
    assert BinaryFocal()(guesses, targets).item() == pytest.approx(expected, rel=1e-14)
    assert BinaryFocal(alpha=None)(guesses, targets.bool()).item() == pytest.approx(
        (0.25**2 * math.log(4 / 3) + 0.75**2 * math.log(4.0)) / 2, rel=1e-14
    )


def test_contrastive_by_hand() -> None:
    a, b = tensor([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]), tensor([3.0, 4.0], [3.0, 4.0], [0.6, 0.8])
    same, far, near = 5.0**2 / 2, 0.0, (2.0 - 1.0) ** 2 / 2
    assert Contrastive(2.0)((a, b), torch.tensor([1, 0, 0])).item() == pytest.approx((same + far + near) / 3, rel=1e-14)


@pytest.mark.parametrize(
    ("margin", "mining", "expected"),
    [
        # places 0 and 1 of label 0, place 3 of label 1, place 4 of label 0
        (1.0, "hard", ((1 + 4 - 3) + (1 + 3 - 2) + (1 + 4 - 1)) / 3),
        (2.5, "semi_hard", ((2.5 + 1 - 3) + (2.5 + 1 - 2)) / 2),
        (1.5, "all", (0 + (1.5 + 4 - 3) + (1.5 + 1 - 2) + (1.5 + 3 - 2) + (1.5 + 4 - 1) + (1.5 + 3 - 1)) / 6),
        ("soft", "hard", (math.log1p(math.e) + math.log1p(math.e) + math.log1p(math.e**3)) / 3),
    ],
)
def test_batch_triplet_by_hand(margin: float | str, mining: str, expected: float) -> None:
    places, labels = tensor([0.0], [1.0], [3.0], [4.0]), torch.tensor([0, 0, 1, 0])
    assert BatchTriplet(margin, mining)(places, labels).item() == pytest.approx(expected, rel=1e-14)


def test_dice_by_hand() -> None:
    # Two samples, two classes, two places; each place's softmax is (1/4, 3/4) or (1/2, 1/2).
    guesses = tensor([[0.0, 0.0], [math.log(3.0), 0.0]], [[0.0, 0.0], [0.0, math.log(3.0)]])
    targets = torch.tensor([[1, 0], [1, 1]])
    p = [[[0.25, 0.5], [0.75, 0.5]], [[0.5, 0.25], [0.5, 0.75]]]
    g = [[[0, 1], [1, 0]], [[0, 0], [1, 1]]]
    for squared, smooth, background in itertools.product([True, False], [1.0, 0.25], [True, False]):
        overlaps = []
        for sample, k in itertools.product(range(2), range(0 if background else 1, 2)):
            both = sum(x * y for x, y in zip(p[sample][k], g[sample][k], strict=True))
            size = sum(x**2 if squared else x for x in p[sample][k]) + sum(g[sample][k])
            overlaps.append((2 * both + smooth) / (size + smooth))
        found = Dice(smooth, squared, background)(guesses, targets).item()
        assert found == pytest.approx(1 - sum(overlaps) / len(overlaps), rel=1e-14)
    # one of them in figures: class 1 alone, plain sums, smooth 1
    figures = 1 - ((2 * 0.75 + 1) / (1.25 + 1 + 1) + (2 * 1.25 + 1) / (1.25 + 2 + 1)) / 2
    assert Dice(squared=False, background=False)(guesses, targets).item() == pytest.approx(figures, rel=1e-14)
    entropy = (math.log(4 / 3) + 3 * math.log(2.0) - math.log(2.0) + math.log(4 / 3)) / 4
    combined = CrossEntropyDice(0.5, 2.0, background=False)(guesses, targets).item()
    assert combined == pytest.approx(0.5 * entropy + 2.0 * figures, rel=1e-14)


def test_dice_leaves_out_what_is_ignored() -> None:
    guesses, targets = normal(3, 4, 6), integers(4, 3, 6)
    hidden = targets.clone()
    hidden[:, 4:] = 9
    for loss in (Dice(ignore_index=9), CrossEntropyDice(ignore_index=9)):
        torch.testing.assert_close(loss(guesses, hidden), loss(guesses[..., :4], targets[:, :4]), rtol=1e-14, atol=0)
        assert gradient(loss, guesses, hidden)[0][..., 4:].count_nonzero() == 0
        assert loss(guesses, torch.full_like(targets, 9)).item() == pytest.approx(0.0, abs=1e-15)


def test_adversarial_by_hand() -> None:
    real, fake = tensor(2.0, -1.0), tensor(0.5, 1.5, -3.0)
    judged_real = -(math.log(sigmoid(2.0)) + math.log(sigmoid(-1.0))) / 2
    judged_fake = -sum(math.log(1 - sigmoid(x)) for x in (0.5, 1.5, -3.0)) / 3
    assert discriminator_loss(real, fake).item() == pytest.approx(judged_real + judged_fake, rel=1e-13)
    assert generator_loss(fake, "minimax").item() == pytest.approx(-judged_fake, rel=1e-13)
    fooled = -sum(math.log(sigmoid(x)) for x in (0.5, 1.5, -3.0)) / 3
    assert generator_loss(fake).item() == pytest.approx(fooled, rel=1e-13)


# Against torch


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 2, 3)])
@pytest.mark.parametrize("ignored", [None, -100, 1])
def test_focal_without_gamma_is_cross_entropy(weights: Any, shape: Any, ignored: int | None) -> None:
    guesses, targets = normal(shape[0], 3, *shape[1:]), integers(3, *shape)
    index = -100 if ignored is None else ignored
    if ignored == -100:
        targets.view(-1)[::3] = -100
    ours = Focal(0.0, weights, ignore_index=index)

    def theirs(guesses: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(guesses, targets, tensor(*weights) if weights else None, ignore_index=index)

    torch.testing.assert_close(ours(guesses, targets), theirs(guesses, targets), rtol=1e-12, atol=1e-12)
    (one,), (other,) = gradient(ours, guesses, targets), gradient(theirs, guesses, targets)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_focal_does_not_look_at_what_is_ignored() -> None:
    guesses = tensor([1.0, 2.0], [-math.inf, 0.0])
    (found,) = gradient(Focal(), guesses, torch.tensor([0, -100]))
    assert found[1].tolist() == [0.0, 0.0]
    assert found[0].isfinite().all()


def test_binary_focal_without_gamma_is_binary_cross_entropy() -> None:
    guesses, targets = 5 * normal(4, 3), integers(2, 4, 3).double()
    expected = F.binary_cross_entropy_with_logits(guesses, targets)
    torch.testing.assert_close(BinaryFocal(0.0, None)(guesses, targets), expected, rtol=1e-13, atol=0)


def test_two_classes_of_focal_are_binary_focal() -> None:
    guesses, targets = normal(6), integers(2, 6)
    both = torch.stack([torch.zeros_like(guesses), guesses], 1)
    torch.testing.assert_close(
        Focal(1.5)(both, targets), BinaryFocal(1.5, None)(guesses, targets), rtol=1e-13, atol=1e-15
    )


def test_discriminator_loss_is_binary_cross_entropy() -> None:
    real, fake = 4 * normal(6, 2), 4 * normal(5, 1, seed=1)
    for smoothing in (0.0, 0.1):
        expected = F.binary_cross_entropy_with_logits(real, torch.full_like(real, 1 - smoothing))
        expected = expected + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        torch.testing.assert_close(discriminator_loss(real, fake, smoothing), expected, rtol=1e-13, atol=0)


def test_adversarial_losses_do_not_overflow() -> None:
    logits = tensor(-1e4, 1e4).float()
    values = [discriminator_loss(logits, logits, 0.1), generator_loss(logits), generator_loss(logits, "minimax")]
    assert [round(float(v)) for v in values] == [10_000, 5_000, -5_000]


def test_cross_entropy_dice_starts_from_cross_entropy() -> None:
    guesses, targets = normal(3, 4, 5, 2), integers(4, 3, 5, 2)
    torch.testing.assert_close(
        CrossEntropyDice(dice=0.0)(guesses, targets), F.cross_entropy(guesses, targets), rtol=1e-13, atol=0
    )
    assert torch.equal(CrossEntropyDice(0.0)(guesses, targets), Dice(squared=False)(guesses, targets))


def test_half_precision_is_widened() -> None:
    guesses, targets = normal(4, 3).bfloat16(), integers(3, 4)
    for loss in (Focal(alpha=WEIGHTS), make_loss("cross_entropy", {"weight": WEIGHTS}, "here"), BatchTriplet()):
        found = loss(guesses, targets)
        assert found.dtype == torch.float32
        assert torch.equal(found, copy.deepcopy(loss)(guesses.float(), targets))


# Numerical gradients


def at_pairs(loss: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda a, b, targets: loss((a, b), targets)


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (Focal(), (normal(4, 3), integers(3, 4))),
        (Focal(0.5, WEIGHTS, 1), (normal(3, 3, 4), integers(3, 3, 4))),
        (BinaryFocal(), (normal(4, 3), integers(2, 4, 3))),
        (BinaryFocal(0.5, None), (normal(7), integers(2, 7))),
        (at_pairs(Contrastive(2.0)), (normal(5, 3), normal(5, 3, seed=1), torch.tensor([1, 0, 0, 1, 0]))),
        (Dice(), (normal(2, 3, 4), integers(3, 2, 4))),
        (Dice(0.1, False, False, 2), (normal(2, 3, 2, 2), integers(3, 2, 2, 2))),
        (CrossEntropyDice(0.5, 2.0, ignore_index=0), (normal(2, 3, 4), integers(3, 2, 4))),
        (discriminator_loss, (normal(4), normal(3, 2, seed=1))),
        (generator_loss, (normal(4),)),
        (lambda fake: generator_loss(fake, "minimax"), (normal(4),)),
    ],
)
def test_gradients_are_the_numerical_ones(loss: Callable[..., Tensor], given: tuple[Tensor, ...]) -> None:
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in given]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("margin", "mining"), [(0.8, "hard"), (0.8, "semi_hard"), (0.8, "all"), ("soft", "hard"), ("soft", "all")]
)
def test_gradients_of_mined_triplets(mining: str, distance: str, margin: float | str) -> None:
    embeddings, labels = normal(7, 3, seed=3).requires_grad_(), torch.tensor([0, 1, 0, 2, 1, 0, 1])
    loss = BatchTriplet(margin, mining, distance)
    assert loss(embeddings, labels) > 0
    assert torch.autograd.gradcheck(loss, (embeddings, labels))


# Mining


def distance_of(x: list[float], y: list[float], kind: str) -> float:
    if kind == "cosine":
        return 1 - sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))
    return math.dist(x, y) ** (2 if kind == "squared" else 1)


def brute_force(points: list[list[float]], labels: list[int], margin: float | None, mining: str, kind: str) -> float:
    """Return the mean over the triplets that are mined, found by looking at every one."""
    n = len(points)
    d = [[distance_of(x, y, kind) for y in points] for x in points]

    def cost(gap: float) -> float:
        return math.log1p(math.exp(gap)) if margin is None else max(0.0, margin + gap)

    costs = []
    for a in range(n):
        hardest = []
        for p in range(n):
            if p == a or labels[p] != labels[a]:
                continue
            negatives = [d[a][k] for k in range(n) if labels[k] != labels[a]]
            if mining == "semi_hard":
                inside = [x for x in negatives if d[a][p] < x < d[a][p] + (margin or 0.0)]
                costs += [cost(d[a][p] - min(inside))] if inside else []
            elif mining == "all":
                costs += [cost(d[a][p] - x) for x in negatives]
            elif negatives:
                hardest.append(cost(d[a][p] - min(negatives)))
        costs += [max(hardest)] if hardest else []
    return sum(costs) / len(costs) if costs else 0.0


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
    mining=st.sampled_from(MINING),
    kind=st.sampled_from(DISTANCES),
    margin=st.sampled_from([0.3, 1.5, None]),
)
def test_mining_finds_what_a_triple_loop_finds(
    labels: list[int], seed: int, mining: str, kind: str, margin: float | None
) -> None:
    if margin is None and mining == "semi_hard":
        margin = 0.7
    points = normal(len(labels), 3, seed=seed)
    found = BatchTriplet(margin or "soft", mining, kind)(points, torch.tensor(labels))
    expected = brute_force(points.tolist(), labels, margin, mining, kind)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradients_at_distance_0_are_finite(mining: str, distance: str, value: float) -> None:
    embeddings, labels = torch.full((6, 3), value, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])
    loss = BatchTriplet(0.5, mining, distance)
    assert loss(embeddings, labels).item() == pytest.approx(0.0 if mining == "semi_hard" else 0.5, abs=1e-15)
    assert gradient(loss, embeddings, labels)[0].isfinite().all()
    embeddings[2:] += normal(4, 3)
    assert gradient(loss, embeddings, labels)[0].isfinite().all()


def test_equal_pairs_are_not_pushed() -> None:
    a = normal(3, 2)
    assert Contrastive(2.0)((a, a), torch.zeros(3)).item() == pytest.approx(2.0)
    assert all(not g.any() for g in gradient(Contrastive(2.0), (a, a.clone()), torch.zeros(3)))


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_a_batch_without_a_triplet_teaches_nothing(mining: str, labels: list[int]) -> None:
    loss = BatchTriplet(1.0, mining)
    assert loss(normal(3, 2), torch.tensor(labels)).item() == 0.0
    assert not gradient(loss, normal(3, 2), torch.tensor(labels))[0].any()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_certain_guesses_have_finite_gradients(gamma: float) -> None:
    sure = tensor([200.0, -200.0], [-200.0, 200.0]).float()
    for targets in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        assert gradient(Focal(gamma), sure, targets)[0].isfinite().all()
        assert gradient(BinaryFocal(gamma), sure[:, 1], targets)[0].isfinite().all()


@pytest.mark.parametrize(
    ("loss", "guesses", "targets"),
    [
        (Focal(alpha=WEIGHTS), normal(4, 3), integers(3, 4)),
        (BinaryFocal(), normal(4, 3), integers(2, 4, 3)),
        (Contrastive(), (normal(4, 3), normal(4, 3)), integers(2, 4)),
        *((BatchTriplet(mining=mining), normal(4, 3), integers(2, 4)) for mining in MINING),
        (CrossEntropyDice(), normal(4, 3, 5), integers(3, 4, 5)),
        (make_loss("cross_entropy", {"weight": WEIGHTS}, "here"), normal(4, 3), integers(3, 4)),
    ],
)
def test_nothing_waits_for_the_device(loss: nn.Module, guesses: Any, targets: Tensor) -> None:
    # A tensor without values: whatever would need one on the host fails.
    bare = tuple(g.to("meta") for g in guesses) if isinstance(guesses, tuple) else guesses.to("meta")
    assert loss(bare, targets.to("meta")).shape == ()


# Splitting a batch over ranks


def check_split(loss: Callable[..., Tensor], guesses: Any, targets: Any, weight: Callable[[Any], float]) -> None:
    """Compare the gradient of the whole with that of two unequal parts, weighted by their shares."""
    whole = gradient(loss, guesses, targets)
    several = guesses if isinstance(guesses, tuple) else (guesses,)
    parts = []
    for part in (slice(0, 2), slice(2, None)):
        own = tuple(g[part] for g in several)
        found = gradient(loss, own if isinstance(guesses, tuple) else own[0], targets[part])
        share = weight((None, targets[part])) / weight((None, targets))
        parts.append([share * g for g in found])
    for one, *halves in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat(halves), one, rtol=1e-12, atol=1e-14)


def samples(batch: Any) -> float:
    return float(len(batch[1]))


@pytest.mark.parametrize(
    ("loss", "guesses", "targets"),
    [
        (Focal(), normal(6, 3), integers(3, 6)),
        (BinaryFocal(), normal(6, 2), integers(2, 6, 2)),
        (Contrastive(2.0), (normal(6, 3), normal(6, 3, seed=1)), integers(2, 6)),
        (Dice(), normal(6, 3, 4), integers(3, 6, 4)),
        (Dice(ignore_index=1), normal(6, 3, 4), integers(3, 6, 4)),
        (CrossEntropyDice(), normal(6, 3, 4), integers(3, 6, 4)),
        (CrossEntropyDice(ignore_index=2), normal(6, 3, 4), integers(3, 6, 4)),
        (lambda guesses, _: discriminator_loss(*guesses, 0.1), (normal(6), normal(6, seed=1)), torch.zeros(6)),
        (lambda guesses, _: generator_loss(guesses), normal(6), torch.zeros(6)),
        (lambda guesses, _: generator_loss(guesses, "minimax"), normal(6), torch.zeros(6)),
        (make_loss("huber_loss", {}, "here"), normal(6, 2), normal(6, 2, seed=1)),
        (make_loss("kl_div", {}, "here"), normal(6, 3).log_softmax(1), normal(6, 3, seed=1).softmax(1)),
    ],
)
def test_a_split_batch_has_the_same_gradient(loss: Callable[..., Tensor], guesses: Any, targets: Any) -> None:
    assert weigher(loss) is None or isinstance(loss, Focal)
    check_split(loss, guesses, targets, samples)


@pytest.mark.parametrize(
    "loss",
    [
        Focal(2.0, WEIGHTS),
        Focal(2.0, WEIGHTS, ignore_index=1),
        Focal(ignore_index=0),
        make_loss("cross_entropy", {"weight": WEIGHTS}, "here"),
        make_loss("CrossEntropyLoss", {"weight": WEIGHTS, "ignore_index": 1, "label_smoothing": 0.1}, "here"),
        make_loss("nll_loss", {"ignore_index": 2}, "here"),
    ],
)
def test_a_split_batch_weighs_what_counts(loss: nn.Module) -> None:
    weight = weigher(loss)
    assert weight is not None
    check_split(loss, normal(6, 3, 2), integers(3, 6, 2), weight)
    with pytest.raises(AssertionError):  # by the number of samples it would not be the same
        check_split(loss, normal(6, 3, 2), integers(3, 6, 2), samples)


def test_probabilities_weigh_their_samples() -> None:
    loss = make_loss("cross_entropy", {"weight": WEIGHTS}, "here")
    weight = weigher(loss)
    targets = normal(6, 3, 2, seed=1).softmax(1)
    assert weight is not None
    assert weight((None, targets)) == 12.0
    check_split(loss, normal(6, 3, 2), targets, weight)


def test_mining_depends_on_the_split() -> None:
    with pytest.raises(AssertionError):
        check_split(BatchTriplet(1.0), normal(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]), samples)


# By name


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("focal", {"gamma": 1, "alpha": [1, 2]}, Focal),
        ("binary_focal", {"alpha": None}, BinaryFocal),
        ("contrastive", None, Contrastive),
        ("batch_triplet", {"margin": "soft", "mining": "all"}, BatchTriplet),
        ("dice", {"squared": False, "reduction": "mean"}, Dice),
        ("cross_entropy_dice", {"dice": 0.5}, CrossEntropyDice),
        ("CrossEntropyLoss", {}, nn.CrossEntropyLoss),
        ("cross_entropy", {"label_smoothing": 0.1, "reduction": "mean"}, nn.CrossEntropyLoss),
        ("mse_loss", {}, nn.MSELoss),
        ("smooth_l1_loss", {"beta": 0.5}, nn.SmoothL1Loss),
        ("huber_loss", {"delta": 2}, nn.HuberLoss),
        ("binary_cross_entropy", {}, nn.BCELoss),
        ("binary_cross_entropy_with_logits", {"pos_weight": [3.0]}, nn.BCEWithLogitsLoss),
        ("kl_div", {"log_target": True, "reduction": "batchmean"}, nn.KLDivLoss),
        ("multilabel_soft_margin_loss", {}, nn.MultiLabelSoftMarginLoss),
        ("ctc_loss", {"zero_infinity": True}, nn.CTCLoss),
    ],
)
def test_a_loss_by_name(name: str, options: Any, kind: type[nn.Module]) -> None:
    loss = make_loss(name, options, "run.yaml: task.loss")
    assert type(loss) is kind
    for option, value in (options or {}).items():
        if option not in ("reduction", "alpha", "pos_weight", "margin"):
            assert getattr(loss, option) == value


def test_every_loss_of_torch_can_be_made_and_called() -> None:
    pair = (normal(4, 3), normal(4, 3, seed=1))
    probabilities = pair[1].softmax(1)
    given: dict[type[nn.Module], tuple[Any, Any]] = dict.fromkeys(LOSSES.values(), pair)
    given |= dict.fromkeys(
        [nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss, Focal, BatchTriplet], (pair[0], integers(3, 4))
    )
    given |= {nn.BCELoss: (probabilities, probabilities), BinaryFocal: (pair[0], integers(2, 4, 3))}
    given |= {
        nn.KLDivLoss: (pair[0].log_softmax(1), probabilities),
        nn.MultiLabelMarginLoss: (pair[0], integers(3, 4, 3)),
    }
    given |= dict.fromkeys([nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss], ((*pair, -pair[0]), None))
    given |= dict.fromkeys([nn.CosineEmbeddingLoss, Contrastive], (pair, torch.ones(4)))
    given |= {nn.MarginRankingLoss: (pair, torch.ones(4, 3)), nn.GaussianNLLLoss: ((pair[0], probabilities), pair[1])}
    given |= dict.fromkeys([Dice, CrossEntropyDice], (normal(2, 3, 4), integers(3, 2, 4)))
    lengths = torch.tensor([5, 5]), torch.tensor([2, 2])
    given |= {nn.CTCLoss: (normal(5, 2, 4).log_softmax(2), (integers(3, 2, 2) + 1, *lengths))}
    for name, kind in LOSSES.items():
        found = make_loss(name, {}, "here")(*given[kind])
        assert found.shape == (), name
        assert found.isfinite(), name


def test_arguments_reach_torch_in_its_order() -> None:
    a, p, n = normal(4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    var, sign = a.abs() + 0.1, torch.tensor([1.0, -1.0, -1.0, 1.0])
    made: list[tuple[Any, Any]] = [
        (
            make_loss("triplet_margin_loss", {"swap": True}, "")((a, p, n), None),
            F.triplet_margin_loss(a, p, n, swap=True),
        ),
        (make_loss("gaussian_nll_loss", {}, "")([a, var], p), F.gaussian_nll_loss(a, p, var)),
        (make_loss("cosine_embedding_loss", {}, "")((a, p), sign), F.cosine_embedding_loss(a, p, sign)),
        (
            make_loss("margin_ranking_loss", {"margin": 0.5}, "")((a, p), n.sign()),
            F.margin_ranking_loss(a, p, n.sign(), margin=0.5),
        ),
        (
            make_loss("cross_entropy", {"weight": WEIGHTS}, "")(a, integers(3, 4)),
            F.cross_entropy(a, integers(3, 4), tensor(*WEIGHTS)),
        ),
        (
            make_loss("binary_cross_entropy_with_logits", {"pos_weight": WEIGHTS}, "")(a, p.sigmoid()),
            F.binary_cross_entropy_with_logits(a, p.sigmoid(), pos_weight=tensor(*WEIGHTS)),
        ),
    ]
    for ours, theirs in made:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("focl", {}, "unknown loss 'focl' (did you mean 'focal'?)"),
        ("cross_entropi", {}, "unknown loss 'cross_entropi' (did you mean 'cross_entropy'?)"),
        (None, {}, "unknown loss None"),
        ("relu", {}, "unknown loss 'relu'"),
        ("Linear", {}, "unknown loss 'Linear'"),
        ("focal", {"gama": 1}, "focal takes no 'gama' (did you mean 'gamma'?)"),
        ("mse_loss", {"beta": 1}, "mse_loss takes no 'beta'"),
        ("mse_loss", {"size_average": False}, "mse_loss takes no 'size_average'"),
        ("mse_loss", {"reduction": "sum"}, "mse_loss: reduction is 'sum', but distloop needs the mean over samples"),
        ("focal", {"reduction": "none"}, "focal: reduction is 'none', but distloop needs the mean over samples"),
        ("mse_loss", {"reduction": "batchmean"}, "mse_loss: reduction is 'batchmean'"),
        ("focal", {"gamma": -1}, "Focal: gamma must be a number of at least 0, not -1"),
        ("focal", {"gamma": math.nan}, "Focal: gamma must be a number of at least 0, not nan"),
        ("focal", {"gamma": True}, "Focal: gamma must be a number of at least 0, not True"),
        ("focal", {"alpha": 0.25}, "Focal: alpha must be a list of numbers, not 0.25"),
        ("focal", {"alpha": [1, -1]}, "Focal: alpha: an entry must be a number of at least 0, not -1"),
        ("focal", {"ignore_index": 0.5}, "focal: ignore_index must be a whole number, not 0.5"),
        ("binary_focal", {"alpha": 1.5}, "BinaryFocal: alpha must be a number of at least 0 and at most 1, not 1.5"),
        ("contrastive", {"margin": 0}, "Contrastive: margin must be a number above 0, not 0"),
        ("batch_triplet", {"margin": "softt"}, "BatchTriplet: margin must be a number above 0, not 'softt'"),
        (
            "batch_triplet",
            {"mining": "semihard"},
            "BatchTriplet: mining: unknown 'semihard' (did you mean 'semi_hard'?)",
        ),
        ("batch_triplet", {"distance": "l1"}, "BatchTriplet: distance: unknown 'l1' (known: "),
        ("batch_triplet", {"mining": "semi_hard", "margin": "soft"}, "BatchTriplet: semi_hard mining looks inside"),
        ("dice", {"smooth": 0}, "Dice: smooth must be a number above 0, not 0"),
        ("dice", {"squared": "yes"}, "dice: squared must be true or false, not 'yes'"),
        ("cross_entropy_dice", {"dice": -1}, "CrossEntropyDice: dice must be a number of at least 0, not -1"),
        ("cross_entropy", {"label_smoothing": 2}, "cross_entropy: label_smoothing must be a number of at least 0 and"),
        ("cross_entropy", {"weight": "abc"}, "cross_entropy: weight must be a list of numbers, not 'abc'"),
        ("cross_entropy", {"weight": [1, "x"]}, "cross_entropy: weight: an entry must be a number"),
        ("cross_entropy", {"ignore_index": True}, "cross_entropy: ignore_index must be a whole number, not True"),
        ("huber_loss", {"delta": 0}, "huber_loss: delta must be a number above 0, not 0"),
        ("smooth_l1_loss", {"beta": -1}, "smooth_l1_loss: beta must be a number of at least 0, not -1"),
        ("multi_margin_loss", {"p": 3}, "multi_margin_loss: "),
        ("margin_ranking_loss", {"margin": "x"}, "margin_ranking_loss: margin must be a number, not 'x'"),
        (
            "triplet_margin_with_distance_loss",
            {"distance_function": "x"},
            "triplet_margin_with_distance_loss: distance_f",
        ),
    ],
)
def test_what_a_configuration_gets_wrong(name: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as failure:
        make_loss(name, options, "run.yaml: task.loss")
    assert str(failure.value).startswith(f"run.yaml: task.loss: {sentence}")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("loss", "guesses", "targets", "sentence"),
    [
        (Focal(), normal(4, 3), integers(3, 5), "Focal: guesses are (4, 3) and targets (5,); (N, C, ...) need targets"),
        (Focal(), normal(4), integers(3, 4), "Focal: guesses are (4,) and targets (4,); "),
        (Focal(), (normal(4, 3),), integers(3, 4), "Focal: guesses are tuple and targets (4,); "),
        (Focal(), normal(4, 3), normal(4), "Focal: targets are torch.float64; class indices are integers"),
        (Focal(alpha=[1.0, 2.0]), normal(4, 3), integers(3, 4), "Focal: 2 class weights for 3 classes"),
        (BinaryFocal(), normal(4, 1), integers(2, 4), "BinaryFocal: tensors of one shape are needed, not (4, 1), (4,)"),
        (
            Contrastive(),
            normal(4, 3),
            integers(2, 4),
            "Contrastive: guesses must be (embeddings, other embeddings), not",
        ),
        (Contrastive(), (normal(4, 3), normal(1, 3)), integers(2, 4), "Contrastive: tensors of one shape are needed"),
        (
            Contrastive(),
            (normal(4, 3), normal(4, 3)),
            integers(2, 4, 1),
            "Contrastive: guesses are (4, 3) and targets (4",
        ),
        (BatchTriplet(), normal(4, 3), integers(2, 4, 1), "BatchTriplet: guesses are (4, 3) and targets (4, 1); "),
        (BatchTriplet(), None, integers(2, 4), "BatchTriplet: a tensor is needed, not NoneType"),
        (Dice(), normal(4, 3), integers(3, 4), "Dice: guesses are (4, 3) and targets (4,); "),
        (Dice(), normal(4, 1, 5), integers(1, 4, 5), "Dice: guesses are (4, 1, 5) and targets (4, 5); "),
        (
            CrossEntropyDice(),
            normal(4, 3, 5),
            integers(3, 4),
            "CrossEntropyDice: guesses are (4, 3, 5) and targets (4,)",
        ),
        (make_loss("mse_loss", {}, ""), normal(4, 1), normal(4), "MSELoss: tensors of one shape are needed"),
        (make_loss("cross_entropy", {}, ""), normal(4, 3), integers(3, 4, 1), "CrossEntropyLoss: guesses are (4, 3)"),
        (make_loss("cross_entropy", {}, ""), normal(4, 3), normal(4), "CrossEntropyLoss: tensors of one shape"),
        (make_loss("nll_loss", {"weight": [1, 2]}, ""), normal(4, 3), integers(3, 4), "NLLLoss: 2 class weights for 3"),
        (
            make_loss("binary_cross_entropy_with_logits", {"weight": [1, 2]}, ""),
            *(normal(4, 3), normal(4, 3)),
            "BCEWithLogitsLoss: 2 class weights for 3 classes",
        ),
        (make_loss("triplet_margin_loss", {}, ""), normal(4, 3), None, "TripletMarginLoss: guesses must be (anchor, "),
        (make_loss("ctc_loss", {}, ""), normal(5, 2, 4), integers(3, 2, 2), "CTCLoss: targets must be (targets, input"),
        (
            make_loss("gaussian_nll_loss", {}, ""),
            (normal(4),) * 3,
            normal(4),
            "GaussianNLLLoss: guesses must be (mean, ",
        ),
        (
            make_loss("cosine_embedding_loss", {}, ""),
            (normal(4, 3),) * 2,
            torch.ones(3),
            "CosineEmbeddingLoss: guesses",
        ),
        (
            make_loss("margin_ranking_loss", {}, ""),
            (normal(4),) * 2,
            torch.ones(1),
            "MarginRankingLoss: tensors of one",
        ),
    ],
)
def test_shapes_that_do_not_fit(loss: nn.Module, guesses: Any, targets: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as failure:
        loss(guesses, targets)
    assert str(failure.value).startswith(sentence)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: discriminator_loss(normal(2), normal(2), 1.0),
            "discriminator_loss: smoothing must be a number of at l",
        ),
        (lambda: discriminator_loss(normal(2), None), "discriminator_loss: a tensor is needed, not NoneType"),
        (
            lambda: generator_loss(normal(2), "saturating"),
            "generator_loss: kind: unknown 'saturating' (did you mean 'non",
        ),
    ],
)
def test_what_an_adversary_gets_wrong(call: Callable[[], Tensor], sentence: str) -> None:
    with pytest.raises(ConfigError) as failure:
        call()
    assert str(failure.value).startswith(sentence)
