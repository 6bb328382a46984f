"""A small GPT (Radford et al. 2019): pre-norm transformer with learned positions, which looks back, or both ways."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distloop.errors import ConfigError
from distloop.tasks.checks import check_range, check_sizes


class Block(nn.Module):
    """Self-attention, by default causal, and a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.forward_layer = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.query_key_value(self.norm_attention(x)).view(heads).permute(2, 0, 3, 1, 4)
        rate = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=self.causal)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + F.dropout(self.forward_layer(self.norm_forward(x)), self.dropout, self.training)


def check_transformer(*, context: int, width: int, layers: int, heads: int, dropout: float) -> None:
    """Raise a ConfigError unless a task's options make a transformer."""
    check_sizes(context=context, width=width, layers=layers, heads=heads)
    check_range(0.0, 1.0, dropout=dropout, below=True)
    if width % heads:
        raise ConfigError(f"task.heads: {heads} does not divide task.width, which is {width}")


class GPT(nn.Module):
    """Predict the next token; or, where it is not causal, a token from those on both sides (Devlin et al. 2019).

    Args:
        vocabulary: number of tokens that may be read.
        outputs: number of tokens that may be predicted.
        context: most tokens of a sequence.
        width, layers, heads: of the transformer; ``heads`` divides ``width``.
        causal: whether a position sees only itself and those before it.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        outputs: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        causal: bool = True,
    ):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout, causal) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # Layers that write to the residual stream start smaller, so that its variance does not grow with depth.
                residual = name.endswith(("project.weight", "forward_layer.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, length) to scores of shape (batch, length, outputs)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        scores: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(positions))))
        return scores
