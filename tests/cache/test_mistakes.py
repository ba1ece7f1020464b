"""Mistakes raise, name the argument, and leave the cache as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from colonnade import FixedPattern, FullPattern, KVCache
from tests.cache.common import MERGED, check_equal, decode, draw, span, whole


def _bad(**changes: Any) -> dict[str, Any]:
    query, key, value = draw(2)
    return {"query": query, "key": key, "value": value, **changes}


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(query=draw(1)[0]), ValueError, "same new positions"),
        (_bad(key=draw(2, batch=2)[1]), ValueError, "must agree in batch"),
        (dict(zip(("query", "key", "value"), draw(2, batch=2), strict=True)), ValueError, "batch"),
        (dict(zip(("query", "key", "value"), draw(2, 1, 2), strict=True)), ValueError, "heads"),
        ({n: t.float() for n, t in _bad().items()}, TypeError, "must have the dtype of those"),
        (_bad(scale=float("nan")), ValueError, "scale must be finite"),
        (_bad(padding_mask=torch.ones(1, 2)), TypeError, "must be a bool tensor"),
        (_bad(padding_mask=torch.ones(1, 3, dtype=torch.bool)), ValueError, "new positions"),
        (dict(zip(("query", "key", "value"), draw(9), strict=True)), ValueError, "max_seq_len=9"),
    ],
)
def test_a_mistake_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors = draw(9)
    cache = KVCache(MERGED, max_seq_len=9)
    decode(cache, span(tensors, 0, 6), [6])
    with pytest.raises(error, match=message):
        cache.attend(**arguments)
    assert cache.seq_len == 6
    found = decode(cache, span(tensors, 6), [1, 2])
    check_equal(found, whole(MERGED, tensors, first=6))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: KVCache(FixedPattern(4, 1, causal=False)), NotImplementedError, "causal"),
        (lambda c: KVCache(FullPattern(causal=False)), NotImplementedError, "causal"),
        (lambda c: KVCache(cast(Any, "fixed")), TypeError, "must be a Pattern"),
        (lambda c: KVCache(()), ValueError, "needs a key head for each"),
        (lambda c: KVCache(MERGED, max_seq_len=0), ValueError, "max_seq_len must be at least 1"),
        (lambda c: KVCache(MERGED, max_seq_len=True), TypeError, "max_seq_len must be an int"),
        (lambda c: KVCache((MERGED,) * 4).append(*draw(1)[1:]), ValueError, "a key head for each"),
        (lambda c: c.crop(-1), ValueError, "seq_len must be at least 0"),
        (lambda c: c.crop(1.0), TypeError, "seq_len must be an int"),
        (lambda c: c.crop([1, 2]), ValueError, "a number for each of 1 rows"),
        (lambda c: c.reorder(torch.tensor([0, 0])), ValueError, "one entry for each of 1 rows"),
        (lambda c: c.select(torch.tensor([1])), ValueError, r"numbers in \[0, 1\)"),
        (lambda c: c.select([0]), TypeError, "must be a tensor of int32 or int64"),
        (lambda c: c.repeat(0), ValueError, "n must be at least 1"),
    ],
)
def test_mistakes_are_named(
    call: Callable[[KVCache], object], error: type[Exception], message: str
) -> None:
    cache = KVCache(MERGED)
    decode(cache, draw(6), [6])
    with pytest.raises(error, match=message):
        call(cache)
