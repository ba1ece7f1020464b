"""Decoding through a cache equals attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import colonnade
from colonnade import FixedPattern, KVCache, Pattern
from colonnade.backends.call import Kept
from colonnade.backends.choice import run
from colonnade.ops.check import make_call
from colonnade.ops.heads import Patterns
from colonnade.pattern import Part
from tests.cache.common import (
    CAUSAL,
    MERGED,
    alone,
    check_equal,
    decode,
    decode_padded,
    draw,
    each,
    each_causal,
    parts,
    span,
    whole,
)
from tests.cases import PARTS, fixed_patterns, mask_of, set_of
from tests.oracle import loop_attention


@given(
    pattern=fixed_patterns(7, causal=True) | st.sampled_from(list(CAUSAL.values())),
    chunks=st.lists(st.one_of(st.just(1), st.integers(0, 9)), min_size=1, max_size=8),
    group=st.integers(1, 2),
    fixed_room=st.booleans(),
)
def test_decoding_equals_the_whole(
    pattern: Patterns, chunks: list[int], group: int, fixed_room: bool
) -> None:
    """In whatever chunks the sequence comes."""
    total = sum(chunks)
    tensors = draw(total, group=group)
    cache = KVCache(pattern, max_seq_len=max(total, 1) if fixed_room else None)
    check_equal(decode(cache, tensors, chunks), whole(pattern, tensors))
    assert cache.seq_len == total


@each_causal
def test_token_by_token(pattern: Patterns) -> None:
    tensors = draw(23, batch=2)
    found = decode(KVCache(pattern), tensors, [1] * 23)
    check_equal(found, whole(pattern, tensors))


@each_causal
@pytest.mark.parametrize("chunks", [[1] * 24, [9, 1, 1, 5, 1, 1, 1, 5], [24]], ids=str)
@pytest.mark.plain
def test_rows_of_different_lengths(chunks: list[int], pattern: Patterns) -> None:
    """Padding may lie anywhere; each row is what its tokens alone would be, and 0 elsewhere."""
    tensors = draw(24, batch=4)
    tokens = torch.rand(4, 24) < torch.tensor([0.2, 0.5, 0.9, 0.5])[:, None]
    tokens[0, :7] = False
    cache = KVCache(pattern)
    found = decode_padded(cache, tensors, tokens, chunks)
    assert cache.seq_lens == tokens.sum(1).tolist()
    for row, mask in enumerate(tokens):
        check_equal(found[row, None, :, mask], whole(pattern, alone(tensors, row, mask)))
        assert not found[row, :, ~mask].any()


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("q_len", [0, 1, 3, 8])
def test_every_backend_takes_reduced_blocks(
    backend: str, part: Part, sinks: int, q_len: int
) -> None:
    if colonnade.backends()[backend] is not None:
        pytest.skip(f"{backend} is not usable here")
    dtype = torch.float32 if backend == "native" else torch.float64
    pattern = FixedPattern(5, 2, subblocks=2, part=part, sinks=sinks)
    query, key, value = (t.to(dtype) for t in draw(23))
    expected, _ = loop_attention(query, key, value, mask_of(pattern, 23, 3), 6**-0.5)
    for begin in range(0, 23 - q_len + 1, 5):
        kept = torch.tensor(
            [
                sorted(set_of(pattern, begin, 23, head) - {begin}) + list(range(begin, 23))
                for head in range(3)
            ]
        )
        k, v = (torch.stack([t[:, h, kept[h]] for h in range(3)], 1) for t in (key, value))
        q = query[:, :, 23 - q_len :]
        found, _ = run(q, k, v, make_call(q, pattern, keys=Kept(begin)), backend)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(found, expected[:, :, 23 - q_len :], rtol=0, atol=tolerance)


@each_causal
def test_append_and_read_are_attend(pattern: Patterns) -> None:
    tensors = draw(21)
    cache = KVCache(pattern)
    outs = [cache.read(q, *cache.append(k, v)) for q, k, v in parts(tensors, [6, 1, 1, 1, 1, 7, 4])]
    check_equal(torch.cat(outs, 2), whole(pattern, tensors))


@each_causal
def test_gradients_flow_through_the_cache(pattern: Patterns) -> None:
    leaves = each(Tensor.requires_grad_, draw(15))
    grad = torch.randn(1, 6, 15, 4, dtype=torch.float64)
    found = torch.autograd.grad(decode(KVCache(pattern), leaves, [6, 1, 1, 1, 1, 5]), leaves, grad)
    want = torch.autograd.grad(whole(pattern, leaves), leaves, grad)
    for one, other in zip(found, want, strict=True):
        check_equal(one, other)


def test_modes_may_change_on_the_way() -> None:
    """Filled in inference mode, changed there, and gone on with outside."""
    tensors = draw(18)
    cache = KVCache(MERGED)
    with torch.inference_mode():
        decode(cache, each(Tensor.clone, span(tensors, 0, 7)), [5, 1, 1])
        cache.reorder(torch.tensor([0]))
    found = decode(cache, span(tensors, 7), [1] * 11)
    check_equal(found, whole(MERGED, tensors, first=7))


def test_a_summary_query_without_a_key_gives_zero() -> None:
    """Before the first summary column nothing is read."""
    pattern: Pattern = FixedPattern(4, 1, part="summary")
    found = decode(KVCache(pattern), draw(8), [1] * 8)
    assert not found[:, :, :3].any()
    assert found[:, :, 3:].abs().amax((0, 1, 3)).min() > 0
