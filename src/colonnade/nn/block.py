"""The paper's pre-normalised residual block, and its feed-forward network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from colonnade.shapes import Hidden


class FeedForward(nn.Module):
    """ff(x) = W_2 f(W_1 x + b_1) + b_2 with f(x) = x · sigmoid(1.702 x) (paper, section 5.2)."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(embed_dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: Hidden) -> Hidden:
        """Apply the network to each position by itself; [batch, seq_len, embed_dim]."""
        hidden = self.up_proj(x)
        out: Tensor = self.down_proj(hidden * torch.sigmoid(1.702 * hidden))
        return out


class ResidualBlock(nn.Module):
    """H + a(H) + b(H): a(H) = dropout(attention(norm(H))), b(H) = dropout(ff(norm(H + a(H)))).

    Args:
        attention: A module that maps [batch, seq_len, embed_dim] to the same shape, such as
            `SelfAttention` or a wrapper around it.
        embed_dim: Width of the residual stream.
        feed_forward_dim: Width inside the feed-forward network; the paper's is 4 · embed_dim, or
            2 · embed_dim for "half-size".
        dropout: Probability of dropping an entry at the end of either branch, in training.
        eps: Constant that both layer norms add to the variance.

    Source: Child et al. 2019, arXiv:1904.10509, section 5.2.
    """

    def __init__(
        self,
        attention: nn.Module,
        embed_dim: int,
        feed_forward_dim: int,
        dropout: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(embed_dim, eps=eps)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(embed_dim, eps=eps)
        self.feed_forward = FeedForward(embed_dim, feed_forward_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Hidden, **attention_arguments: Any) -> Hidden:
        """Apply the block to x, [batch, seq_len, embed_dim].

        Args:
            x: The residual stream H.
            **attention_arguments: Passed on to the attention, such as `cache` or `padding_mask`.
        """
        h = x + self.dropout(self.attention(self.attention_norm(x), **attention_arguments))
        out: Tensor = h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))
        return out
