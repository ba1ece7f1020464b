"""A cache whose buffers never change their size: the same results, and what it cannot do raises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, StridedPattern
from colonnade.ops.heads import Patterns
from tests.cache.common import (
    CAUSAL,
    MERGED,
    Triple,
    alone,
    check_equal,
    decode,
    decode_padded,
    draw,
    each,
    each_causal,
    of_rows,
    parts,
    read_by,
    span,
    whole,
    whole_pair,
)
from tests.cases import fixed_patterns


@given(
    pattern=fixed_patterns(7, causal=True) | st.sampled_from(list(CAUSAL.values())),
    chunks=st.lists(st.one_of(st.just(1), st.integers(0, 9)), min_size=1, max_size=8),
    group=st.integers(1, 2),
    spare=st.integers(0, 9),
)
def test_decoding_equals_the_whole(
    pattern: Patterns, chunks: list[int], group: int, spare: int
) -> None:
    """In whatever chunks the sequence comes, and however many positions more there is room for."""
    total = sum(chunks)
    tensors = draw(total, group=group)
    cache = KVCache(pattern, max(total + spare, 1), static=True)
    check_equal(decode(cache, tensors, chunks), whole(pattern, tensors))
    assert cache.seq_len == total


@each_causal
def test_token_by_token_up_to_the_last_position(pattern: Patterns) -> None:
    """The log-sum-exp too; and a copy goes on by itself."""
    tensors = draw(23, batch=2)
    cache = KVCache(pattern, 23, static=True)
    found = decode(cache, span(tensors, 0, 17), [1] * 17)
    another = copy.deepcopy(cache)
    for one in (cache, another):
        rest = [one.attend(*part, return_lse=True) for part in parts(span(tensors, 17), [1] * 6)]
        outs, lses = zip(*rest, strict=True)
        out, lse = whole_pair(pattern, tensors)
        check_equal(torch.cat([found, *outs], 2), out)
        check_equal(torch.cat(lses, 2), lse[:, :, 17:])


@each_causal
@pytest.mark.parametrize("chunks", [[1] * 24, [9, 1, 1, 5, 1, 1, 1, 5], [24]], ids=str)
@pytest.mark.plain
def test_rows_of_different_lengths(chunks: list[int], pattern: Patterns) -> None:
    """Padding may lie anywhere, also where a row is full; 0 comes out there."""
    tensors = draw(24, batch=4)
    tokens = torch.rand(4, 24) < torch.tensor([0.2, 0.5, 0.9, 0.5])[:, None]
    tokens[0, :7] = False
    tokens[2] = torch.arange(24) < 21
    cache = KVCache(pattern, 21, static=True)
    found = decode_padded(cache, tensors, tokens, chunks)
    assert cache.seq_lens == tokens.sum(1).tolist()
    for row, mask in enumerate(tokens):
        check_equal(found[row, None, :, mask], whole(pattern, alone(tensors, row, mask)))
        assert not found[row, :, ~mask].any()


@each_causal
def test_append_and_read_are_attend(pattern: Patterns) -> None:
    """With all that append returned, and with its tensors alone."""
    tensors = draw(21)
    for unpack in (False, True):
        cache = KVCache(pattern, 21, static=True)
        outs = []
        for query, key, value in parts(tensors, [6, 1, 1, 1, 1, 7, 1, 3]):
            entries = cache.append(key, value)
            outs.append(cache.read(query, *entries) if unpack else cache.read(query, entries))
        check_equal(torch.cat(outs, 2), whole(pattern, tensors))


@each_causal
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.plain
def test_what_earlier_positions_left_behind_reaches_nobody(
    pattern: Patterns, dtype: torch.dtype
) -> None:
    """One position is NaN: those that do not read it stay as they are, whatever backend runs."""
    clean = each(lambda t: t.to(dtype), draw(24))
    for bad in (3, 5, 9):
        query, key, value = each(Tensor.clone, clean)
        key[:, :, bad] = value[:, :, bad] = torch.nan
        steps = [3, *[1] * 21]
        found = decode(KVCache(pattern, 24, static=True), (query, key, value), steps)
        expected = decode(KVCache(pattern, 24, static=True), clean, steps)
        touched = found.isnan().any(-1)
        assert torch.equal(touched, read_by(pattern, bad).repeat_interleave(2, 0)[None])
        torch.testing.assert_close(found[~touched], expected[~touched])


@pytest.mark.parametrize(
    ("pattern", "entries"),
    [
        (FixedPattern(5, 2), 6 * 2 + 5),
        (FixedPattern(5, 2, part="local"), 5),
        # One takes what is no summary.
        (FixedPattern(5, 2, part="summary"), 6 * 2 + 1),
        (LocalPattern(7), 7),
        (StridedPattern(5), 33),
        (FullPattern(), 33),
    ],
)
def test_it_is_no_larger_than_one_that_grows(pattern: Any, entries: int) -> None:
    tensors = draw(33)
    static, growing = KVCache(pattern, 33, static=True), KVCache(pattern, 33)
    for cache in (static, growing):
        decode(cache, tensors, [10, 1, 22])
    of_entry = 3 * (6 + 4) * 8
    assert static.nbytes == entries * of_entry
    # The last block is short, and the tail has room for a whole one.
    assert static.nbytes <= growing.nbytes + 2 * of_entry
    assert static.num_stored == growing.num_stored


@each_causal
def test_buffers_stay_where_they_are(pattern: Patterns) -> None:
    """Across chunks, steps, and every other change: a compiled step knows their addresses."""
    tensors = draw(20, batch=2)
    cache = KVCache(pattern, 20, static=True)
    decode(cache, span(tensors, 0, 3), [3])
    stores = cache._groups.stores
    before = [t.data_ptr() for store in stores for t in (*store.buffers, store.seq_len)]  # type: ignore[union-attr]
    decode(cache, span(tensors, 3, 12), [1, 7, 1])
    cache.reorder(torch.tensor([1, 0]))
    cache.crop(0)
    cache.reset()
    found = decode(cache, tensors, [2, *[1] * 18])
    check_equal(found, whole(pattern, tensors))
    after = [t.data_ptr() for store in stores for t in (*store.buffers, store.seq_len)]  # type: ignore[union-attr]
    assert after == before


@each_causal
def test_rows_are_reordered(pattern: Patterns) -> None:
    """Each goes on with the entries of the row that it was given."""
    tensors, order = draw(20, batch=3), [2, 0, 0]
    cache = KVCache(pattern, 20, static=True)
    decode(cache, span(tensors, 0, 9), [7, 1, 1])
    cache.reorder(torch.tensor(order))
    now = of_rows(tensors, order)
    found = decode(cache, span(now, 9), [1, 1, 4, 5])
    check_equal(found, whole(pattern, now, first=9))


@each_causal
@pytest.mark.plain
def test_it_is_cropped_to_what_is_still_there(pattern: Patterns) -> None:
    """As a cache that grows, once that has let go of everything that it can."""
    tensors, other = draw(30, batch=2), draw(30, batch=2)
    every = pattern if isinstance(pattern, tuple) else (pattern,)
    for length in (1, 4, 7, 13):
        for shorter in range(length + 1):
            growing, static = KVCache(pattern, 30), KVCache(pattern, 30, static=True)
            for cache in (growing, static):
                decode(
                    cache, span(tensors, 0, length), [length // 2, *[1] * (length - length // 2)]
                )
            growing.evict()
            # A window that has gone on has no room for what comes back into it.
            over = any(
                isinstance(p, LocalPattern) and shorter > p.sinks and length > p.window + p.sinks
                for p in every
            )
            try:
                growing.crop(shorter)
                if over and 0 < shorter < length:
                    raise ValueError
            except ValueError:
                with pytest.raises(ValueError, match=r"what a shorter sequence reads is gone"):
                    static.crop(shorter)
                continue
            static.crop(shorter)
            assert static.seq_len == shorter
            now = _after(tensors, other, shorter)
            found = decode(static, span(now, shorter), [1, 1, 3, 1, 24 - shorter])
            check_equal(found, whole(pattern, now, first=shorter))


def _after(before: Triple, then: Triple, length: int) -> Triple:
    """Return `length` positions of one sequence, and those of the other behind."""
    return each(
        lambda pair: torch.cat([pair[0][:, :, :length], pair[1][:, :, length:]], 2),
        tuple(zip(before, then, strict=True)),  # type: ignore[arg-type]
    )


def _taken(**changes: Any) -> KVCache:
    cache = KVCache(MERGED, 9, static=True)
    decode(cache, draw(6), [5, 1])
    return cache


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.repeat(2, 1, 1, 1), ValueError, "must have batch, heads and head width"),
        (Tensor.float, TypeError, "must have the dtype of those before"),
        (lambda t: t.repeat(1, 1, 5, 1), ValueError, "has room for max_seq_len positions"),
        (lambda t: t.requires_grad_(), NotImplementedError, "has no gradients"),
    ],
)
def test_a_mistake_changes_nothing(
    length: int, change: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    tensors = draw(9)
    cache = KVCache(MERGED, 9, static=True)
    decode(cache, span(tensors, 0, 6), [5, 1])
    with pytest.raises(error, match=message):
        cache.attend(*each(change, each(Tensor.clone, draw(length))))
    found = decode(cache, span(tensors, 6), [1, 2])
    check_equal(found, whole(MERGED, tensors, first=6))
    with pytest.raises(ValueError, match=r"max_seq_len=9, 9 of them taken, and 1 more"):
        cache.attend(*draw(1))
    check_equal(cache.lengths, torch.tensor([9]))


@pytest.mark.plain
def test_what_it_cannot_do_raises() -> None:
    with pytest.raises(ValueError, match="static=True needs max_seq_len"):
        KVCache(MERGED, static=True)
    with pytest.raises(TypeError, match="static must be a bool"):
        KVCache(MERGED, 9, static=1)  # type: ignore[arg-type]
    cache = _taken()
    with pytest.raises(ValueError, match="keeps its number of batch rows, 1, got index of 2 rows"):
        cache.repeat(2)
    cache.evicting = False
    for length in (1, 2):
        with pytest.raises(NotImplementedError, match="evicting=False"):
            cache.attend(*draw(length))
    cache.evicting = True
    assert cache.seq_len == 6
    named = KVCache(MERGED, 9, backend="native", static=True)
    with pytest.raises(NotImplementedError, match="backend 'native'"):
        named.attend(*draw(1))
    named.attend(*each(Tensor.float, draw(5)))
    assert named.explain(*each(Tensor.float, draw(1))).backend == "native"  # type: ignore[union-attr]


def test_it_says_which_backend_runs() -> None:
    cache = _taken()
    assert cache.explain(*draw(1)).backend == "eager"  # type: ignore[union-attr]
    assert cache.explain(*draw(3)).backend == "eager"  # type: ignore[union-attr]
    assert cache.seq_len == 6
    assert "seq_len=6: 3 entries kept" in repr(cache)


def test_modes_may_change_on_the_way() -> None:
    """Filled in inference mode, and gone on with outside."""
    tensors = draw(18)
    cache = KVCache(MERGED, 18, static=True)
    with torch.inference_mode():
        decode(cache, each(Tensor.clone, span(tensors, 0, 7)), [5, 1, 1])
    check_equal(decode(cache, span(tensors, 7), [1] * 11), whole(MERGED, tensors, first=7))


@pytest.mark.plain
@pytest.mark.parametrize("pattern", [LocalPattern(3), (LocalPattern(3), FixedPattern(4, 1))])
def test_a_window_that_has_gone_on_is_not_cropped(pattern: Any) -> None:
    """What came before is written over. It would be read by a second crop, in silence."""
    tensors = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    cache = KVCache(pattern, 12, static=True)
    cache.attend(*tensors)
    with pytest.raises(ValueError, match="must be at least 7, or 0"):
        cache.crop(6)
    assert cache.seq_len == 7
    cache.crop(0)
    assert cache.seq_len == 0


@pytest.mark.parametrize("sizes", [(4, 4, 3), (8, 8, 5), (8, 8, 3), (9, 8, 6), (6, 6, 5)])
def test_a_crop_into_any_block_where_every_column_is_a_summary(sizes: tuple[int, int, int]) -> None:
    """The last block, too, which nobody reads from outside."""
    room, length, shorter = sizes
    query, key, value = torch.randn(3, 1, 2, room, 4, dtype=torch.float64)
    cache, growing = KVCache(FixedPattern(4, 4), room, static=True), KVCache(FixedPattern(4, 4))
    for either in (cache, growing):
        either.attend(query[:, :, :length], key[:, :, :length], value[:, :, :length])
        either.crop(shorter)
    for position in range(shorter, room):
        step = [t[:, :, position : position + 1] for t in (query, key, value)]
        torch.testing.assert_close(cache.attend(*step), growing.attend(*step))


def test_it_is_pickled() -> None:
    query, key, value = torch.randn(3, 1, 2, 9, 4)
    cache = KVCache(FixedPattern(4, 1), 12, static=True)
    cache.attend(query[:, :, :7], key[:, :, :7], value[:, :, :7])
    other = pickle.loads(pickle.dumps(cache))
    last = query[:, :, 7:8], key[:, :, 7:8], value[:, :, 7:8]
    assert torch.equal(cache.attend(*last), other.attend(*last))
