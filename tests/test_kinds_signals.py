"""Kinds of learning on signals: hidden bytes, reconstruction, metric learning, and communication end to end."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distloop
from distloop.build import Builder, Place
from distloop.build.feeding import Fed
from distloop.errors import ConfigError, DataError
from distloop.settings import from_file, from_mapping, resolve
from distloop.tasks import make_task
from distloop.tasks.autoencoder import Autoencoder
from distloop.tasks.codes import decode, gap_db, hamming_7_4, uncoded
from distloop.tasks.contrastive import ComparePairs, CompareTriplets, Contrastive, draw_other, nearest_label
from distloop.tasks.masked_lm import MASK, UNCHOSEN, GuessHidden, MaskedLM, MaskedText, scramble, unigram_bits
from distloop.tasks.modem import AWGN, GRID, Communication, Modem, draw, through
from distloop.transports import Alone, Transport
from distloop.world import World
from tests.ranks import in_processes

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = ["masked_lm", "autoencoder", "contrastive", "modem"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat. " * 300)
    return str(file)


def masked_lm(text: str, **options: Any) -> MaskedLM:
    return MaskedLM(text, **{"context": 16, "width": 16, "layers": 1, "heads": 2} | options)


def random_text(chunks: int, context: int) -> Tensor:
    return torch.randint(256, (chunks * context + 3,), dtype=torch.uint8)


# Hidden bytes


def test_bits_are_those_of_splitmix64() -> None:
    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the published first number of seed 0"
    for seed in (0, 7, 2**62 - 3):
        expected = [mixed((mixed(seed) + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(50)]
        assert [bits % 2**64 for bits in scramble(seed, torch.arange(50)).tolist()] == expected


def test_masks_are_those_of_bert() -> None:
    hidden = MaskedText(random_text(3000, 64), 64, seed=5, rate=0.15)
    tokens, targets = hidden.__getitems__(range(3000))
    chosen, truth = targets != UNCHOSEN, hidden.chunks.long()
    assert chosen.double().mean().item() == pytest.approx(0.15, abs=0.004)
    assert chosen.double().mean(0).min() > 0.11 and chosen.double().mean(0).max() < 0.19, "at every place"
    assert torch.equal(tokens[~chosen], truth[~chosen]) and torch.equal(targets[chosen], truth[chosen])
    kept, masked = tokens[chosen] == truth[chosen], tokens[chosen] == MASK
    assert masked.double().mean().item() == pytest.approx(0.8, abs=0.012)
    assert kept.double().mean().item() == pytest.approx(0.1 + 0.1 / 256, abs=0.009)
    random = tokens[chosen][~masked & ~kept]
    assert random.double().mean().item() == pytest.approx(127.5, abs=6.0), "any byte, as often as any other"
    assert random.double().std().item() == pytest.approx(73.9, abs=4.0)


def test_a_samples_mask_does_not_depend_on_its_batch() -> None:
    hidden = MaskedText(random_text(40, 16), 16, seed=11, rate=0.3)
    tokens, targets = hidden.__getitems__(range(40))
    order = torch.randperm(40)
    for part in order.split(7):
        some, theirs = hidden.__getitems__(part.tolist())
        assert torch.equal(some, tokens[part]) and torch.equal(theirs, targets[part])
    one, target = hidden[23]
    assert torch.equal(one, tokens[23]) and torch.equal(target, targets[23])
    assert len(hidden) == 40, "what is left of the text is no chunk"


def test_every_epoch_has_masks_of_its_own_and_every_rank_the_same(text: str) -> None:
    task = masked_lm(text)
    seen = []
    for rank in range(2):
        torch.manual_seed(rank)
        config = resolve(from_mapping({"train": {"seed": 3}})).config
        fed = Fed(task, config, Place(World(), Alone(), torch.device("cpu")), {})
        firsts = [next(fed.collect(epoch).extract(0, World())) for epoch in (0, 1)]  # in the same order
        seen.append([first.micro_batches[0].batch for first in firsts])
    for epoch in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(seen[0][epoch], seen[1][epoch], strict=True))
    assert not torch.equal(seen[0][0][1], seen[0][1][1])
    first, again = (task.evaluate(task.validation.__getitems__([0, 1]))["unigram/bits_per_byte"] for _ in range(2))
    assert float(first[0]) == float(again[0]) and first[1] == again[1], "masks of the evaluation stay"


def test_the_loss_is_a_mean_over_chosen_positions() -> None:
    objective = GuessHidden(nn.Identity())  # type: ignore[arg-type]
    targets = torch.tensor([[65, UNCHOSEN, 66], [UNCHOSEN, UNCHOSEN, 67]])
    scores = torch.randn(2, 3, 256)
    by_hand = -(scores[0, 0].log_softmax(0)[65] + scores[0, 2].log_softmax(0)[66] + scores[1, 2].log_softmax(0)[67]) / 3
    assert float(objective.loss(scores, targets)) == pytest.approx(float(by_hand))
    scores[0, 1] = 1e3
    assert float(objective.loss(scores, targets)) == pytest.approx(float(by_hand)), "others are never targets"
    assert objective.weight((targets, targets)) == 3.0


def test_the_model_looks_both_ways(text: str) -> None:
    model = masked_lm(text).objectives["masked_language_model"].model
    tokens = torch.full((1, 16), 65)
    for place in (0, 15):
        changed = tokens.clone()
        changed[0, place] = 66
        assert (model(tokens) != model(changed)).any(-1).all(), "every position sees every other"


def test_unigram_bits_by_hand(text: str) -> None:
    bits = unigram_bits(torch.tensor(list(b"aab"), dtype=torch.uint8))
    assert bits[ord("a")].item() == pytest.approx(-math.log2(3 / 259))
    assert bits[ord("b")].item() == pytest.approx(-math.log2(2 / 259))
    assert bits[ord("c")].item() == pytest.approx(-math.log2(1 / 259)), "a byte never seen is possible"
    task = masked_lm(text)
    targets = torch.full((1, 16), UNCHOSEN)
    targets[0, 3], targets[0, 8] = ord("t"), ord("s")
    total, count = task.evaluate((torch.full((1, 16), MASK), targets))["unigram/bits_per_byte"]
    counts = {letter: bytes(task.text.tolist()).count(letter) for letter in b"ts"}
    expected = -sum(math.log2((seen + 1) / (len(task.text) + 256)) for seen in counts.values())
    assert (float(total), count) == (pytest.approx(expected), 2.0)


# Reconstruction


def test_pca_is_that_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    task = Autoencoder(bottleneck=5, hidden=8)
    train, test = (data.tensors[0].double().numpy() for data in (task.train, task.validation))
    pca = PCA(5, svd_solver="full").fit(train)
    expected = ((pca.inverse_transform(pca.transform(test)) - test) ** 2).mean()
    sums = [task.evaluate(part)["pca/loss"] for part in zip(task.validation.tensors[0].split(100), strict=True)]
    assert float(sum(s for s, _ in sums)) / sum(c for _, c in sums) == pytest.approx(expected, rel=1e-4)


# Metric learning


def test_others_are_of_the_same_digit_or_of_another_and_all_of_them_come() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    for anchor in range(9):
        anchors = torch.full((2000,), anchor)
        for same in (1, 0):
            drawn = draw_other(labels, anchors, torch.full_like(anchors, same)).unique().tolist()
            assert drawn == [i for i in range(9) if i != anchor and (labels[i] == labels[anchor]) == bool(same)]


def test_pairs_and_triplets_are_what_they_say() -> None:
    pairs = Contrastive(samples=400)
    digit = {image.numpy().tobytes(): int(label) for image, label in zip(pairs.images, pairs.labels, strict=True)}

    def digits(images: Tensor) -> Tensor:
        return torch.tensor([digit[image.numpy().tobytes()] for image in images])

    anchor, other, same = pairs.collect(0).tensors
    assert torch.equal((digits(anchor) == digits(other)).float(), same) and float(same.mean()) == 0.5
    anchor, positive, negative = Contrastive(loss="triplet", samples=400).collect(0).tensors
    assert torch.equal(digits(anchor), digits(positive)) and (digits(anchor) != digits(negative)).all()


def test_losses_of_pairs_and_triplets_by_hand() -> None:
    pairs = ComparePairs(nn.Identity(), margin=2.0)
    batch = (
        torch.zeros(4, 2),
        torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.5], [0.0, 0.0]]),
        torch.tensor([1, 0, 0, 0]),
    )
    guesses = pairs.guess(batch)
    assert float(pairs.loss(guesses, pairs.targets(batch))) == pytest.approx((25.0 + 0.0 + 1.5**2 + 2.0**2) / 8)  # type: ignore[arg-type]
    triplets = CompareTriplets(nn.Identity(), margin=1.0)
    three = (torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 3.5]]))
    loss = triplets.loss(triplets.guess(three), triplets.targets(three))  # type: ignore[arg-type, func-returns-value]
    assert float(loss) == pytest.approx((0.0 + 0.5) / 2, abs=1e-5)
    same_place = torch.zeros(3, 2, requires_grad=True)
    pairs.loss((same_place, torch.zeros(3, 2)), torch.zeros(3)).backward()
    assert same_place.grad is not None and same_place.grad.isfinite().all(), "where images are embedded alike too"


def test_the_nearest_neighbour_decides() -> None:
    points, labels = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([7, 8, 9])
    queries = torch.tensor([[0.4, 0.0], [0.6, 0.0], [0.0, 1.4], [9.0, 9.0]])
    assert nearest_label(queries, points, labels).tolist() == [7, 8, 7, 9]
    task = Contrastive()
    images, answers = task.images[:5].clone(), task.labels[:5].clone()
    answers[4] = 9  # these five show a zero: one answer is wrong
    sums = task.evaluate((images, answers))
    assert {name: float(right) / count for name, (right, count) in sums.items()} == {
        "neighbour_accuracy": 0.8,
        "pixels/neighbour_accuracy": 0.8,
    }


# Communication


def test_hamming_blocks_are_sixteen_and_three_apart() -> None:
    book = hamming_7_4()
    assert book.shape == (16, 7) and bool((book.abs() == 1).all())
    distances = (book[:, None] != book).sum(-1)
    assert sorted(set(distances.flatten().tolist())) == [0, 3, 4, 7]
    assert (distances == 3).sum(1).tolist() == [7] * 16 and (distances == 4).sum(1).tolist() == [7] * 16
    for place in range(7):
        flipped = book.clone()
        flipped[:, place] *= -1
        assert decode(book, flipped).tolist() == list(range(16)), "one wrong bit is corrected"
    received = book[torch.arange(200) % 16] + torch.randn(200, 7)
    assert torch.equal(decode(book, received), torch.cdist(received, book).argmin(1)), "the nearest is the most likely"


def test_uncoded_errors_are_those_of_theory() -> None:
    messages, noise = draw(4, 4, 100_000).tensors
    for db in (0.0, 4.0):
        wrong = float((through(uncoded(4), messages, noise, db) != messages).double().mean())
        bit = 0.5 * math.erfc(math.sqrt(10 ** (db / 10)))  # Q(sqrt(2 Eb/N0))
        block = 1.0 - (1.0 - bit) ** 4
        assert wrong == pytest.approx(block, abs=4.0 * math.sqrt(block * (1 - block) / 100_000))


def test_hamming_errors_are_just_below_the_union_bound() -> None:
    messages, noise = draw(4, 7, 200_000).tensors
    wrong = float((through(hamming_7_4(), messages, noise, 5.0) != messages).double().mean())
    energy = 2.0 * 4 / 7 * 10**0.5
    bound = sum(times * 0.5 * math.erfc(math.sqrt(d * energy / 2)) for times, d in ((7, 3), (7, 4), (1, 7)))
    assert 0.8 * bound < wrong < bound


def test_blocks_have_the_energy_of_their_length() -> None:
    for n, k in ((7, 4), (2, 2), (1, 3)):
        blocks = Modem(n, k, 8).transmit(torch.arange(2**k))
        assert blocks.shape == (2**k, n)
        assert blocks.square().sum(1).tolist() == pytest.approx([float(n)] * 2**k, rel=1e-5)


def test_the_channel_adds_noise_of_the_right_strength_and_passes_gradients() -> None:
    channel = AWGN(4 / 7)
    assert channel.deviation(0.0) ** 2 == pytest.approx(7 / 8)  # 1 / (2 R)
    assert channel.deviation(10.0) ** 2 == pytest.approx(0.7 / 8)
    sent = torch.ones(100_000, 2, requires_grad=True)
    received = channel(sent, torch.randn(100_000, 2), 3.0)
    expected = 7 / 8 / 10**0.3
    assert float((received - sent).detach().var()) == pytest.approx(expected, rel=0.02)
    received.sum().backward()
    assert sent.grad is not None and torch.equal(sent.grad, torch.ones_like(sent))
    model = Modem(7, 4, 16)
    messages, noise = draw(4, 7, 64).tensors
    nn.functional.cross_entropy(model(messages, noise, 5.0), messages).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0.0, name


def test_the_gap_is_by_how_much_a_curve_lies_right() -> None:
    def curve(shift: float, slope: float = -0.5) -> list[tuple[float, float]]:
        return [(db, 10 ** (slope * (db - shift) - 0.5)) for db in GRID]

    def bent(shift: float) -> list[tuple[float, float]]:
        return [(db, 0.5 * math.erfc(10 ** ((db - shift) / 20))) for db in GRID]

    assert gap_db(curve(0.3), curve(0.0)) == pytest.approx(0.3)
    assert gap_db(curve(-0.2), curve(0.0)) == pytest.approx(-0.2)
    assert gap_db(bent(0.3), bent(0.0)) == pytest.approx(0.3, abs=0.02)
    assert gap_db(curve(0.0, -0.4), curve(0.0, -0.5)) == pytest.approx(2.5 / 0.4 - 2.5 / 0.5), "the largest counts"
    assert gap_db([(db, 0.9) for db in GRID], curve(0.0)) == pytest.approx(GRID[-1] - 1.0), "as if at its right end"
    assert math.isnan(gap_db(curve(0.0), [(db, 0.9) for db in GRID])), "nothing to compare with"


def test_a_modem_is_compared_on_the_same_noise_and_keeps_its_curves() -> None:
    for n, k, names in ((7, 4, ["uncoded", "hamming"]), (2, 2, ["uncoded"]), (1, 2, ["uncoded"])):
        task = Communication(n, k, hidden=8, validation_blocks=3000)
        assert list(task.codes) == names
        with torch.no_grad():
            sums = task.evaluate(task.validation.tensors)
        assert len(sums) == len(GRID) * (1 + len(names)) and {count for _, count in sums.values()} == {3000.0}
        metrics = task.summarise({name: float(total) / count for name, (total, count) in sums.items()})
        assert list(metrics) == ["gap_db", "bler_4db", f"{task.reference}/bler_4db"]
        assert metrics["gap_db"] > 1.0, "nothing is learned yet"
        assert [db for db, _ in task.curves["learned"]] == GRID
        messages, noise = task.validation.tensors
        expected = (through(uncoded(k), messages, noise, 2.0) != messages).double().mean().item()
        assert dict(task.curves["uncoded"])[2.0] == pytest.approx(expected)


# All of them

SMALL: dict[str, dict[str, Any]] = {
    "masked_lm": {"context": 16, "width": 16, "layers": 1, "heads": 2},
    "autoencoder": {"hidden": 16},
    "contrastive": {"hidden": 16, "samples": 50},
    "modem": {"hidden": 16, "blocks": 50, "validation_blocks": 2000},
}


def figures(transport: Transport, folder: str, text: str) -> dict[str, tuple[list[float], dict[str, float]]]:
    """Return losses and metrics of a few steps of each configuration, over an epoch's end where there is one."""
    found = {}
    world = World(transport.rank, transport.size, transport.rank, transport.size, "test")
    for kind in KINDS:
        changes = {
            "task": SMALL[kind] | ({"path": text} if kind == "masked_lm" else {}),
            "data": {"global_batch_size": 20, "micro_batch_size": 4 if transport.size > 1 else None},
            "train": {"max_steps": 5},
            "evaluate": {"every_epochs": 1},
            "log": {
                "directory": folder,
                "name": f"{kind}-{transport.size}",
                "every": 1,
                "tensorboard": False,
                "picture": False,
            },
        }
        resolved = resolve(from_file(CONFIGS / f"{kind}.yaml"), from_mapping(changes))
        result = Builder(resolved).session(Place(world, transport, torch.device("cpu"))).run()
        rows = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
        found[kind] = [row["loss"] for row in rows if row["kind"] == "train"], result.last_metrics
    return found


def test_losses_and_metrics_are_the_same_on_any_number_of_ranks(text: str, tmp_path: Path) -> None:
    alone, three = (in_processes(ranks, figures, str(tmp_path), text) for ranks in (1, 3))
    for kind in KINDS:
        losses, metrics = alone[0][kind]
        assert len(losses) == 5
        for theirs, measured in (rank[kind] for rank in three):
            assert theirs == pytest.approx(losses, rel=1e-5), kind
            assert measured == pytest.approx(metrics, rel=5e-3), kind  # rounding may turn a single answer


def learned(task: Any, folder: Path, steps: int, kind: str, lr: float = 2e-3) -> dict[str, float]:
    return distloop.fit(
        task,
        config=CONFIGS / f"{kind}.yaml",
        train={"max_steps": steps, "epochs": None},
        schedule={"warmup_steps": 10},
        optimizer={"lr": lr},
        log={"directory": str(folder), "tensorboard": False, "picture": False},
    ).metrics


def test_each_of_them_learns(text: str, tmp_path: Path) -> None:
    found = learned(masked_lm(text, width=64), tmp_path, 150, "masked_lm", lr=1e-2)
    assert found["bits_per_byte"] < 0.5 * found["unigram/bits_per_byte"]
    found = learned(Autoencoder(), tmp_path, 400, "autoencoder")
    assert found["loss"] < 0.9 * found["pca/loss"]
    found = learned(Contrastive(hidden=32, samples=1280), tmp_path, 40, "contrastive")
    assert found["neighbour_accuracy"] > 0.85
    found = learned(Communication(validation_blocks=20_000, blocks=20_480), tmp_path, 200, "modem")
    assert found["gap_db"] < 2.0


@pytest.mark.parametrize(
    ("kind", "name", "lines"), [("autoencoder", "reconstructions", 0), ("modem", "block_errors", 3)]
)
def test_pictures_show_what_they_should(kind: str, name: str, lines: int, tmp_path: Path) -> None:
    task = make_task(kind, SMALL[kind], "a file")
    if kind == "modem":
        task.summarise({key: float(t) / c for key, (t, c) in task.evaluate(task.validation.tensors).items()})
    figure = drawn(task, name)
    assert len(figure.axes[0].lines) == lines
    assert [len(axes.images) for axes in figure.axes] == {"autoencoder": [1], "modem": [0]}[kind]


def test_an_embedding_of_any_dimension_is_drawn() -> None:
    for dimensions in (1, 2, 5):
        figure = drawn(Contrastive(dimensions=dimensions, hidden=4), "embedding")
        assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 360


def drawn(task: Any, name: str) -> Any:
    figure_module = pytest.importorskip("matplotlib.figure", reason="matplotlib is an extra")
    figure = figure_module.Figure()
    with torch.no_grad():
        task.pictures()[name](figure)
    figure.savefig(io.BytesIO())
    return figure


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("masked_lm", {"context": 0}, "task.context: 0 is too small; it must be at least 1"),
        ("masked_lm", {"width": 10, "heads": 3}, "task.heads: 3 does not divide task.width, which is 10"),
        ("masked_lm", {"mask_rate": 0.0}, "task.mask_rate: 0.0 is too small; it must be above 0"),
        ("masked_lm", {"mask_rate": 1.5}, "task.mask_rate: 1.5 is too large; it must be at most 1"),
        ("masked_lm", {"mask_rate": "much"}, "task.mask_rate: 'much' is no finite number"),
        ("masked_lm", {"dropout": 1.0}, "task.dropout: 1.0 must be at least 0 and below 1"),
        ("autoencoder", {"bottleneck": 64}, "task.bottleneck: 64 is no bottleneck; an image has 64 pixels"),
        ("autoencoder", {"bottleneck": 0}, "task.bottleneck: 0 is too small; it must be at least 1"),
        ("autoencoder", {"hidden": 2.5}, "task.hidden: 2.5 is no whole number"),
        ("contrastive", {"loss": "quartet"}, "task.loss: 'quartet' is neither contrastive nor triplet"),
        ("contrastive", {"margin": -1.0}, "task.margin: -1.0 is too small; it must be above 0"),
        ("contrastive", {"margin": math.nan}, "task.margin: nan is no finite number"),
        ("contrastive", {"samples": 0}, "task.samples: 0 is too small; it must be at least 1"),
        ("modem", {"k": 13}, "task.k: 13 is too large; it must be at most 12"),
        ("modem", {"validation_blocks": 999}, "task.validation_blocks: 999 is too few; it must be at least 1000"),
        ("modem", {"n": 0}, "task.n: 0 is too small; it must be at least 1"),
        ("modem", {"train_ebn0_db": math.inf}, "task.train_ebn0_db: inf is no finite number"),
        ("modem", {"blocks": True}, "task.blocks: True is no whole number"),
    ],
)
def test_a_wrong_option_gets_one_sentence(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(kind, options, "a file")
    assert str(caught.value) == message


def test_a_text_that_is_shorter_than_a_chunk_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"task\.context: 2000 is more than the 720 bytes kept for evaluation"):
        masked_lm(text, context=2000)
