"""The patterns against the definition: sets, counts, and what connects to what."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from colonnade import FixedPattern, FullPattern, Pattern
from colonnade.pattern import Part
from tests import oracle
from tests.cases import PARTS, Case, fixed_patterns


def _check_against_the_definition(pattern: FixedPattern, seq_len: int, heads: int) -> None:
    case = Case(pattern, kv_heads=heads, q_len=seq_len, kv_len=seq_len)
    expected = case.mask()
    mask = pattern.mask(seq_len, heads)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)
    for head in range(heads):
        assert pattern.num_pairs(seq_len, head) == int(expected[head].sum())


@given(pattern=fixed_patterns(), seq_len=st.integers(0, 30), heads=st.integers(1, 4))
def test_masks_and_counts(pattern: FixedPattern, seq_len: int, heads: int) -> None:
    _check_against_the_definition(pattern, seq_len, heads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_every_small_pattern(part: Part, causal: bool) -> None:
    """Each stride up to 4, with each summary, number of sub-blocks, and length up to 9."""
    for stride, summary, subblocks in product(range(1, 5), repeat=3):
        if subblocks * summary <= stride:
            pattern = FixedPattern(stride, summary, subblocks, part, causal)
            for seq_len in range(10):
                _check_against_the_definition(pattern, seq_len, subblocks)


@given(pattern=fixed_patterns(), seq_len=st.integers(1, 30), head=st.integers(0, 4))
def test_indices_are_the_sets(pattern: FixedPattern, seq_len: int, head: int) -> None:
    """A causal set is the same whatever comes later, so the length may be left out."""
    p = pattern
    for i in range(seq_len):
        expected = oracle.fixed_set(
            i, seq_len, p.stride, p.summary, head, p.subblocks, p.part, p.causal
        )
        assert p.indices(i, head, seq_len) == sorted(expected)
        if p.causal:
            assert p.indices(i, head) == sorted(expected)


@given(pattern=fixed_patterns(), seq_len=st.integers(1, 30), head=st.integers(0, 4))
def test_density_is_the_share_of_what_full_attention_reads(
    pattern: FixedPattern, seq_len: int, head: int
) -> None:
    every = FullPattern(pattern.causal).mask(seq_len).sum().item()
    assert pattern.density(seq_len, head) == pattern.mask(seq_len, head + 1)[head].sum() / every


@pytest.mark.parametrize("causal", [True, False])
def test_full_pattern(causal: bool) -> None:
    pattern = FullPattern(causal)
    for seq_len in range(6):
        assert pattern.num_pairs(seq_len) == pattern.mask(seq_len).sum()
    assert pattern.mask(4, 3).shape == (3, 4, 4)
    assert pattern.indices(2, seq_len=4) == ([0, 1, 2] if causal else [0, 1, 2, 3])
    assert pattern.density(5) == 1.0


def test_summaries_at_stride_128() -> None:
    """The paper's "120-128" is 120…127: exactly 8 columns, read by every later position."""
    pattern = FixedPattern(128, 8)
    first, second = list(range(120, 128)), list(range(248, 256))
    for i in (128, 129, 200, 255, 256, 300, 383, 384, 400):
        read = pattern.indices(i)
        assert read[:8] == first
        if i >= 256:
            assert read[8:16] == second
        assert all(j in first or j in second or j >= 256 or j // 128 == i // 128 for j in read)
    for i in range(256, 384):
        assert pattern.indices(i) == first + second + list(range(256, i + 1))


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_position_k_times_stride_opens_block_k(k: int) -> None:
    pattern = FixedPattern(128, 8)
    assert pattern.factors()[0].indices(128 * k) == [128 * k]
    assert len(pattern.indices(128 * k)) == 1 + 8 * k


@pytest.mark.parametrize(
    ("seq_len", "pairs", "density"),
    [(4_096, 772_096, 0.0920), (16_384, 9_379_840, 0.0699), (65_536, 138_182_656, 0.0643)],
)
def test_published_counts(seq_len: int, pairs: int, density: float) -> None:
    for subblock in range(16):
        assert FixedPattern(128, 8, subblocks=16).num_pairs(seq_len, subblock) == pairs
    assert round(FixedPattern(128, 8).density(seq_len), 4) == density


def test_published_enwik8_run() -> None:
    pattern = FixedPattern(stride=128, summary=32)
    assert pattern.num_pairs(12_288) / 12_288 == 1_584.5
    assert round(pattern.density(12_288), 3) == 0.258


@pytest.mark.parametrize(
    ("seq_len", "summary", "stride"),
    [
        (4_096, 1, 64),  # sqrt(4096)
        (4_096, 8, 181),  # sqrt(32768) = 181.02
        (1, 1, 1),
        (7, 1, 3),  # sqrt(7) = 2.65
        (5, 5, 5),
        (100, 99, 99),  # sqrt(9900) = 99.499
        (65_536, 8, 724),
    ],
)
def test_best_stride(seq_len: int, summary: int, stride: int) -> None:
    assert FixedPattern.best_stride(seq_len, summary) == stride


@given(seq_len=st.integers(1, 10**6), summary=st.integers(1, 10**6))
def test_best_stride_makes_a_pattern(seq_len: int, summary: int) -> None:
    if summary > seq_len:
        with pytest.raises(ValueError, match=rf"summary={summary} and seq_len={seq_len}"):
            FixedPattern.best_stride(seq_len, summary)
    else:
        stride = FixedPattern.best_stride(seq_len, summary)
        assert summary <= stride <= seq_len
        FixedPattern(stride, summary)


@pytest.mark.parametrize(
    ("seq_len", "summary"),
    [(4_096, 1), (4_096, 3), (4_096, 8), (5_003, 2), (5_003, 7), (10_000, 8)],
)
def test_best_stride_is_within_half_a_percent(seq_len: int, summary: int) -> None:
    """Against the count of every stride there is."""
    fewest = min(
        FixedPattern(stride, summary).num_pairs(seq_len) for stride in range(summary, seq_len + 1)
    )
    best = FixedPattern(FixedPattern.best_stride(seq_len, summary), summary)
    assert best.num_pairs(seq_len) <= 1.005 * fewest


def test_factors() -> None:
    pattern = FixedPattern(6, 2, subblocks=3)
    local, summary = pattern.factors()
    assert (local, summary) == (replace(pattern, part="local"), replace(pattern, part="summary"))
    assert torch.equal(local.mask(20, 3) | summary.mask(20, 3), pattern.mask(20, 3))
    for factor in (local, summary):
        with pytest.raises(ValueError, match=f"part='{factor.part}'"):
            factor.factors()


@pytest.mark.parametrize("pattern", [FixedPattern(6, 2, 3, "summary", False), FullPattern(False)])
def test_patterns_are_values(pattern: Pattern) -> None:
    """Frozen, equal by content, hashable, picklable: fit to be the key of a cache."""
    same = pickle.loads(pickle.dumps(pattern))
    assert same == pattern
    assert copy.deepcopy(pattern) == pattern
    assert len({pattern, same}) == 1
    assert pattern != replace(pattern, causal=True)  # type: ignore[type-var]
    with pytest.raises(FrozenInstanceError):
        pattern.causal = True
    assert repr(pattern).startswith(type(pattern).__name__)


def _reach(*layers: Tensor) -> Tensor:
    """Which positions reach which through layers in order, each with a residual path."""
    reach = torch.eye(len(layers[0]), dtype=torch.int64)
    for layer in layers:
        reach = ((layer.long() + torch.eye(len(layer), dtype=torch.int64)) @ reach).clamp(max=1)
    return reach.bool()


@pytest.mark.parametrize("seq_len", [8, 12, 14])
def test_two_merged_layers_connect_everything(seq_len: int) -> None:
    """Through head 0 alone; a head whose sub-block is not the last cannot relay all."""
    every = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    masks = FixedPattern(4, 1, subblocks=2).mask(seq_len, 2)
    assert torch.equal(_reach(masks[0], masks[0]), every)
    union = masks.any(0)
    assert torch.equal(_reach(union, union), every)
    after_subblock = _reach(masks[1], masks[1])
    assert not after_subblock[4, 3]
    assert after_subblock[4, 2]


@pytest.mark.parametrize("seq_len", [8, 12, 14])
def test_the_order_of_interleaved_layers_matters(seq_len: int) -> None:
    """A1 then A2 is complete, with the residual path; A2 then A1 is not."""
    every = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    local, summary = (factor.mask(seq_len)[0] for factor in FixedPattern(4, 1).factors())
    assert torch.equal(_reach(local, summary), every)
    assert not torch.equal(_reach(summary, local), every)
    assert not _reach(summary, local)[4, 0]
