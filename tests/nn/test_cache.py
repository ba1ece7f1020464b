"""A layer that decodes through its cache gives what one call over everything gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, StridedPattern
from colonnade.nn import SelfAttention
from colonnade.ops.heads import Patterns

PATTERNS: list[Patterns] = [
    FixedPattern(5, 2, subblocks=2),
    *FixedPattern(5, 2).factors(),
    FixedPattern(5, 2).factors(),
    StridedPattern(4),
    StridedPattern(4).factors(),
    LocalPattern(6),
    FullPattern(),
]


def _layer(pattern: Patterns, **options: Any) -> SelfAttention:
    return SelfAttention(24, 4, pattern, num_kv_heads=2, qk_dim=16, **options).double()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("chunks", [[1] * 21, [8, 1, 1, 11], [21]])
def test_decoding_equals_one_call(pattern: Patterns, chunks: list[int]) -> None:
    layer = _layer(pattern)
    x = torch.randn(2, 21, 24, dtype=torch.float64)
    angle = torch.randn(1, 21, 2, dtype=torch.float64).repeat(1, 1, 2)
    rotary = angle.cos(), angle.sin()
    cache = layer.new_cache(max_seq_len=21)
    with torch.no_grad():
        parts = zip(x.split(chunks, 1), *(t.split(chunks, 1) for t in rotary), strict=True)
        found = torch.cat([layer(part, cache, rotary=(cos, sin)) for part, cos, sin in parts], 1)
        torch.testing.assert_close(found, layer(x, rotary=rotary), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_padded_rows_decode_as_they_would_alone(pattern: Patterns) -> None:
    """Left padding in the first call, none in later ones."""
    layer = _layer(pattern)
    x = torch.randn(3, 19, 24, dtype=torch.float64)
    padding_mask = torch.arange(19) >= torch.tensor([[0], [6], [11]])
    cache = layer.new_cache()
    chunks = [13, 1, 1, 1, 3]
    with torch.no_grad():
        parts = zip(x.split(chunks, 1), padding_mask.split(chunks, 1), strict=True)
        found = torch.cat([layer(part, cache, padding_mask=mask) for part, mask in parts], 1)
        want = layer(x, padding_mask=padding_mask)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@pytest.mark.plain
def test_what_does_not_go_with_a_cache() -> None:
    layer, x = _layer(FixedPattern(5, 2), dropout=0.5), torch.randn(1, 4, 24, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="no dropout"):
        layer(x, layer.new_cache())
    layer.eval()
    with pytest.raises(ValueError, match="of the layer's pattern"):
        layer(x, KVCache(FixedPattern(5, 1)))
    with pytest.raises(ValueError, match="cache or cu_seqlens, not both"):
        layer(x, layer.new_cache(), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="must be a KVCache"):
        layer(x, [])
