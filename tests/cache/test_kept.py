"""Entries that are kept, and the memory that they take."""

from __future__ import annotations

import pytest
import torch

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, StridedPattern
from colonnade.cache import GROWTH
from colonnade.ops.heads import Patterns
from tests.cache.common import MERGED, check_equal, decode, draw, joined, parts, whole


def test_it_keeps_the_open_block_and_the_summaries() -> None:
    cache, tensors = KVCache(FixedPattern(5, 2)), draw(33)
    for n, (q, k, v) in enumerate(parts(tensors, [1] * 33), start=1):
        cache.attend(q, k, v)
        assert cache.num_stored == n // 5 * 2 + n % 5


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        (FixedPattern(5, 2, part="local"), 3),
        (FixedPattern(5, 2, part="summary"), 6 * 2 + 3),
        (FixedPattern(5, 5), 33),
        (LocalPattern(7), 7),
        (StridedPattern(5), 33),
        (FullPattern(), 33),
        (FixedPattern(5, 2).factors(), 6 * 2 + 3),
    ],
)
@pytest.mark.parametrize("chunks", [[33], [1] * 33])
def test_what_other_patterns_keep(pattern: Patterns, kept: int, chunks: list[int]) -> None:
    cache = KVCache(pattern)
    decode(cache, draw(33), chunks)
    assert cache.num_stored == kept
    assert ("every entry is kept" in repr(cache)) is isinstance(
        pattern, StridedPattern | FullPattern
    )


@pytest.mark.parametrize(("max_seq_len", "times"), [(65_536, 15), (None, 10)])
@pytest.mark.parametrize("chunks", [[65_536], [30_001, 35_535], [1_000] * 65 + [536]])
def test_it_is_small(max_seq_len: int | None, times: int, chunks: list[int]) -> None:
    """Allocated bytes, against those of all keys and values."""
    cache = KVCache(FixedPattern(128, 8), max_seq_len)
    entries = torch.zeros(1, 1, 65_536, 8)
    for part in entries.split(chunks, 2):
        cache.append(part, part)
    assert cache.nbytes * times <= 2 * entries.nbytes


def test_buffers_grow_geometrically() -> None:
    """Over 1,500 tokens they move about log(1,500) / log(GROWTH) times."""
    cache, entry = KVCache(FullPattern()), torch.zeros(1, 1, 1, 1)
    lengths = set()
    for _ in range(1_500):
        cache.append(entry, entry)
        lengths.add(cache.nbytes)
    assert len(lengths) < 40
    assert cache.nbytes <= GROWTH * 1_500 * 2 * 4


def test_room_that_was_asked_for_is_allocated_once() -> None:
    cache, entry = KVCache(MERGED, max_seq_len=100), torch.zeros(1, 1, 1, 1)
    sizes = set()
    for _ in range(100):
        cache.append(entry, entry)
        sizes.add(cache.nbytes)
    assert sizes == {(24 + 4) * 2 * 4}


def test_what_is_kept_beyond_the_room_asked_for_grows_geometrically() -> None:
    """While nothing is let go, as when a decoder takes guesses."""
    cache, entry = KVCache(FixedPattern(128, 8), max_seq_len=2_000), torch.zeros(1, 1, 1, 1)
    cache.evicting = False
    sizes = set()
    for _ in range(2_000):
        cache.append(entry, entry)
        sizes.add(cache.nbytes)
    assert len(sizes) < 15
    assert cache.nbytes <= GROWTH * 2_000 * 2 * 4


def test_append_gives_what_the_queries_read() -> None:
    """Summaries of closed blocks, then everything from the first open block on."""
    cache, positions = KVCache(MERGED), torch.arange(30.0).view(1, 1, -1, 1)
    cache.append(positions[:, :, :10], positions[:, :, :10])
    keys, values = cache.append(positions[:, :, 10:15], positions[:, :, 10:15])
    assert keys.flatten().tolist() == [3, 7, 8, 9, 10, 11, 12, 13, 14]
    assert torch.equal(keys, values)
    keys, _ = cache.append(positions[:, :, 15:16], positions[:, :, 15:16])
    assert keys.flatten().tolist() == [3, 7, 11, 12, 13, 14, 15]
    keys, _ = cache.append(positions[:, :, 16:17], positions[:, :, 16:17])
    assert keys.flatten().tolist() == [3, 7, 11, 15, 16]


def test_what_was_not_evicted_can_go_later() -> None:
    cache, tensors = KVCache(MERGED), draw(20)
    cache.evicting = False
    decode(cache, tensors, [20])
    assert cache.num_stored == 20
    cache.evicting = True
    assert cache.num_stored == 5
    cache.evict()
    found = decode(cache, tensors, [1] * 20)
    check_equal(found, whole(MERGED, joined(tensors, tensors), first=20))
