"""The residual block and its feed-forward network against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from colonnade import FixedPattern
from colonnade.nn import FeedForward, ResidualBlock, SelfAttention
from tests.rounding import check_half_the_digits


def _feed_forward(network: FeedForward, x: Tensor) -> Tensor:
    """Return W_2 f(W_1 x + b_1) + b_2, f(x) = x / (1 + e^(-1.702 x)), entry by entry."""
    hidden = x @ network.up_proj.weight.T + network.up_proj.bias
    active = [h / (1 + math.exp(-1.702 * h)) for h in hidden.flatten().tolist()]
    f = torch.tensor(active, dtype=torch.float64).reshape(hidden.shape)
    return f @ network.down_proj.weight.T + network.down_proj.bias


def _norm(norm: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * norm.weight + norm.bias


def _block(dropout: float = 0.0, eps: float = 1e-5) -> ResidualBlock:
    """Return a block whose norms are no identity, as after some training."""
    attention = SelfAttention(6, 2, FixedPattern(4, 1))
    block = ResidualBlock(attention, 6, 10, dropout=dropout, eps=eps).double()
    for norm in (block.attention_norm, block.feed_forward_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return block


def test_feed_forward() -> None:
    network = FeedForward(5, 12).double()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    check_half_the_digits(network(x), _feed_forward(network, x))
    assert network.up_proj.out_features == 12


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_block_is_h_plus_a_plus_b(eps: float) -> None:
    """H + a(H) + b(H), b reading norm(H + a(H)) (paper, section 5.2); nothing dropped in eval."""
    block = _block(dropout=0.9, eps=eps).eval()
    h = torch.randn(2, 9, 6, dtype=torch.float64)
    a = block.attention(_norm(block.attention_norm, h, eps))
    b = _feed_forward(block.feed_forward, _norm(block.feed_forward_norm, h + a, eps))
    check_half_the_digits(block(h), h + a + b)


def test_dropout_is_at_the_end_of_both_branches() -> None:
    """The same random numbers, applied by hand to a and then to b."""
    block = _block(dropout=0.5).train()
    h = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.manual_seed(3)
    found = block(h)
    torch.manual_seed(3)
    a = nn.functional.dropout(block.attention(block.attention_norm(h)), 0.5)
    b = nn.functional.dropout(block.feed_forward(block.feed_forward_norm(h + a)), 0.5)
    assert (a == 0).any()
    assert (b == 0).any()
    check_half_the_digits(found, h + a + b)


def test_dropping_everything_leaves_the_residual_path() -> None:
    block = _block(dropout=1.0).train()
    h = torch.randn(2, 9, 6, dtype=torch.float64)
    assert torch.equal(block(h), h)


class _Recorder(nn.Module):
    """Stands in for an attention, and keeps the arguments that it was given."""

    arguments: dict[str, object]

    def forward(self, x: Tensor, **arguments: object) -> Tensor:
        self.arguments = arguments
        return torch.zeros_like(x)


def test_keyword_arguments_go_to_the_attention() -> None:
    recorder = _Recorder()
    block = ResidualBlock(recorder, 6, 10)
    rotary = (torch.ones(1, 4, 6), torch.zeros(1, 4, 6))
    block(torch.randn(1, 4, 6), rotary=rotary, cache=None)
    assert recorder.arguments == {"rotary": rotary, "cache": None}
