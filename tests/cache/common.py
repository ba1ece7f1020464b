"""Patterns, sequences and the oracle's answer for the tests of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern
from colonnade.ops.heads import Patterns
from tests.cases import EXAMPLES, mask_of
from tests.oracle import dense_attention

CAUSAL: dict[str, Patterns] = {
    **{name: pattern for name, pattern in EXAMPLES.items() if pattern.causal},
    "every column": FixedPattern(3, 3),
    "stride 1": FixedPattern(1, 1),
    "sub-blocks, summary": FixedPattern(6, 2, subblocks=3, part="summary"),
    "window of 1": LocalPattern(1),
    "sinks that fill a block": FixedPattern(3, 1, sinks=2),
    "more sinks than window": LocalPattern(2, sinks=5),
    "multi-head": FixedPattern(4, 1).factors(),
    "three runs": (LocalPattern(3), FullPattern(), FixedPattern(4, 2, part="summary")),
}
each_causal = pytest.mark.parametrize("pattern", CAUSAL.values(), ids=CAUSAL.keys())
MERGED = FixedPattern(4, 1)
Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def draw(seq_len: int, batch: int = 1, kv_heads: int = 3, group: int = 2) -> Triple:
    """Return query, key and value in float64; values are narrower than keys."""
    sizes = (kv_heads * group, 6), (kv_heads, 6), (kv_heads, 4)
    query, key, value = (
        torch.randn(batch, heads, seq_len, width, dtype=torch.float64) for heads, width in sizes
    )
    return query, key, value


def each(change: Callable[[Tensor], Tensor], tensors: Triple) -> Triple:
    """Return query, key and value, each changed."""
    query, key, value = map(change, tensors)
    return query, key, value


def alone(tensors: Triple, row: int, tokens: Tensor) -> Triple:
    """Return the tokens of one row."""
    return each(lambda t: t[row, None, :, tokens], tensors)


def of_rows(tensors: Triple, rows: list[int]) -> Triple:
    """Return some batch rows, in the order given."""
    return each(lambda t: t[rows], tensors)


def span(tensors: Triple, begin: int, end: int | None = None) -> Triple:
    """Return the positions from `begin` to `end`."""
    return each(lambda t: t[:, :, begin:end], tensors)


def joined(first: Triple, second: Triple) -> Triple:
    """Return one sequence after the other."""
    query, key, value = (torch.cat(pair, 2) for pair in zip(first, second, strict=True))
    return query, key, value


def whole_pair(pattern: Patterns, tensors: Triple, first: int = 0) -> Pair:
    """Return the oracle's output and log-sum-exp from query `first` on.

    Head group by head group, split as PyTorch's own splitting does.
    """
    query, key, value = tensors
    scale = query.shape[3] ** -0.5
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    groups = (
        t.tensor_split(len(patterns), 1)
        for t in (query.unflatten(1, (key.shape[1], -1)), key, value)
    )
    pairs = []
    for of_group, q, k, v in zip(patterns, *groups, strict=True):
        mask = mask_of(of_group, key.shape[2], k.shape[1])[:, first:]
        pairs.append(dense_attention(q.flatten(1, 2)[:, :, first:], k, v, mask, scale))
    outs, lses = zip(*pairs, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def whole(pattern: Patterns, tensors: Triple, first: int = 0) -> Tensor:
    """Return the output alone."""
    return whole_pair(pattern, tensors, first)[0]


def parts(tensors: Triple, chunks: list[int]) -> Iterator[Triple]:
    """Yield a sequence chunk by chunk."""
    yield from zip(*(t.split(chunks, 2) for t in tensors), strict=True)


def decode(cache: KVCache, tensors: Triple, chunks: list[int]) -> Tensor:
    """Return the output of a sequence that a cache is given chunk by chunk."""
    return torch.cat([cache.attend(*chunk) for chunk in parts(tensors, chunks)], 2)


def decode_padded(cache: KVCache, tensors: Triple, tokens: Tensor, chunks: list[int]) -> Tensor:
    """Return the same where only some positions are tokens, True in `tokens` [batch, seq]."""
    masks = tokens.split(chunks, 1)
    outs = [
        cache.attend(*chunk, padding_mask=mask)
        for chunk, mask in zip(parts(tensors, chunks), masks, strict=True)
    ]
    return torch.cat(outs, 2)


def check_equal(found: Tensor, expected: Tensor) -> None:
    """Assert that two results in float64 are equal but for a few roundings of numbers near 1."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def read_by(pattern: Patterns, key: int) -> Tensor:
    """Return [kv_heads, positions], True where a head reads a position."""
    patterns = pattern if isinstance(pattern, tuple) else (pattern,)
    # Of three heads, the first group takes two if there are two.
    groups = [len(heads) for heads in torch.arange(3).tensor_split(len(patterns))]
    position = torch.arange(24)
    rows = [
        one.reads(position, torch.tensor(key), head)
        for one, count in zip(patterns, groups, strict=True)
        for head in range(count)
    ]
    return torch.stack(rows)
