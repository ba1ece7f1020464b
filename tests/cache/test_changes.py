"""A cache that is cropped, reordered, copied or reset goes on as if filled that way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, StridedPattern
from colonnade.ops.heads import Patterns
from tests.cache.common import (
    MERGED,
    check_equal,
    decode,
    draw,
    each_causal,
    joined,
    of_rows,
    parts,
    span,
    whole,
)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(2, 10), (2, 4), (3, 1)])
def test_a_window_goes_back_to_its_sinks(window: int, sinks: int, static: bool) -> None:
    """Where nothing is gone yet, to any length; then to one at which the sinks are everything."""
    pattern = LocalPattern(window, sinks=sinks)
    tensors, longest = draw(12), 9
    for length in range(1, longest + 1):
        for shorter in range(length if length <= window + sinks else min(sinks, length) + 1):
            cache = KVCache(pattern, 12, static=static)
            decode(cache, span(tensors, 0, length), [1] * length)
            cache.evict()
            cache.crop(shorter)
            found = decode(cache, span(tensors, shorter), [1, 1, 10 - shorter])
            check_equal(found, whole(pattern, tensors, first=shorter))
    cache = KVCache(pattern)
    decode(cache, tensors, [12])
    if sinks < 9:
        with pytest.raises(ValueError, match=r"at least 11, or 0, or at most sinks"):
            cache.crop(sinks + 1)


def _cropped(cache: KVCache, seq_len: int) -> int:
    """Return the length that came out: the same as before if the cache refused."""
    try:
        cache.crop(seq_len)
    except ValueError as error:
        if "what a shorter sequence reads is gone" not in str(error):
            raise
    return cache.seq_len


@each_causal
@pytest.mark.parametrize("evicting", [True, False])
@pytest.mark.plain  # Checks of types would take four fifths of the time.
def test_cropped_it_goes_on_as_if_nothing_had_been_there(evicting: bool, pattern: Patterns) -> None:
    """Or refuses, and stays as it was. Without evictions it never refuses."""
    longest = 11
    tensors, other = draw(longest), draw(longest + 3)
    sequences = [joined(span(tensors, 0, n), span(other, n, n + 3)) for n in range(longest + 1)]
    expected = [whole(pattern, sequence, first=n) for n, sequence in enumerate(sequences)]
    filled = KVCache(pattern)
    filled.evicting = evicting
    refused = 0
    for seq_len, token in enumerate(parts(tensors, [1] * longest), start=1):
        filled.attend(*token)
        for shorter in range(seq_len + 1):
            cache = copy.deepcopy(filled)
            at = _cropped(cache, shorter)
            refused += at != shorter
            assert at in (shorter, seq_len)
            check_equal(decode(cache, span(sequences[at], at), [1, 2]), expected[at])
    keeps_all = pattern in (FixedPattern(3, 3), FixedPattern(1, 1)) or isinstance(
        pattern, StridedPattern | FullPattern
    )
    assert (refused == 0) is (not evicting or keeps_all)


@each_causal
def test_rows_are_chosen_and_repeated(pattern: Patterns) -> None:
    before, after = draw(14, batch=3), draw(5, batch=3)
    changes: list[tuple[Callable[[KVCache], None], list[int]]] = [
        (lambda cache: cache.reorder(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.select(torch.tensor([1])), [1]),
        (lambda cache: cache.repeat(2), [0, 0, 1, 1, 2, 2]),
    ]
    for change, rows in changes:
        cache = KVCache(pattern)
        decode(cache, before, [9, 5])
        change(cache)
        new = of_rows(after, [row % 3 for row in range(len(rows))])
        sequence = joined(of_rows(before, rows), new)
        check_equal(decode(cache, new, [1, 1, 3]), whole(pattern, sequence, first=14))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_independent(copied: Callable[[KVCache], KVCache]) -> None:
    tensors = draw(12)
    cache = KVCache(MERGED)
    decode(cache, span(tensors, 0, 7), [7])
    other = copied(cache)
    rest = span(tensors, 7)
    found = decode(other, rest, [1] * 5)
    assert (cache.seq_len, other.seq_len) == (7, 12)
    assert torch.equal(found, decode(cache, rest, [1] * 5))


def test_after_a_reset_another_batch_may_come() -> None:
    cache = KVCache(MERGED)
    decode(cache, draw(9), [9])
    cache.reset()
    assert (cache.seq_len, cache.num_stored, cache.nbytes) == (0, 0, 0)
    tensors = draw(9, batch=2, kv_heads=1)
    check_equal(decode(cache, tensors, [4, 5]), whole(MERGED, tensors))
