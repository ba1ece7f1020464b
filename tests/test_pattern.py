"""The patterns against the definition: sets, counts, and what connects to what."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade import FixedPattern, FullPattern, LocalPattern, Pattern, StridedPattern
from colonnade.pattern import Part
from tests.cases import PARTS, each_pattern, mask_of, patterns, set_of


def _check_against_the_definition(pattern: Pattern, seq_len: int, heads: int) -> None:
    expected = mask_of(pattern, seq_len, heads)
    mask = pattern.mask(seq_len, heads)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)
    for head in range(heads):
        assert pattern.num_pairs(seq_len, head) == int(expected[head].sum())


@given(pattern=patterns(), seq_len=st.integers(0, 30), heads=st.integers(1, 4))
def test_masks_and_counts(pattern: Pattern, seq_len: int, heads: int) -> None:
    _check_against_the_definition(pattern, seq_len, heads)


class _PairsAsNumbers(TorchDispatchMode):
    """Collects the operations that make more than a bit of every pair."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        assert isinstance(result, Tensor)
        # By its memory: what is merely expanded takes none.
        taken = result.untyped_storage().nbytes() // result.element_size()
        if taken >= self.pairs and result.dtype != torch.bool:
            self.found.append(str(func))
        return result


@pytest.mark.plain
@each_pattern
def test_a_mask_is_made_of_bits_alone(pattern: Pattern) -> None:
    """Positions of every pair would take eight times the mask's own memory, each time."""
    with _PairsAsNumbers(pairs=50 * 50) as numbers:
        pattern.mask(50)
    assert numbers.found == []


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_every_small_fixed_pattern(part: Part, causal: bool) -> None:
    """Each stride up to 4, with each summary, number of sub-blocks and of sinks, up to length 9."""
    for stride, summary, subblocks in product(range(1, 5), repeat=3):
        for sinks in range(stride - subblocks * summary + 1):
            pattern = FixedPattern(stride, summary, subblocks, part, causal, sinks=sinks)
            for seq_len in range(10):
                _check_against_the_definition(pattern, seq_len, subblocks)


@pytest.mark.parametrize(
    "make",
    [
        *(partial(LocalPattern, sinks=sinks) for sinks in (0, 1, 3, 9)),
        *(partial(StridedPattern, part=p) for p in PARTS),
    ],
)
def test_every_small_window(make: Callable[[int], Pattern]) -> None:
    """Each stride and each window up to 7, shorter than, as long as and longer than the length."""
    for size, seq_len in product(range(1, 8), range(17)):
        _check_against_the_definition(make(size), seq_len, 2)


@given(pattern=patterns(), seq_len=st.integers(1, 30), head=st.integers(0, 4))
def test_indices_are_the_sets(pattern: Pattern, seq_len: int, head: int) -> None:
    """A causal set is the same whatever comes later, so the length may be left out."""
    for i in range(seq_len):
        expected = sorted(set_of(pattern, i, seq_len, head))
        assert pattern.indices(i, head, seq_len) == expected
        if pattern.causal:
            assert pattern.indices(i, head) == expected


@given(pattern=patterns(), seq_len=st.integers(1, 30), head=st.integers(0, 4))
def test_density_is_the_share_of_what_full_attention_reads(
    pattern: Pattern, seq_len: int, head: int
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


@given(seq_len=st.integers(0, 30), stride=st.integers(1, 40), causal=st.booleans())
def test_full_is_fixed_at_any_stride(seq_len: int, stride: int, causal: bool) -> None:
    """Blocks whose every column is a summary."""
    full = FullPattern(causal)
    fixed = full.as_fixed(stride)
    assert fixed.stride == stride
    assert torch.equal(fixed.mask(seq_len), mask_of(full, seq_len))
    assert fixed.num_pairs(seq_len) == full.num_pairs(seq_len)


@pytest.mark.parametrize("stride", [1, 2, 5, 16, 40])
def test_strided_as_printed(stride: int) -> None:
    """A1 has stride + 1 keys, and shares i - stride and i with A2; the union counts them once."""
    merged = StridedPattern(stride)
    local, summary = merged.factors()
    for i in range(80):
        assert local.indices(i) == list(range(max(0, i - stride), i + 1))
        assert summary.indices(i) == [j for j in range(i + 1) if (i - j) % stride == 0]
        last, column = (
            set(range(max(0, i - stride + 1), i + 1)),
            set(range(i - stride, -1, -stride)),
        )
        assert not last & column
        assert merged.indices(i) == sorted(last | column)
        assert LocalPattern(stride).indices(i) == sorted(last)


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


def test_count_of_the_strided_pattern() -> None:
    """64 · 4,096 - 64 · 63 / 2 in windows, and 64 · (1 + … + 63) in columns."""
    pattern = StridedPattern(64)
    assert pattern.num_pairs(4_096) == 389_152
    positions = torch.arange(4_096)
    assert pattern.reads(positions[:, None], positions).sum() == 389_152


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


# Thousands of strides: checks of types would only repeat themselves.
@pytest.mark.plain
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


@pytest.mark.parametrize(
    "pattern",
    [
        FixedPattern(6, 2, 3),
        FixedPattern(6, 2, 3, causal=False),
        FixedPattern(6, 2, sinks=3),
        StridedPattern(6),
    ],
)
def test_factors(pattern: FixedPattern | StridedPattern) -> None:
    local, summary = pattern.factors()
    assert (local, summary) == (replace(pattern, part="local"), replace(pattern, part="summary"))
    assert torch.equal(local.mask(20, 3) | summary.mask(20, 3), pattern.mask(20, 3))
    for factor in (local, summary):
        with pytest.raises(ValueError, match=f"part='{factor.part}'"):
            factor.factors()


@pytest.mark.parametrize(
    ("pattern", "another"),
    [
        (FixedPattern(6, 2, 3, "summary", False), FixedPattern(6, 2, 3, "summary", True)),
        (StridedPattern(6, "local"), StridedPattern(6, "summary")),
        (LocalPattern(6), LocalPattern(7)),
        (FixedPattern(6, 2, sinks=1), FixedPattern(6, 2)),
        (LocalPattern(6, sinks=1), LocalPattern(6)),
        (FullPattern(False), FullPattern(True)),
    ],
)
def test_patterns_are_values(pattern: Pattern, another: Pattern) -> None:
    """Frozen, equal by content, hashable, picklable: fit to be the key of a cache."""
    same = pickle.loads(pickle.dumps(pattern))
    assert same == pattern
    assert copy.deepcopy(pattern) == pattern
    assert pattern != another
    assert len({pattern, same, another}) == 2
    with pytest.raises(FrozenInstanceError):
        pattern.causal = True
    assert repr(pattern).startswith(type(pattern).__name__)


@pytest.mark.parametrize("pattern", [FixedPattern(6, 2, 3), LocalPattern(6)])
def test_what_was_pickled_without_sinks_has_none(pattern: Pattern) -> None:
    """As releases before 0.2 wrote it: every field but this one."""
    state = {name: value for name, value in vars(pattern).items() if name != "sinks"}
    assert state != vars(pattern)
    old: Pattern = object.__new__(type(pattern))
    vars(old).update(state)
    again = pickle.loads(pickle.dumps(old))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert torch.equal(again.mask(20, 3), pattern.mask(20, 3))


def _reach(*layers: Tensor) -> Tensor:
    """Return which positions each one reaches through layers in order, with residual paths."""
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


@given(stride=st.integers(1, 8), seq_len=st.integers(1, 30))
def test_two_strided_layers_connect_everything(stride: int, seq_len: int) -> None:
    """Merged twice, and the factors in either order: no position is out of the column's way."""
    every = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    merged = StridedPattern(stride)
    local, summary = (factor.mask(seq_len)[0] for factor in merged.factors())
    for layers in ((local, summary), (summary, local), (merged.mask(seq_len)[0],) * 2):
        assert torch.equal(_reach(*layers), every)


@given(window=st.integers(1, 8), layers=st.integers(1, 4), seq_len=st.integers(1, 30))
def test_local_layers_reach_no_farther_than_their_windows(
    window: int, layers: int, seq_len: int
) -> None:
    local = LocalPattern(window).mask(seq_len)[0]
    wide = LocalPattern(1 + layers * (window - 1)).mask(seq_len)[0]
    assert torch.equal(_reach(*[local] * layers), wide)


@pytest.mark.plain
def test_a_position_is_checked_before_anything_is_counted_from_it() -> None:
    with pytest.raises(TypeError, match="i must be an int, got i='3'"):
        FixedPattern(4, 1).indices("3")  # type: ignore[arg-type]
