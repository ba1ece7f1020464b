"""Patterns, sequences and the oracle's answer for the tests of the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern
from colonnade.ops.heads import Patterns, runs_of_heads
from tests.cases import EXAMPLES, mask_of
from tests.oracle import loop_attention

CAUSAL: dict[str, Patterns] = {
    **{name: pattern for name, pattern in EXAMPLES.items() if pattern.causal},
    "every column": FixedPattern(3, 3),
    "stride 1": FixedPattern(1, 1),
    "sub-blocks, summary": FixedPattern(6, 2, subblocks=3, part="summary"),
    "window of 1": LocalPattern(1),
    "multi-head": FixedPattern(4, 1).factors(),
    "three runs": (LocalPattern(3), FullPattern(), FixedPattern(4, 2, part="summary")),
}
each_causal = pytest.mark.parametrize("pattern", CAUSAL.values(), ids=CAUSAL.keys())
MERGED = FixedPattern(4, 1)
Triple = tuple[Tensor, Tensor, Tensor]


def draw(seq_len: int, batch: int = 1, kv_heads: int = 3, group: int = 2) -> Triple:
    """Query, key and value in float64; values are narrower than keys."""
    sizes = (kv_heads * group, 6), (kv_heads, 6), (kv_heads, 4)
    query, key, value = (
        torch.randn(batch, heads, seq_len, width, dtype=torch.float64) for heads, width in sizes
    )
    return query, key, value


def whole(pattern: Patterns, query: Tensor, key: Tensor, value: Tensor, first: int = 0) -> Tensor:
    """The oracle over the whole sequence, from query `first` on, run of heads by run of heads."""
    group, scale = query.shape[1] // key.shape[1], query.shape[3] ** -0.5
    outs = []
    for each, begin, stop in runs_of_heads(pattern, key.shape[1]):
        mask = mask_of(each, key.shape[2], stop - begin)
        q, k, v = query[:, begin * group : stop * group], key[:, begin:stop], value[:, begin:stop]
        outs.append(loop_attention(q[:, :, first:], k, v, mask[:, first:], scale)[0])
    return torch.cat(outs, 1)


def parts(tensors: Triple, chunks: list[int]) -> Iterator[list[Tensor]]:
    yield from map(list, zip(*(t.split(chunks, 2) for t in tensors), strict=True))


def decode(cache: KVCache, tensors: Triple, chunks: list[int]) -> Tensor:
    return torch.cat([cache.attend(q, k, v) for q, k, v in parts(tensors, chunks)], 2)
