"""A language model over the bytes of any text; by default the source of Python's standard library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distloop.tasks.base import Supervised
from distloop.tasks.checks import check_sizes
from distloop.tasks.gpt import GPT, check_transformer
from distloop.tasks.text import divide

START = 256  # the token before a chunk's first byte, so that every byte is predicted once
PADDING = -100  # a target that does not count


class Chunks:
    """Documents cut into chunks of at most ``context`` bytes: a sample is one, a batch is padded to its longest."""

    def __init__(self, documents: Sequence[bytes], context: int):
        self.context = context
        self._text = torch.frombuffer(bytearray(b"".join(documents) or b"\0"), dtype=torch.uint8)
        bounds, begin = [], 0
        for document in documents:
            end = begin + len(document)
            bounds += [(i, min(i + context, end)) for i in range(begin, end, context)]
            begin = end
        self._bounds = torch.tensor(bounds, dtype=torch.int64).view(-1, 2)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, targets = self.__getitems__([index])
        return tokens[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return tokens and targets, both of shape (samples, longest); targets are the tokens one place on."""
        begin, end = self._bounds[torch.as_tensor(indices)].unbind(1)
        length = end - begin
        place = torch.arange(int(length.max()))
        valid = place < length[:, None]
        targets = self._text[(begin[:, None] + place).clamp(max=len(self._text) - 1)].long()
        tokens = torch.cat([torch.full((len(targets), 1), START), targets[:, :-1]], dim=1)
        return tokens, targets.masked_fill(~valid, PADDING)


class ByteLM(Supervised):
    """Predict the next byte with a small GPT; the loss is the mean over bytes, however long the documents are.

    Args:
        path: a text file, or a directory whose text files are the documents (default: Python's standard library).
        context: most bytes the model looks back.
        width, layers, heads, dropout: of the transformer.
        max_bytes: how much text to take at most.
        validation_bytes: how much of it, in whole documents, is kept for evaluation; a tenth of it at most.
    """

    def __init__(
        self,
        path: str | None = None,
        context: int = 128,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        max_bytes: int = 8_000_000,
        validation_bytes: int = 100_000,
    ):
        check_transformer(context=context, width=width, layers=layers, heads=heads, dropout=dropout)
        check_sizes(max_bytes=max_bytes, validation_bytes=validation_bytes)
        train, validation = divide(path, max_bytes, validation_bytes)
        super().__init__(
            GPT(
                vocabulary=257,
                outputs=256,
                context=context,
                width=width,
                layers=layers,
                heads=heads,
                dropout=dropout,
            ),
            _loss,
            Chunks(train, context),
            Chunks(validation, context),
            weight=_count,
            name="language_model",
        )

    def evaluate(self, batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        total, count = super().evaluate(batch)["loss"]
        return {"bits_per_byte": (total / math.log(2.0), count)}


def _loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=PADDING)


def _count(batch: tuple[Tensor, Tensor]) -> float:
    return float((batch[1] != PADDING).sum())
