"""End-to-end communication: transmitter and receiver learn a code for a noisy channel (O'Shea and Hoydis 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from distloop.errors import ConfigError
from distloop.objective import Objective
from distloop.tasks.checks import check_finite, check_sizes
from distloop.tasks.codes import Curve, decode, gap_db, hamming_7_4, uncoded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = [step / 2 for step in range(-4, 19)]  # Eb/N0 of the evaluation, -2 to 9 dB
REPORTED = 4.0  # dB; the block error rates there are metrics
TELLING = 10  # errors; a rate that is seen less often is not drawn
MOST_BITS = 12  # 4096 messages: the receiver scores each
LEAST_BLOCKS = 1000  # fewer do not show an error rate of 1e-3 at all
VALIDATION_SEED = 20170702

Batch = tuple[Tensor, Tensor]


class AWGN(nn.Module):
    """Additive white Gaussian noise: a layer without parameters, through which gradients pass as they are.

    Args:
        rate: information bits per channel use, R = k/n.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def deviation(self, ebn0_db: float) -> float:
        """Return sigma of the noise per channel use of unit energy: sigma^2 = N0/2 = 1 / (2 R Eb/N0)."""
        return float((2.0 * self.rate * 10.0 ** (ebn0_db / 10.0)) ** -0.5)

    def forward(self, blocks: Tensor, noise: Tensor, ebn0_db: float) -> Tensor:
        """Add ``noise``, drawn with unit variance and of the shape of ``blocks``, at the strength of ``ebn0_db``."""
        return blocks + self.deviation(ebn0_db) * noise


class Modem(nn.Module):
    """Transmitter, channel and receiver for 2^k messages in blocks of n real channel uses, of energy n each."""

    def __init__(self, n: int, k: int, hidden: int):
        super().__init__()
        # An embedding is a linear layer on one-hot messages.
        self.transmitter = nn.Sequential(nn.Embedding(2**k, hidden), nn.ReLU(), nn.Linear(hidden, n))
        self.channel = AWGN(k / n)
        self.receiver = nn.Sequential(nn.Linear(n, hidden), nn.ReLU(), nn.Linear(hidden, 2**k))
        self.n = n

    def transmit(self, messages: Tensor) -> Tensor:
        """Return a block for each message, of shape (samples, n); its squares add up to n."""
        blocks: Tensor = F.normalize(self.transmitter(messages), dim=1) * self.n**0.5
        return blocks

    def forward(self, messages: Tensor, noise: Tensor, ebn0_db: float) -> Tensor:
        """Return the receiver's scores of all messages, of shape (samples, 2^k)."""
        scores: Tensor = self.receiver(self.channel(self.transmit(messages), noise, ebn0_db))
        return scores


class Communicate:
    """Batches are (messages, unit noise); what is to be received is what was sent."""

    def __init__(self, model: Modem, ebn0_db: float):
        self.model: nn.Module = model
        self.ebn0_db = ebn0_db

    def guess(self, batch: Batch) -> Tensor:
        scores: Tensor = self.model(*batch, self.ebn0_db)
        return scores

    def targets(self, batch: Batch) -> Tensor:
        return batch[0]

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(guesses, targets)


class Communication:
    """Learn to communicate k bits over n uses of a noisy channel, and compare with a known code on the same noise.

    The known code is Hamming(7,4) with BPSK for n=7 and k=4, else BPSK without coding, k uses for k bits; both are
    decoded by maximum likelihood. ``gap_db`` is by how much more Eb/N0 the learned code needs for the same block error
    rate, at the rate from 1e-1 to 1e-3 where that is most.

    Args:
        n: real channel uses per block.
        k: bits per block.
        hidden: units of the hidden layers.
        train_ebn0_db: Eb/N0 of the training.
        blocks: messages in an epoch, drawn anew for each.
        validation_blocks: messages that are evaluated, each at every Eb/N0; 100,000 tell an error rate of 1e-3 to 10 %.
    """

    def __init__(
        self,
        n: int = 7,
        k: int = 4,
        hidden: int = 64,
        train_ebn0_db: float = 3.0,
        blocks: int = 102_400,
        validation_blocks: int = 200_000,
    ):
        check_sizes(n=n, k=k, hidden=hidden, blocks=blocks, validation_blocks=validation_blocks)
        check_finite(train_ebn0_db=train_ebn0_db)
        if k > MOST_BITS:
            raise ConfigError(f"task.k: {k} is too large; it must be at most {MOST_BITS}")
        if validation_blocks < LEAST_BLOCKS:
            raise ConfigError(
                f"task.validation_blocks: {validation_blocks} is too few; it must be at least {LEAST_BLOCKS}"
            )
        self.modem = Modem(n, k, hidden)
        self.objectives: Mapping[str, Objective] = {"modem": Communicate(self.modem, train_ebn0_db)}
        self.n, self.k, self.blocks = n, k, blocks
        coded = (n, k) == (7, 4)
        self.codes = {"uncoded": uncoded(k)} | ({"hamming": hamming_7_4()} if coded else {})
        self.reference = "hamming" if coded else "uncoded"
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        self.validation = draw(k, max(n, k), validation_blocks, generator)
        self.curves: dict[str, Curve] = {}  # block error rate over GRID, of the last evaluation

    def collect(self, epoch: int) -> TensorDataset:
        """Return an epoch's messages and noise, drawn at random: the runtime makes all ranks draw the same."""
        return draw(self.k, self.n, self.blocks)

    def evaluate(self, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """Return (errors, blocks) as ``code@dB`` of each code at each Eb/N0, all of them on the same noise."""
        messages, noise = batch
        sent, count = self.modem.transmit(messages), float(len(messages))
        errors = {}
        for db in GRID:
            received = self.modem.channel(sent, noise[:, : self.n], db)
            errors[f"learned@{db:g}"] = (self.modem.receiver(received).argmax(1) != messages).sum()
            for name, book in self.codes.items():
                guesses = through(book.to(noise.device), messages, noise, db)
                errors[f"{name}@{db:g}"] = (guesses != messages).sum()
        return {name: (total, count) for name, total in errors.items()}

    def summarise(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the gap and the block error rates at one Eb/N0; the whole curves are kept for the picture."""
        self.curves = {name: [(db, metrics[f"{name}@{db:g}"]) for db in GRID] for name in ("learned", *self.codes)}
        gap = gap_db(self.curves["learned"], self.curves[self.reference])
        at = f"{REPORTED:g}"
        return {
            "gap_db": gap,
            f"bler_{at}db": metrics[f"learned@{at}"],
            f"{self.reference}/bler_{at}db": metrics[f"{self.reference}@{at}"],
        }

    def pictures(self) -> Mapping[str, Callable[[Figure], None]]:
        return {"block_errors": self._draw}

    def _draw(self, figure: Figure) -> None:
        """Draw block error rates over Eb/N0, as the last evaluation found them, where there are enough errors."""
        k, n, least = self.k, self.n, TELLING / len(self.validation)
        labels = {
            "uncoded": f"BPSK({k},{k}), no coding",
            "hamming": "Hamming(7,4), BPSK, maximum likelihood",
            "learned": f"learned({n},{k})",
        }
        axes = figure.subplots()
        styles = (("C7--", 1.5), ("C0-", 4.0), ("C3o-", 1.5))  # the reference is wide, to be seen under the learned
        for (name, label), (style, wide) in zip(labels.items(), styles, strict=True):
            seen = [(db, rate) for db, rate in self.curves.get(name, []) if rate >= least]
            if seen:
                axes.semilogy(*zip(*seen, strict=True), style, linewidth=wide, markersize=4, label=label)
        axes.set_xlabel("Eb/N0 in dB")
        axes.set_ylabel("block error rate")
        axes.set_xlim(GRID[0], GRID[-1])
        axes.grid(which="both", alpha=0.3)
        axes.legend(loc="lower left")


def draw(k: int, n: int, blocks: int, generator: torch.Generator | None = None) -> TensorDataset:
    """Return random messages of shape (blocks,), from 0 to 2^k - 1, and unit noise of shape (blocks, n)."""
    messages = torch.randint(2**k, (blocks,), generator=generator)
    return TensorDataset(messages, torch.randn(blocks, n, generator=generator))


def through(book: Tensor, messages: Tensor, noise: Tensor, ebn0_db: float) -> Tensor:
    """Return what maximum-likelihood decoding makes of ``messages`` that are sent with the code ``book``."""
    bits, uses = (len(book) - 1).bit_length(), book.shape[1]
    return decode(book, AWGN(bits / uses)(book[messages], noise[:, :uses], ebn0_db))
