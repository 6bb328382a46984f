"""Self-supervised: bytes of a text are hidden, and guessed from those on both sides (BERT; Devlin et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distloop.errors import ConfigError, DataError
from distloop.objective import Objective
from distloop.tasks.checks import check_positive, check_sizes
from distloop.tasks.gpt import GPT, check_transformer
from distloop.tasks.text import divide

MASK = 256  # the token in place of a hidden byte
UNCHOSEN = -100  # a target that does not count
MASKED, RANDOM = 0.8, 0.1  # of the chosen positions; the rest keep their byte

Batch = tuple[Tensor, Tensor]


class MaskedText:
    """Text in chunks of equal length, with bytes chosen to be guessed: a sample is (tokens, targets) of one chunk.

    Documents are joined end to end and the rest at the end of the text is left out, so that there is no padding.

    Which positions are chosen, and what stands there instead, is arithmetic on (seed, sample, place). So a sample is
    the same whichever rank reads it, in whatever batch; no random state is involved.

    Args:
        text: bytes, of shape (n,).
        context: bytes per chunk.
        seed: any whole number of 63 bits.
        rate: part of the positions that are chosen, each by itself.
    """

    def __init__(self, text: Tensor, context: int, seed: int, rate: float):
        self.chunks = text[: len(text) // context * context].view(-1, context)
        self.seed, self.rate = seed, rate

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> Batch:
        tokens, targets = self.__getitems__([index])
        return tokens[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return tokens and targets, both of shape (samples, context)."""
        rows = torch.as_tensor(indices)
        hidden = self.chunks[rows].long()
        place = torch.arange(hidden.shape[1])
        bits = scramble(self.seed, rows[:, None] * len(place) + place)
        chosen = (bits & 0xFFFFFF) < self.rate * 2**24
        fate = (bits >> 24 & 0xFFFF) / 2**16
        masked, random = chosen & (fate < MASKED), chosen & (fate >= MASKED) & (fate < MASKED + RANDOM)
        tokens = torch.where(random, bits >> 40 & 0xFF, hidden).masked_fill(masked, MASK)
        return tokens, hidden.masked_fill(~chosen, UNCHOSEN)


def scramble(seed: int, counters: Tensor) -> Tensor:
    """Return 64 random-looking bits for each counter (SplitMix64; Steele, Lea and Flood 2014); int64, any shape."""

    def mixed(x: Tensor) -> Tensor:
        # int64 wraps around as uint64 does; only its shift to the right must be kept from repeating the sign.
        x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return x ^ (x >> 31 & 0x1FFFFFFFF)

    return mixed(mixed(torch.tensor(seed)) + counters * -0x61C8864680B583EB)


class GuessHidden:
    """Targets come from the inputs; the loss is the mean over chosen positions, which ``weight`` counts."""

    def __init__(self, model: GPT):
        self.model: nn.Module = model

    def guess(self, batch: Batch) -> Tensor:
        scores: Tensor = self.model(batch[0])
        return scores

    def targets(self, batch: Batch) -> Tensor:
        return batch[1]

    def loss(self, guesses: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(guesses.flatten(0, 1), targets.flatten(), ignore_index=UNCHOSEN)

    def weight(self, batch: Batch) -> float:
        return float((batch[1] != UNCHOSEN).sum())


class MaskedLM:
    """Guess hidden bytes with a small transformer that looks both ways.

    Args:
        path: a text file, or a directory whose text files are the documents (default: Python's standard library).
        context: bytes that are seen at once.
        width, layers, heads, dropout: of the transformer.
        mask_rate: part of the positions that are guessed; of these, 80 % show a mask, 10 % a random byte, 10 % theirs.
        max_bytes: how much text to take at most.
        validation_bytes: how much of it is kept for evaluation, where masks never change; a tenth of it at most.
    """

    def __init__(
        self,
        path: str | None = None,
        context: int = 64,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        mask_rate: float = 0.15,
        max_bytes: int = 8_000_000,
        validation_bytes: int = 200_000,
    ):
        check_transformer(context=context, width=width, layers=layers, heads=heads, dropout=dropout)
        check_sizes(max_bytes=max_bytes, validation_bytes=validation_bytes)
        check_positive(mask_rate=mask_rate)
        if mask_rate > 1.0:
            raise ConfigError(f"task.mask_rate: {mask_rate} is too large; it must be at most 1")
        train, validation = (_joined(documents) for documents in divide(path, max_bytes, validation_bytes))
        if len(validation) < context:
            raise DataError(f"task.context: {context} is more than the {len(validation)} bytes kept for evaluation")
        model = GPT(
            vocabulary=257,
            outputs=256,
            context=context,
            width=width,
            layers=layers,
            heads=heads,
            dropout=dropout,
            causal=False,
        )
        self.objectives: Mapping[str, Objective] = {"masked_language_model": GuessHidden(model)}
        self.text, self.context, self.mask_rate = train, context, mask_rate
        self.validation = MaskedText(validation, context, 0, mask_rate)
        self.unigram_bits = unigram_bits(train)

    def collect(self, epoch: int) -> MaskedText:
        """Return the text with an epoch's masks, whose seed is drawn: the runtime makes all ranks draw the same."""
        return MaskedText(self.text, self.context, int(torch.randint(2**62, ())), self.mask_rate)

    def evaluate(self, batch: Batch) -> dict[str, tuple[Tensor, float]]:
        """Return sums over chosen positions of the model's bits, and of those of a guess from frequencies alone."""
        objective, targets = self.objectives["masked_language_model"], batch[1]
        count, chosen = float((targets != UNCHOSEN).sum()), targets[targets != UNCHOSEN]
        scores = objective.guess(batch)[targets != UNCHOSEN]
        return {
            "bits_per_byte": (F.cross_entropy(scores, chosen, reduction="sum") / math.log(2.0), count),
            "unigram/bits_per_byte": (self.unigram_bits.to(chosen.device)[chosen].sum(), count),
        }


def unigram_bits(text: Tensor) -> Tensor:
    """Return -log2 of each byte's frequency in ``text``, of shape (256,); one is added to each count."""
    counts = torch.bincount(text.long(), minlength=256).double() + 1.0
    return -(counts / counts.sum()).log2()


def _joined(documents: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8)
