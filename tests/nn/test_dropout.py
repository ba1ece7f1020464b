"""Dropout on the weights of a layer's attention, over plain, padded and packed batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade import FixedPattern, FullPattern, LocalPattern
from colonnade.nn import ResidualBlock, SelfAttention
from colonnade.ops.heads import Patterns

PATTERNS: dict[str, Patterns] = {
    "fixed": FixedPattern(4, 1),
    "bidirectional": FixedPattern(5, 2, subblocks=2, causal=False),
    "local": LocalPattern(3),
    "full": FullPattern(),
    "multi-head": FixedPattern(4, 1).factors(),
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())

PADDING = torch.arange(17) < torch.tensor([[17], [0], [6]])
BATCHES: dict[str, tuple[int, dict[str, Tensor]]] = {
    "plain": (3, {}),
    "padded": (3, {"padding_mask": PADDING}),
    "packed": (1, {"cu_seqlens": torch.tensor([0, 6, 6, 17])}),
}
each_batch = pytest.mark.parametrize(("rows", "where"), BATCHES.values(), ids=BATCHES.keys())


def _results(
    block: ResidualBlock, x: Tensor, where: dict[str, Tensor], **recompute: Any
) -> list[Tensor]:
    """Return output and all gradients of one step, always from the same seed."""
    torch.manual_seed(2)
    leaf = x.clone().requires_grad_()
    block.zero_grad()

    def run(t: Tensor) -> Tensor:
        y: Tensor = block(t, **where)
        return y

    y = checkpoint(run, leaf, **recompute) if recompute else run(leaf)
    assert isinstance(y, Tensor)
    (y * x).sum().backward()
    return [y.detach(), *(t.grad for t in (leaf, *block.parameters()) if t.grad is not None)]


@each_batch
@each_pattern
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.plain
def test_recomputation_drops_the_same_weights(
    reentrant: bool, pattern: Patterns, rows: int, where: dict[str, Tensor]
) -> None:
    """Beside dropout at the end of the branches, to the bit; with draws of its own it would not."""
    block = ResidualBlock(SelfAttention(8, 4, pattern, dropout=0.4), 8, 16, dropout=0.2).double()
    x = torch.randn(rows, 17, 8, dtype=torch.float64)
    plain = _results(block, x, where)
    assert len(plain) == 2 + len(list(block.parameters()))
    again = _results(block, x, where, use_reentrant=reentrant)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    block.dropout.p = 0.0
    plain = _results(block, x, where)
    again = _results(block, x, where, use_reentrant=reentrant, preserve_rng_state=False)
    assert torch.equal(plain[0], again[0])
    assert not torch.equal(plain[1], again[1])


@each_batch
@each_pattern
def test_dropping_every_weight_leaves_the_bias(
    pattern: Patterns, rows: int, where: dict[str, Tensor]
) -> None:
    layer = SelfAttention(8, 4, pattern, dropout=1.0).double()
    x = torch.randn(rows, 17, 8, dtype=torch.float64)
    tokens = where.get("padding_mask", torch.ones(rows, 17, dtype=torch.bool))
    expected = torch.where(tokens[..., None], layer.out_proj.bias, 0.0)
    assert torch.equal(layer(x, **where), expected)
    assert not torch.equal(layer.eval()(x, **where), expected)


@each_batch
@each_pattern
def test_evaluation_draws_nothing(pattern: Patterns, rows: int, where: dict[str, Tensor]) -> None:
    """And gives what the layer without dropout gives; training draws at every call."""
    layer = SelfAttention(8, 4, pattern, dropout=0.9).double()
    without = SelfAttention(8, 4, pattern).double()
    without.load_state_dict(layer.state_dict())
    x = torch.randn(rows, 17, 8, dtype=torch.float64)
    assert not torch.equal(layer(x, **where), layer(x, **where))
    state = torch.get_rng_state()
    assert torch.equal(layer.eval()(x, **where), without(x, **where))
    assert torch.equal(torch.get_rng_state(), state)


@each_batch
@each_pattern
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_layer_says_what_will_run(
    dropout: float,
    pattern: Patterns,
    rows: int,
    where: dict[str, Tensor],
    backends_that_ran: list[str],
) -> None:
    """It draws no number and computes nothing."""
    layer = SelfAttention(8, 4, pattern, dropout=dropout)
    x = torch.randn(rows, 17, 8)
    state = torch.get_rng_state()
    options: Any = where
    found = layer.explain(x, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert backends_that_ran == []
    layer(x, **where)
    each = found if isinstance(found, tuple) else (found,)
    assert isinstance(found, tuple) == isinstance(pattern, tuple)
    assert [explanation.backend for explanation in each] == backends_that_ran


def test_the_layer_says_what_runs_with_a_cache() -> None:
    layer = SelfAttention(8, 4, FixedPattern(4, 1), backend="eager").eval()
    x = torch.randn(2, 5, 8)
    found = layer.explain(x, layer.new_cache())
    assert not isinstance(found, tuple)
    assert found.backend == "eager"
    with pytest.raises(ValueError, match="not both"):
        layer.explain(x, cu_seqlens=torch.tensor([0, 5]), padding_mask=torch.ones(2, 5) > 0)
    with pytest.raises(NotImplementedError, match="takes no dropout with a cache"):
        SelfAttention(8, 4, FixedPattern(4, 1), dropout=0.1).explain(x, layer.new_cache())
