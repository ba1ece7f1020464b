"""Decoding through a cache equals attention over the whole sequence, and keeps what it says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import colonnade
from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, Pattern, StridedPattern
from colonnade.cache import GROWTH
from colonnade.backends import native
from colonnade.ops.attention import attention_reduced
from colonnade.ops.heads import Patterns, runs_of_heads
from tests.cases import EXAMPLES, mask_of
from tests.oracle import fixed_set, loop_attention

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


def _draw(seq_len: int, batch: int = 1, kv_heads: int = 3, group: int = 2) -> Triple:
    """Query, key and value in float64; values are narrower than keys."""
    sizes = (kv_heads * group, 6), (kv_heads, 6), (kv_heads, 4)
    query, key, value = (
        torch.randn(batch, heads, seq_len, width, dtype=torch.float64) for heads, width in sizes
    )
    return query, key, value


def _whole(pattern: Patterns, query: Tensor, key: Tensor, value: Tensor, first: int = 0) -> Tensor:
    """The oracle over the whole sequence, from query `first` on, run of heads by run of heads."""
    group, scale = query.shape[1] // key.shape[1], query.shape[3] ** -0.5
    outs = []
    for each, begin, stop in runs_of_heads(pattern, key.shape[1]):
        mask = mask_of(each, key.shape[2], stop - begin)
        q, k, v = query[:, begin * group : stop * group], key[:, begin:stop], value[:, begin:stop]
        outs.append(loop_attention(q[:, :, first:], k, v, mask[:, first:], scale)[0])
    return torch.cat(outs, 1)


def _parts(tensors: Triple, chunks: list[int]) -> Iterator[list[Tensor]]:
    yield from map(list, zip(*(t.split(chunks, 2) for t in tensors), strict=True))


def _decode(cache: KVCache, tensors: Triple, chunks: list[int]) -> Tensor:
    return torch.cat([cache.attend(q, k, v) for q, k, v in _parts(tensors, chunks)], 2)


@st.composite
def _fixed(draw: st.DrawFn) -> FixedPattern:
    stride = draw(st.integers(1, 7))
    summary = draw(st.integers(1, stride))
    subblocks = draw(st.integers(1, stride // summary))
    return FixedPattern(
        stride, summary, subblocks, draw(st.sampled_from(["merged", "local", "summary"]))
    )


@given(
    pattern=st.one_of(_fixed(), st.sampled_from(list(CAUSAL.values()))),
    chunks=st.lists(st.one_of(st.just(1), st.integers(0, 9)), min_size=1, max_size=8),
    group=st.integers(1, 2),
    fixed_room=st.booleans(),
)
def test_decoding_equals_the_whole(
    pattern: Patterns, chunks: list[int], group: int, fixed_room: bool
) -> None:
    """Whatever the pieces are that the sequence comes in."""
    total = sum(chunks)
    tensors = _draw(total, group=group)
    cache = KVCache(pattern, max_seq_len=max(total, 1) if fixed_room else None)
    torch.testing.assert_close(
        _decode(cache, tensors, chunks), _whole(pattern, *tensors), rtol=0, atol=1e-12
    )
    assert cache.seq_len == total


@each_causal
def test_token_by_token(pattern: Patterns) -> None:
    tensors = _draw(23, batch=2)
    found = _decode(KVCache(pattern), tensors, [1] * 23)
    torch.testing.assert_close(found, _whole(pattern, *tensors), rtol=0, atol=1e-12)


@each_causal
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("chunks", [[1] * 24, [9, 1, 1, 5, 1, 1, 1, 5], [24]])
def test_rows_of_different_lengths(pattern: Patterns, share: float, chunks: list[int]) -> None:
    """Padding may lie anywhere; each row is what its tokens alone would be, and 0 elsewhere."""
    tensors = _draw(24, batch=3)
    is_token = torch.rand(3, 24) < share
    is_token[0, :7] = False
    cache = KVCache(pattern)
    found = torch.cat(
        [
            cache.attend(q, k, v, padding_mask=mask)
            for (q, k, v), mask in zip(
                _parts(tensors, chunks), is_token.split(chunks, 1), strict=True
            )
        ],
        2,
    )
    assert cache.seq_lens == is_token.sum(1).tolist()
    for row, mask in enumerate(is_token):
        alone = [t[row, None, :, mask] for t in tensors]
        torch.testing.assert_close(
            found[row, None, :, mask], _whole(pattern, *alone), rtol=0, atol=1e-12
        )
        assert not found[row, :, ~mask].any()


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("part", ["merged", "summary"])
@pytest.mark.parametrize("q_len", [0, 1, 3, 8])
def test_every_backend_takes_reduced_blocks(backend: str, part: Any, q_len: int) -> None:
    if colonnade.backends()[backend] is not None:
        pytest.skip(f"{backend} is not usable here")
    dtype = torch.float32 if backend == "native" else torch.float64
    pattern = FixedPattern(5, 2, subblocks=2, part=part)
    query, key, value = (t.to(dtype) for t in _draw(23))
    whole = loop_attention(query, key, value, mask_of(pattern, 23, 3), 6**-0.5)[0]
    for reduced in range((23 - q_len) // 5 + 1):
        kept = torch.tensor(
            [
                sorted(fixed_set(5 * reduced - 1, 23, 5, 2, head, 2, "summary"))
                + list(range(5 * reduced, 23))
                if reduced
                else list(range(23))
                for head in range(3)
            ]
        )
        k, v = (torch.stack([t[:, h, kept[h]] for h in range(3)], 1) for t in (key, value))
        q = query[:, :, 23 - q_len :]
        found = attention_reduced(q, k, v, pattern, reduced, backend=backend)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(found, whole[:, :, 23 - q_len :], rtol=0, atol=tolerance)


def test_it_keeps_the_open_block_and_the_summaries() -> None:
    cache, tensors = KVCache(FixedPattern(5, 2)), _draw(33)
    for n, (q, k, v) in enumerate(_parts(tensors, [1] * 33), start=1):
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
    _decode(cache, _draw(33), chunks)
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
    """How often they move, over 5,000 tokens: about log(5,000) / log(GROWTH) times."""
    cache, entry = KVCache(FullPattern()), torch.zeros(1, 1, 1, 1)
    lengths = set()
    for _ in range(5_000):
        cache.append(entry, entry)
        lengths.add(cache.nbytes)
    assert len(lengths) < 50
    assert cache.nbytes <= GROWTH * 5_000 * 2 * 4


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


@each_causal
def test_append_and_read_are_attend(pattern: Patterns) -> None:
    tensors = _draw(21)
    cache = KVCache(pattern)
    outs = [
        cache.read(q, *cache.append(k, v)) for q, k, v in _parts(tensors, [6, 1, 1, 1, 1, 7, 4])
    ]
    torch.testing.assert_close(torch.cat(outs, 2), _whole(pattern, *tensors), rtol=0, atol=1e-12)


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
    tensors, other = _draw(23), _draw(23)
    refused = 0
    for seq_len in range(1, 17):
        filled = KVCache(pattern)
        filled.evicting = evicting
        _decode(filled, tuple(t[:, :, :seq_len] for t in tensors), [1] * seq_len)
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
            found = _decode(cache, tail, [1, 2])
            want = _whole(pattern, *joined, first=at)
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    keeps_all = pattern in (FixedPattern(3, 3), FixedPattern(1, 1)) or isinstance(
        pattern, StridedPattern | FullPattern
    )
    assert (refused == 0) is (not evicting or keeps_all)


def test_what_was_not_evicted_can_go_later() -> None:
    cache, tensors = KVCache(MERGED), _draw(20)
    cache.evicting = False
    _decode(cache, tensors, [20])
    assert cache.num_stored == 20
    cache.evicting = True
    assert cache.num_stored == 5
    cache.evict()
    found = _decode(cache, tensors, [1] * 20)
    want = _whole(MERGED, *(torch.cat([t, t], 2) for t in tensors))[:, :, 20:]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@each_causal
def test_rows_are_chosen_and_repeated(pattern: Patterns) -> None:
    before, after = _draw(14, batch=3), _draw(5, batch=3)
    for change, rows in (
        (lambda cache: cache.reorder(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.select(torch.tensor([1])), [1]),
        (lambda cache: cache.repeat(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = KVCache(pattern)
        _decode(cache, before, [9, 5])
        change(cache)
        new = tuple(t[torch.arange(len(rows)) % 3] for t in after)
        joined = [torch.cat([b[rows], n], 2) for b, n in zip(before, new, strict=True)]
        found = _decode(cache, new, [1, 1, 3])
        want = _whole(pattern, *joined)[:, :, 14:]
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_are_independent(copied: Callable[[KVCache], KVCache]) -> None:
    tensors = _draw(12)
    cache = KVCache(MERGED)
    _decode(cache, tuple(t[:, :, :7] for t in tensors), [7])
    other = copied(cache)
    rest = tuple(t[:, :, 7:] for t in tensors)
    found = _decode(other, rest, [1] * 5)
    assert (cache.seq_len, other.seq_len) == (7, 12)
    assert torch.equal(found, _decode(cache, rest, [1] * 5))


def test_after_a_reset_another_batch_may_come() -> None:
    cache = KVCache(MERGED)
    _decode(cache, _draw(9), [9])
    cache.reset()
    assert (cache.seq_len, cache.num_stored, cache.nbytes) == (0, 0, 0)
    tensors = _draw(9, batch=2, kv_heads=1)
    torch.testing.assert_close(
        _decode(cache, tensors, [4, 5]), _whole(MERGED, *tensors), rtol=0, atol=1e-12
    )


@each_causal
def test_gradients_flow_through_the_cache(pattern: Patterns) -> None:
    leaves = tuple(t.requires_grad_() for t in _draw(15))
    grad = torch.randn(1, 6, 15, 4, dtype=torch.float64)
    found = torch.autograd.grad(_decode(KVCache(pattern), leaves, [6, 1, 1, 1, 1, 5]), leaves, grad)
    want = torch.autograd.grad(_whole(pattern, *leaves), leaves, grad)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_modes_may_change_on_the_way() -> None:
    """Filled in inference mode, changed there, and gone on with outside."""
    tensors = _draw(18)
    cache = KVCache(MERGED)
    with torch.inference_mode():
        _decode(cache, tuple(t[:, :, :7].clone() for t in tensors), [5, 1, 1])
        cache.reorder(torch.tensor([0]))
    found = _decode(cache, tuple(t[:, :, 7:] for t in tensors), [1] * 11)
    torch.testing.assert_close(found, _whole(MERGED, *tensors)[:, :, 7:], rtol=0, atol=1e-12)


@pytest.fixture(params=["native", "without native"])
def perhaps_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token as C++ computes it, where that runs, and as PyTorch does."""
    if request.param == "without native":
        monkeypatch.setattr(native, "decodes", lambda *_: False)


@pytest.mark.usefixtures("perhaps_native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    """Held to one rounding of each operand, of weights that add up to 1, and of the result."""
    tensors = tuple(t.to(dtype) for t in _draw(19))
    found = _decode(KVCache(MERGED), tensors, [6, *[1] * 8, 5])
    assert found.dtype == dtype
    want = _whole(MERGED, *(t.double() for t in tensors))
    largest = float(tensors[2].double().abs().max())
    tolerance = 8 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(found.double(), want, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("perhaps_native")
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_in_half_precision_for_rows_of_different_lengths(
    dtype: torch.dtype, kv_heads: int
) -> None:
    """With one query a key head, and with several: a product of one row goes another way."""
    pattern, lengths = FixedPattern(8, 2), (21, 9)
    tensors = [t.to(dtype) for t in _draw(22, batch=2, kv_heads=kv_heads, group=6 // kv_heads)]
    is_token = torch.stack([torch.arange(22) >= 21 - n for n in lengths])
    cache = KVCache(pattern)
    parts = zip(*(t.split([21, 1], 2) for t in tensors), strict=True)
    for (query, key, value), mask in zip(parts, is_token.split([21, 1], 1), strict=True):
        found = cache.attend(query, key, value, padding_mask=mask)
    for row, mask in enumerate(is_token):
        alone = [t[row, None, :, mask].double() for t in tensors]
        expected = _whole(pattern, *alone)[:, :, -1:]
        # The weights and the output are rounded once each.
        tolerance = 2 * torch.finfo(dtype).eps * alone[2].abs().max().item()
        torch.testing.assert_close(found[row, None].double(), expected, rtol=0, atol=tolerance)


def test_autocast_decides_the_type() -> None:
    tensors = tuple(t.float() for t in _draw(9))
    cache = KVCache(MERGED)
    with torch.autocast("cpu", torch.bfloat16):
        found = _decode(cache, tensors, [5, 1, 3])
    assert found.dtype == torch.bfloat16
    assert cache.nbytes == (2 + 4) * 3 * (6 + 4) * 2


def test_nan_stays_in_its_block_and_its_row() -> None:
    """In a column of a closed block that is no summary, with rows of different lengths."""
    query, key, value = _draw(20, batch=2)
    is_token = torch.ones(2, 20, dtype=torch.bool)
    is_token[1, :3] = False
    clean = _padded(query, key, value, is_token)
    key, value = key.clone(), value.clone()
    key[1, :, 4] = value[1, :, 4] = float("nan")  # position 1 of its row
    found = _padded(query, key, value, is_token)
    assert found[1, :, 4].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, :, 7:], clean[1, :, 7:])


def _padded(query: Tensor, key: Tensor, value: Tensor, is_token: Tensor) -> Tensor:
    cache = KVCache(MERGED)
    steps = zip(*(t.split(1, 2) for t in (query, key, value)), is_token.split(1, 1), strict=True)
    return torch.cat([cache.attend(q, k, v, padding_mask=mask) for q, k, v, mask in steps], 2)


def _bad(**changes: Any) -> dict[str, Any]:
    query, key, value = _draw(2)
    return {"query": query, "key": key, "value": value, **changes}


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (_bad(query=_draw(1)[0]), ValueError, "same new positions"),
        (_bad(key=_draw(2, batch=2)[1]), ValueError, "must agree in batch"),
        (dict(zip(("query", "key", "value"), _draw(2, batch=2), strict=True)), ValueError, "batch"),
        (dict(zip(("query", "key", "value"), _draw(2, 1, 2), strict=True)), ValueError, "heads"),
        ({n: t.float() for n, t in _bad().items()}, TypeError, "must have the dtype of those"),
        (_bad(scale=float("nan")), ValueError, "scale must be finite"),
        (_bad(padding_mask=torch.ones(1, 2)), TypeError, "must be a bool tensor"),
        (_bad(padding_mask=torch.ones(1, 3, dtype=torch.bool)), ValueError, "new positions"),
        (dict(zip(("query", "key", "value"), _draw(9), strict=True)), ValueError, "max_seq_len=9"),
    ],
)
def test_a_mistake_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    tensors = _draw(9)
    cache = KVCache(MERGED, max_seq_len=9)
    _decode(cache, tuple(t[:, :, :6] for t in tensors), [6])
    with pytest.raises(error, match=message):
        cache.attend(**arguments)
    assert cache.seq_len == 6
    found = _decode(cache, tuple(t[:, :, 6:] for t in tensors), [1, 2])
    torch.testing.assert_close(found, _whole(MERGED, *tensors)[:, :, 6:], rtol=0, atol=1e-12)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: KVCache(FixedPattern(4, 1, causal=False)), NotImplementedError, "causal"),
        (lambda c: KVCache(FullPattern(causal=False)), NotImplementedError, "causal"),
        (lambda c: KVCache("fixed"), TypeError, "must be a Pattern"),
        (lambda c: KVCache(()), ValueError, "needs a key head for each"),
        (lambda c: KVCache(MERGED, max_seq_len=0), ValueError, "max_seq_len must be at least 1"),
        (lambda c: KVCache(MERGED, max_seq_len=True), TypeError, "max_seq_len must be an int"),
        (lambda c: KVCache((MERGED,) * 4).append(*_draw(1)[1:]), ValueError, "a key head for each"),
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
    _decode(cache, _draw(6), [6])
    with pytest.raises(error, match=message):
        call(cache)


def test_a_summary_query_without_a_key_gives_zero() -> None:
    """Before the first summary column nothing is read."""
    pattern: Pattern = FixedPattern(4, 1, part="summary")
    found = _decode(KVCache(pattern), _draw(8), [1] * 8)
    assert not found[:, :, :3].any()
    assert found[:, :, 3:].abs().amax((0, 1, 3)).min() > 0
