"""The positions that stacks of residual blocks connect, against sets and closed forms.

Positions i and j are connected if the gradient of y_i with respect to x_j is not exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade import FixedPattern, LocalPattern, StridedPattern
from colonnade.nn import ResidualBlock, SelfAttention
from colonnade.ops.heads import Patterns
from tests.cases import fixed_patterns, set_of

# Hundreds of small stacks: checks of types would only repeat themselves.
pytestmark = pytest.mark.plain

HEAD_DIM = 4

lengths = st.integers(1, 20)
counts = st.integers(1, 3)


def _attention(block: ResidualBlock) -> SelfAttention:
    assert isinstance(block.attention, SelfAttention)
    return block.attention


def _connected(stack: Sequence[ResidualBlock], n: int) -> Tensor:
    """Return [n, n], True where i is connected to j, found in one backward.

    Copy i of a sequence gets the gradient of its position i alone.
    """
    width = _attention(stack[0]).num_heads * HEAD_DIM
    x = torch.randn(1, n, width, dtype=torch.float64).expand(n, -1, -1).clone().requires_grad_()
    h = x
    for block in stack:
        h = block(h)
    y = h[torch.arange(n), torch.arange(n)]
    (grad,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    return (grad != 0).any(-1)


def _blocks(*patterns: Patterns, kv_heads: int = 1, group: int = 1) -> list[ResidualBlock]:
    """Return residual blocks, norms and feed-forward networks included, with random weights."""
    heads = kv_heads * group
    width = HEAD_DIM * heads
    layers = (SelfAttention(width, heads, pattern, kv_heads) for pattern in patterns)
    return [ResidualBlock(layer, width, 3).double() for layer in layers]


def _only_head(stack: list[ResidualBlock], head: int) -> list[ResidualBlock]:
    """Return the blocks with every other head cut off behind the attention."""
    for block in stack:
        by_head = _attention(block).out_proj.weight.data.unflatten(1, (-1, HEAD_DIM))
        by_head[:, torch.arange(by_head.shape[1]) != head] = 0
    return stack


def _where(n: int, connected: Callable[[int, int], bool]) -> Tensor:
    """Return [n, n] from a statement about j <= i; nothing is connected to what comes after it."""
    return torch.tensor([[j <= i and connected(i, j) for j in range(n)] for i in range(n)])


def _through_sets(n: int, *layers: Callable[[int], set[int]]) -> Tensor:
    """Return [n, n] by following the sets that layers read, from the last layer to the first."""
    rows = []
    for i in range(n):
        reached = {i}
        for read in reversed(layers):
            reached = reached.union(*(read(m) for m in reached))  # With the residual path.
        rows.append([j in reached for j in range(n)])
    return torch.tensor(rows)


@settings(max_examples=15)
@given(n=lengths, pattern=fixed_patterns(6), kv_heads=counts, layers=counts)
def test_layers_connect_what_following_the_sets_connects(
    n: int, pattern: FixedPattern, kv_heads: int, layers: int
) -> None:
    """Any fixed pattern, causal or not, any part; the heads of a layer together."""
    stack = _blocks(*[pattern] * layers, kv_heads=kv_heads, group=2)

    def read(i: int) -> set[int]:
        return set().union(*(set_of(pattern, i, n, head) for head in range(kv_heads)))

    assert torch.equal(_connected(stack, n), _through_sets(n, *[read] * layers))


@settings(max_examples=15)
@given(n=lengths, pattern=fixed_patterns(6, causal=True), layers=st.integers(2, 3))
def test_a_head_relays_what_its_sub_block_does_not_precede(
    n: int, pattern: FixedPattern, layers: int
) -> None:
    """Merged, through one head: within a block everything, and of earlier blocks all columns up to
    the head's last summary. The last sub-block ends the block, so that head 0 connects everything;
    what lies behind the sub-block of another head is lost to later blocks, in any number of layers.
    """
    stride, c = pattern.stride, pattern.summary
    merged = FixedPattern(stride, c, pattern.subblocks)
    for head in range(pattern.subblocks):
        stack = _only_head(_blocks(*[merged] * layers, kv_heads=pattern.subblocks), head)
        end = stride - head * c
        expected = _where(n, lambda i, j: i // stride == j // stride or j % stride < end)  # noqa: B023
        assert torch.equal(_connected(stack, n), expected)
        if head == 0:
            assert expected.equal(_where(n, lambda i, j: True))


@pytest.mark.parametrize("n", [1, 4, 8, 13])
@pytest.mark.parametrize("pattern", [FixedPattern(4, 1, 3), FixedPattern(5, 5)], ids=str)
def test_two_merged_layers_with_all_their_heads_are_complete(pattern: FixedPattern, n: int) -> None:
    stack = _blocks(pattern, pattern, kv_heads=3)
    assert torch.equal(_connected(stack, n), _where(n, lambda i, j: True))


@settings(max_examples=12)
@given(n=lengths, pattern=fixed_patterns(6, causal=True))
def test_interleaved_is_complete_in_one_order_only(n: int, pattern: FixedPattern) -> None:
    """A1 then A2 connects everything, with the residual path. A2 then A1 connects what one merged
    layer reads, and a third layer, again A2, makes up for it.
    """
    stride, c = pattern.stride, pattern.summary
    own, summaries = FixedPattern(stride, c).factors()
    complete = _where(n, lambda i, j: True)
    merged = _where(n, lambda i, j: i // stride == j // stride or j % stride >= stride - c)
    assert torch.equal(_connected(_blocks(own, summaries), n), complete)
    assert torch.equal(_connected(_blocks(summaries, own), n), merged)
    assert torch.equal(_connected(_blocks(summaries, own, summaries), n), complete)


@settings(max_examples=12)
@given(n=lengths, pattern=fixed_patterns(6, causal=True), kv_heads=st.integers(2, 5))
def test_multi_head_layers_connect_as_merged_ones_do(
    n: int, pattern: FixedPattern, kv_heads: int
) -> None:
    """One layer: the own block, and as many sub-blocks as the second group has heads. Two are
    complete, for that group's head 0 ends the block.
    """
    stride, c = pattern.stride, pattern.summary
    factors = FixedPattern(stride, c, pattern.subblocks).factors()
    columns = c * min(pattern.subblocks, kv_heads // 2)
    one = _connected(_blocks(factors, kv_heads=kv_heads), n)
    assert torch.equal(
        one, _where(n, lambda i, j: i // stride == j // stride or j % stride >= stride - columns)
    )
    two = _connected(_blocks(factors, factors, kv_heads=kv_heads), n)
    assert torch.equal(two, _where(n, lambda i, j: True))


@settings(max_examples=12)
@given(n=lengths, stride=st.integers(1, 6))
def test_two_strided_layers_are_complete_in_every_scheme(n: int, stride: int) -> None:
    """In either order, unlike fixed ones; one merged layer, or two of one part, are not."""
    pattern, complete = StridedPattern(stride), _where(n, lambda i, j: True)
    window, column = pattern.factors()
    for stack in ((pattern, pattern), (window, column), (column, window)):
        assert torch.equal(_connected(_blocks(*stack), n), complete)
    both = _blocks(pattern.factors(), pattern.factors(), kv_heads=2)
    assert torch.equal(_connected(both, n), complete)

    def union(i: int, j: int) -> bool:
        return i - j <= stride or (i - j) % stride == 0

    assert torch.equal(_connected(_blocks(pattern), n), _where(n, union))
    assert torch.equal(
        _connected(_blocks(window, window), n), _where(n, lambda i, j: i - j <= 2 * stride)
    )
    assert torch.equal(
        _connected(_blocks(column, column), n), _where(n, lambda i, j: (i - j) % stride == 0)
    )


@settings(max_examples=10)
@given(n=lengths, window=st.integers(1, 6), layers=counts)
def test_a_window_reaches_further_by_its_width_with_every_layer(
    n: int, window: int, layers: int
) -> None:
    stack = _blocks(*[LocalPattern(window)] * layers)
    reach = layers * (window - 1)
    assert torch.equal(_connected(stack, n), _where(n, lambda i, j: i - j <= reach))
