"""A cache that is cropped, reordered, copied or reset goes on as if filled that way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from colonnade import FixedPattern, FullPattern, KVCache, StridedPattern
from colonnade.ops.heads import Patterns
from tests.cache.common import MERGED, decode, draw, each_causal, whole


def _cropped(cache: KVCache, seq_len: int) -> int:
    """The length that came out: that of before, where the cache refused."""
    try:
        cache.crop(seq_len)
    except ValueError as error:
        if "what a shorter sequence reads is gone" not in str(error):
            raise
    return cache.seq_len


@each_causal
@pytest.mark.parametrize("evicting", [True, False])
def test_cropped_it_goes_on_as_if_nothing_had_been_there(pattern: Patterns, evicting: bool) -> None:
    """Or refuses, and stays as it was. Without evictions it never refuses."""
    tensors, other = draw(23), draw(23)
    refused = 0
    for seq_len in range(1, 17):
        filled = KVCache(pattern)
        filled.evicting = evicting
        decode(filled, tuple(t[:, :, :seq_len] for t in tensors), [1] * seq_len)
        for shorter in range(seq_len + 1):
            cache = copy.deepcopy(filled)
            at, rest = _cropped(cache, shorter), other
            refused += at != shorter
            assert at in (shorter, seq_len)
            joined = tuple(
                torch.cat([t[:, :, :at], o[:, :, at : at + 3]], 2)
                for t, o in zip(tensors, rest, strict=True)
            )
            tail = tuple(t[:, :, at:] for t in joined)
            found = decode(cache, tail, [1, 2])
            want = whole(pattern, *joined, first=at)
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    keeps_all = pattern in (FixedPattern(3, 3), FixedPattern(1, 1)) or isinstance(
        pattern, StridedPattern | FullPattern
    )
    assert (refused == 0) is (not evicting or keeps_all)


@each_causal
def test_rows_are_chosen_and_repeated(pattern: Patterns) -> None:
    before, after = draw(14, batch=3), draw(5, batch=3)
    for change, rows in (
        (lambda cache: cache.reorder(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.select(torch.tensor([1])), [1]),
        (lambda cache: cache.repeat(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = KVCache(pattern)
        decode(cache, before, [9, 5])
        change(cache)
        new = tuple(t[torch.arange(len(rows)) % 3] for t in after)
        joined = [torch.cat([b[rows], n], 2) for b, n in zip(before, new, strict=True)]
        found = decode(cache, new, [1, 1, 3])
        want = whole(pattern, *joined)[:, :, 14:]
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_independent(copied: Callable[[KVCache], KVCache]) -> None:
    tensors = draw(12)
    cache = KVCache(MERGED)
    decode(cache, tuple(t[:, :, :7] for t in tensors), [7])
    other = copied(cache)
    rest = tuple(t[:, :, 7:] for t in tensors)
    found = decode(other, rest, [1] * 5)
    assert (cache.seq_len, other.seq_len) == (7, 12)
    assert torch.equal(found, decode(cache, rest, [1] * 5))


def test_after_a_reset_another_batch_may_come() -> None:
    cache = KVCache(MERGED)
    decode(cache, draw(9), [9])
    cache.reset()
    assert (cache.seq_len, cache.num_stored, cache.nbytes) == (0, 0, 0)
    tensors = draw(9, batch=2, kv_heads=1)
    torch.testing.assert_close(
        decode(cache, tensors, [4, 5]), whole(MERGED, *tensors), rtol=0, atol=1e-12
    )
