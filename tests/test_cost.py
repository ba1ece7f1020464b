"""The cost of a pattern, against counting: pairs over sets, and a decoder step by step."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, Pattern, StridedPattern
from colonnade.cost import Cost, Sizes, comparison, cost, num_kept
from tests import oracle
from tests.cases import PARTS, set_of

SIZES = Sizes(heads=6, kv_heads=3, width=24, qk_width=12, layers=5, batch=2, dtype="bfloat16")
ONE = Sizes(heads=1, kv_heads=1, width=64, qk_width=64)


PATTERNS: list[Pattern] = [
    LocalPattern(3),
    FullPattern(),
    *(StridedPattern(4, part) for part in PARTS),
    *(
        FixedPattern(stride, summary, subblocks, part)
        for stride, summary, subblocks in [(1, 1, 1), (4, 1, 1), (4, 4, 1), (5, 2, 2), (6, 2, 3)]
        for part in PARTS
    ),
    LocalPattern(3, sinks=2),
    LocalPattern(2, sinks=6),
    *(
        FixedPattern(stride, summary, subblocks, part, sinks=2)
        for stride, summary, subblocks in [(4, 1, 2), (5, 2, 1), (3, 1, 1)]
        for part in PARTS
    ),
]
"""Every part of each pattern."""
each_small_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def most_kept(pattern: Pattern, length: int, head: int) -> int:
    """Return the most that a decoder keeps which drops a position as soon as nothing reads it."""
    horizon = length + 20  # Longer than two strides: it sees every position that is still read.
    reads = [set_of(pattern, i, horizon, head) for i in range(horizon)]
    most = 0
    for step in range(length):
        wanted = set().union(*reads[step:])
        most = max(most, len({j for j in wanted if j <= step}))
    return most


@each_small_pattern
def test_entries_are_those_of_a_decoder(pattern: Pattern) -> None:
    for head in range(3):
        for length in range(20):
            assert num_kept(pattern, length, head) == most_kept(pattern, length, head)


@each_small_pattern
def test_pairs_work_and_bytes_are_counted_head_by_head(pattern: Pattern) -> None:
    """One query head at a time, one pair at a time."""
    length = 17
    pairs, forward, backward, kept = 0, 0, 0, 0
    for head in range(SIZES.heads):
        for i in range(length):
            for _ in set_of(pattern, i, length, head // 2):
                pairs += 1
                forward += 2 * (2 + 4)  # q·k, p·v
                backward += 2 * (2 + 4 + 4 + 2 + 2)  # q·k, dp, dv, dq, dk
    for head in range(SIZES.kv_heads):
        kept += most_kept(pattern, length, head)
    got = cost(pattern, length, SIZES)
    assert got.pairs == pairs
    assert got.pairs_per_kv_head == tuple(
        sum(len(set_of(pattern, i, length, head)) for i in range(length))
        for head in range(SIZES.kv_heads)
    )
    assert got.share_of_full == pytest.approx(pairs / (6 * 17 * 18 / 2))
    assert (got.forward_flops, got.backward_flops) == (forward * 10, backward * 10)
    assert got.cache_entries == max(most_kept(pattern, length, head) for head in range(3))
    assert got.cache_bytes == kept * (2 + 4) * 2 * 10


@each_small_pattern
def test_entries_are_those_that_a_cache_reads(pattern: Pattern) -> None:
    """Token by token: as wide as the widest step, and no wider than what the cache keeps."""
    heads, width, num_stored = 3, 0, 0
    cache = KVCache(pattern)
    for length in range(1, 41):
        key, value = torch.zeros(2, 1, heads, 1, 1)
        keys, _ = cache.append(key, value)
        width, num_stored = max(width, keys.shape[2]), max(num_stored, cache.num_stored)
        kept = [num_kept(pattern, length, head) for head in range(heads)]
        assert num_stored <= width
        match pattern:
            case FixedPattern(part="merged" | "local") | FullPattern():
                assert kept == [width] * heads
            case LocalPattern(window=window, sinks=sinks):
                assert kept == [num_stored] * heads
                # What left the window is moved away together.
                assert min(length, 2 * window) <= width <= min(length, 2 * window + sinks)
            case _:  # The open block as a whole, or everything.
                assert max(kept) <= width


@given(stride=st.integers(1, 12), length=st.integers(1, 40), head=st.integers(0, 3), data=st.data())
def test_merged_entries_are_those_of_the_largest_row(
    stride: int, length: int, head: int, data: st.DataObject
) -> None:
    """All that a decoder keeps, its newest query reads: there is nothing idle in the cache."""
    summary = data.draw(st.integers(1, stride))
    largest = max(len(oracle.fixed_set(i, length, stride, summary)) for i in range(length))
    assert num_kept(FixedPattern(stride, summary), length, head) == largest


@pytest.mark.parametrize(
    ("pattern", "length", "pairs", "percent", "entries"),
    [
        (FixedPattern(128, 8), 4096, 772_096, 9.20, 128 + 8 * 31),
        (FixedPattern(128, 8), 16_384, 9_379_840, 6.99, 128 + 8 * 127),
        (FixedPattern(128, 8, subblocks=4), 16_384, 9_379_840, 6.99, 128 + 8 * 127),
        (FixedPattern(128, 8), 65_536, 138_182_656, 6.43, 128 + 8 * 511),
        (FixedPattern(128, 32), 12_288, 19_470_336, 25.79, 128 + 32 * 95),
        (StridedPattern(64), 4096, 389_152, 4.64, 4096),
        (LocalPattern(128), 4096, 516_160, 6.15, 128),
        (FullPattern(), 4096, 8_390_656, 100, 4096),
    ],
)
def test_known_numbers(
    pattern: Pattern, length: int, pairs: int, percent: float, entries: int
) -> None:
    """From the definition of the project, and the paper's run on enwik8."""
    got = cost(pattern, length, ONE)
    assert got.pairs == pairs
    assert 100 * got.share_of_full == pytest.approx(percent, abs=0.005)
    assert got.cache_entries == entries
    assert got.forward_flops == 2 * pairs * 128
    assert got.backward_flops == 2.5 * got.forward_flops
    assert got.cache_bytes == entries * 128 * 4


def test_a_short_last_block_holds_less_than_the_one_before() -> None:
    """The peak is then at the end of the last whole block, not at the last position."""
    pattern = FixedPattern(128, 8)
    assert [num_kept(pattern, n) for n in (1, 127, 128, 129, 247, 248, 249, 256, 257)] == [
        *(1, 127, 128, 128, 128, 128, 129, 136, 136)
    ]


def test_times_fewer() -> None:
    fixed, full = (cost(pattern, 16_384, ONE) for pattern in (FixedPattern(128, 8), FullPattern()))
    assert isinstance(fixed, Cost)
    assert fixed.times_fewer_than(full) == pytest.approx(14.31, abs=0.005)
    assert full.times_fewer_than(fixed) == pytest.approx(1 / 14.31, abs=0.0005)


def test_comparison() -> None:
    assert comparison(FixedPattern(128, 8), 256, 16_384) == {
        "fixed": FixedPattern(128, 8),
        "fixed_at_best_stride": FixedPattern(362, 8),
        "strided": StridedPattern(128),
        "local": LocalPattern(256),
        "full": FullPattern(),
    }


@pytest.mark.parametrize(
    ("pattern", "length", "stride"),
    [
        (FixedPattern(32, 4, subblocks=8), 64, 32),  # 16 would not hold the sub-blocks.
        (FixedPattern(128, 8), 3, 8),  # Shorter than the summary: every stride reads all.
    ],
)
def test_the_best_stride_is_one_that_the_pattern_can_have(
    pattern: FixedPattern, length: int, stride: int
) -> None:
    best = comparison(pattern, 1, length)["fixed_at_best_stride"]
    assert best == replace(pattern, stride=stride)
    assert best.num_pairs(length) <= pattern.num_pairs(length)


def test_any_length_is_instant() -> None:
    begin = time.perf_counter()
    n = 2**30
    got = cost(FixedPattern(2**15, 8), n, SIZES)
    assert got.pairs == 6 * (n * (2**15 + 1) // 2 + 8 * 2**15 * (2**15) * (2**15 - 1) // 2)
    assert time.perf_counter() - begin < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got heads=0."),
        ({"kv_heads": 4}, "heads=6 and kv_heads=4; heads=8 would be."),
        ({"kv_heads": 12}, "heads=6 and kv_heads=12; heads=12 would be."),
        ({"width": 25}, "width=25 and heads=6; width=30 would be."),
        ({"qk_width": 1}, "qk_width=1 and heads=6; qk_width=6 would be."),
        ({"layers": -1}, "layers=-1"),
        ({"batch": 0}, "batch=0"),
        ({"dtype": "int8"}, "one of float32, bfloat16, float16, float64, got dtype='int8'."),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SIZES, **changes)


@pytest.mark.parametrize(
    ("pattern", "length", "message"),
    [
        (FullPattern(), 0, "seq_len=0"),
        (FullPattern(causal=False), 8, "bidirectional"),
        (FixedPattern(4, 1, causal=False), 8, "bidirectional"),
        (FixedPattern(4, 1, part="summary"), 3, "must read something, got seq_len=3"),
    ],
)
def test_what_has_no_cost(pattern: Pattern, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost(pattern, length, ONE)


@pytest.mark.plain
def test_wrong_types() -> None:
    length: Any = 8.0
    with pytest.raises(TypeError, match="seq_len must be an int"):
        cost(FullPattern(), length, ONE)
    with pytest.raises(TypeError, match="heads must be an int, got heads=True"):
        replace(SIZES, heads=True)
    pattern: Any = "full"
    with pytest.raises(TypeError, match="one of this package's, got str"):
        num_kept(pattern, 8)
