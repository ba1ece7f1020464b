"""The three ways to use a factorization: what each head reads, and what layers connect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, LocalPattern, StridedPattern
from colonnade.nn import SelfAttention
from colonnade.ops.heads import Patterns
from tests.cases import mask_of
from tests.oracle import fixed_mask

N = 13


def _head_reads(layer: SelfAttention) -> Tensor:
    """Return [heads, n, n], True where a head's output at i has a gradient with respect to x at j.

    Queries and keys are made constant and the output projection left out, so that nothing but the
    attention's weights connects. Copy i of a sequence gets the gradient of its position i alone.
    """
    for projection in (layer.query_proj, layer.key_proj):
        torch.nn.init.zeros_(projection.weight)
    torch.nn.init.eye_(layer.out_proj.weight)
    x = torch.randn(1, N, layer.num_heads * layer.v_head_dim, dtype=torch.float64)
    x = x.expand(N, -1, -1).clone().requires_grad_()
    by_head = layer(x).unflatten(-1, (layer.num_heads, -1))
    reads = []
    for head in range(layer.num_heads):
        own = by_head[torch.arange(N), torch.arange(N), head]
        (grad,) = torch.autograd.grad(own.sum(), x, retain_graph=True)
        reads.append(grad.abs().sum(-1) > 0)
    return torch.stack(reads)


def _layer(pattern: Patterns, heads: int = 4, kv_heads: int | None = None) -> SelfAttention:
    return SelfAttention(2 * heads, heads, pattern, kv_heads).double()


def test_merged_heads_read_the_union() -> None:
    pattern = FixedPattern(4, 1, subblocks=2)
    assert torch.equal(_head_reads(_layer(pattern)), mask_of(pattern, N, 4))


def test_multihead_splits_the_key_heads_and_counts_sub_blocks_again() -> None:
    """Five key heads, two queries each: three read the own block, two the summaries."""
    local, summary = FixedPattern(4, 1, subblocks=2).factors()
    found = _head_reads(_layer((local, summary), heads=10, kv_heads=5))
    expected = torch.cat([mask_of(local, N, 3), mask_of(summary, N, 2)])
    assert torch.equal(found, expected.repeat_interleave(2, 0))


def test_any_number_of_patterns_may_share_a_layer() -> None:
    patterns = (StridedPattern(3), LocalPattern(2), FullPattern())
    found = _head_reads(_layer(patterns, heads=3))
    assert torch.equal(found, torch.cat([mask_of(p, N) for p in patterns]))


@pytest.mark.plain
@pytest.mark.parametrize(("patterns", "kv_heads"), [(2, 1), (3, 2), (0, 2)])
def test_each_pattern_needs_a_key_head(patterns: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"len\(pattern\)={patterns} and num_kv_heads={kv_heads}"):
        SelfAttention(8, 4, (FixedPattern(4, 1),) * patterns, kv_heads)


def _connected(*layers: Patterns) -> Tensor:
    """Return [n, n], True where x_j moves y_i through residual layers, by the gradient."""
    torch.manual_seed(3)
    x = torch.randn(1, N, 8, dtype=torch.float64).expand(N, -1, -1).clone().requires_grad_()
    h = x
    for pattern in layers:
        h = h + _layer(pattern)(h)
    (grad,) = torch.autograd.grad(h[torch.arange(N), torch.arange(N)].sum(), x)
    return grad.abs().sum(-1) > 0


EVERYTHING = torch.ones(N, N, dtype=torch.bool).tril()
FIXED, STRIDED = FixedPattern(4, 1), StridedPattern(4)


@pytest.mark.parametrize("pattern", [FIXED, FixedPattern(5, 2), STRIDED], ids=str)
def test_two_merged_layers_connect_everything(pattern: FixedPattern | StridedPattern) -> None:
    assert torch.equal(_connected(pattern, pattern), EVERYTHING)
    assert not torch.equal(_connected(pattern), EVERYTHING)


def test_sub_blocks_connect_everything_through_the_head_that_ends_the_block() -> None:
    """A sub-block in front of the last cannot relay what comes after it in its block."""
    pattern = FixedPattern(4, 1, subblocks=2)
    assert torch.equal(_connected(pattern, pattern), EVERYTHING)
    front = fixed_mask(N, 2, stride=4, summary=1, subblocks=2)[1]
    twice = (front.double() @ front.double()) > 0
    assert not twice[8, 3]
    assert twice[8, 2]


@pytest.mark.parametrize("pattern", [FIXED, STRIDED], ids=str)
def test_interleaved_layers_connect_in_the_papers_order(
    pattern: FixedPattern | StridedPattern,
) -> None:
    """A1 then A2 with the residual path; for fixed patterns A2 then A1 is not complete."""
    local, summary = pattern.factors()
    assert torch.equal(_connected(local, summary), EVERYTHING)
    if isinstance(pattern, FixedPattern):
        backwards = _connected(summary, local)
        assert not torch.equal(backwards, EVERYTHING)
        assert not backwards[8, 0]  # In its own block nothing has read 0 before 8 reads the block.


def test_two_multihead_layers_connect_everything() -> None:
    assert torch.equal(_connected(FIXED.factors(), FIXED.factors()), EVERYTHING)
