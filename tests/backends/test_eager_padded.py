"""The tiles that eager takes on devices other than CPUs, run on a CPU against the definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade import FixedPattern, KVCache
from colonnade.backends.eager import fixed, layout, padded
from colonnade.backends.eager.layout import PADDING, Layout, layout_of
from colonnade.backends.eager.padded import PaddedRows
from colonnade.backends.eager.stacked import StackedRows
from colonnade.backends.tracing import device
from colonnade.pattern import Part
from colonnade.plan.table import Plan, fixed_plan, heads_by_plan, packed_plan, table_rows
from tests.cases import (
    EXAMPLES,
    PARTS,
    Case,
    Inputs,
    Results,
    attend,
    attend_by_loops,
    attend_by_products,
    cases,
    fixed_patterns,
    output,
)
from tests.packing import (
    attend_packed,
    check_documents,
    cu_seqlens_of,
    cuts,
    documents,
    packed,
    packed_case,
)
from tests.rounding import check, check_half_the_digits

FIXED = {name: pattern for name, pattern in EXAMPLES.items() if isinstance(pattern, FixedPattern)}
each_fixed_pattern = pytest.mark.parametrize("pattern", FIXED.values(), ids=FIXED.keys())
ROWS = {"padded": PaddedRows, "stacked": StackedRows}


class Bounds(NamedTuple):
    """Bounds on a tile."""

    entries: int = padded.MOST_ENTRIES
    padding: float = PADDING


DEVICE = Bounds()
each_bounds = st.sampled_from((Bounds(1), Bounds(2_000), DEVICE, Bounds(padding=9.0)))
"""Each row alone, a few rows, what devices have, and rows that are hardly alike."""


@contextmanager
def _on_a_device(bounds: Bounds = DEVICE, rows: str = "padded") -> Iterator[None]:
    """Let CPUs take the tiles of other devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed, "StackedRows", ROWS[rows])
        patch.setattr(padded, "MOST_ENTRIES", bounds.entries)
        patch.setattr(layout, "PADDING", bounds.padding)
        device._sent.cache_clear()
        yield
    device._sent.cache_clear()


def _attend(case: Case, dtype: torch.dtype = torch.float64, bounds: Bounds = DEVICE) -> Results:
    with _on_a_device(bounds):
        return attend(case, case.inputs(dtype), "eager")


@settings(max_examples=150)
@given(case=cases(pattern=fixed_patterns()), bounds=each_bounds)
def test_padded_rows_equal_the_definition(case: Case, bounds: Bounds) -> None:
    """Every part, both directions, sub-blocks, grouped heads and fewer queries than keys."""
    inputs = case.inputs()
    check(case, inputs, _attend(case, bounds=bounds), attend_by_products(case, inputs))


@settings(max_examples=80)
@given(case=cases(160, fixed_patterns(40)), bounds=each_bounds)
def test_many_blocks(case: Case, bounds: Bounds) -> None:
    inputs = case.inputs()
    check(case, inputs, _attend(case, bounds=bounds), attend_by_products(case, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=25)
@given(case=cases(60, fixed_patterns()))
def test_other_types(dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    check(case, inputs, _attend(case, dtype), attend_by_products(case, inputs))


@given(
    pattern=fixed_patterns(),
    lengths=st.integers(0, 40).flatmap(cuts),
    kv_heads=st.integers(1, 3),
    bounds=each_bounds,
)
def test_packed_documents(
    pattern: FixedPattern, lengths: tuple[int, ...], kv_heads: int, bounds: Bounds
) -> None:
    with _on_a_device(bounds):
        check_documents(Case(pattern, kv_heads=kv_heads), lengths, "eager")


@each_fixed_pattern
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 5, 5), (2, 0, 5), (2, 0, 0), (2, 1, 9)])
def test_few_queries_or_none(batch: int, q_len: int, kv_len: int, pattern: FixedPattern) -> None:
    case = Case(pattern, batch=batch, q_len=q_len, kv_len=kv_len)
    inputs = case.inputs()
    found = _attend(case)
    if batch and q_len:
        check(case, inputs, found, attend_by_loops(case, inputs))
    for result, tensor in zip(found, (inputs.grad_out, inputs.grad_lse, *inputs[:3]), strict=True):
        assert result.shape == tensor.shape


@pytest.mark.parametrize("chunks", [[7, 13, 1, 9], [30]], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_what_a_cache_keeps(part: Part, chunks: list[int]) -> None:
    """Blocks of which the summaries alone are left, and queries that start in mid-block."""
    pattern = FixedPattern(4, 1, 2, part)
    case = Case(pattern, q_len=sum(chunks), kv_len=sum(chunks))
    query, key, value = case.inputs()[:3]
    cache = KVCache(pattern, backend="eager")
    with _on_a_device():
        outs = [
            cache.attend(q, k, v, case.scale)
            for q, k, v in zip(*(t.split(chunks, 2) for t in (query, key, value)), strict=True)
        ]
    expected = attend_by_loops(case, case.inputs()).out
    check_half_the_digits(torch.cat(outs, 2), expected)


@each_fixed_pattern
def test_dropout_repeats_itself_in_the_backward(pattern: FixedPattern) -> None:
    """The same seed drops the same weights, and the gradient of a linear function is it."""
    lengths = (10, 0, 7, 10)
    query, key, value = packed_case(Case(pattern), lengths).inputs()[:3]
    value.requires_grad_()
    outs = []
    for p in (0.4, 0.4, 0.0):
        torch.manual_seed(1)
        with _on_a_device(Bounds(2_000)):
            out, _ = packed(query, key, value, cu_seqlens_of(lengths), pattern, dropout_p=p)
            weight = torch.ones_like(out)
            (grad,) = torch.autograd.grad((out * weight).sum(), value)
        torch.testing.assert_close((grad * value).sum(), (out * weight).sum())
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def _reached(case: Case, head: int, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return what NaN may reach from some queries [q_len]: all queries of their blocks, and keys.

    Keys are those of these blocks, and those that a query there reads.
    """
    assert isinstance(case.pattern, FixedPattern)
    block = torch.arange(case.kv_len) // case.pattern.stride
    of_queries = block[case.kv_len - case.q_len :]
    blocks = torch.isin(of_queries, of_queries[queries])
    keys = torch.isin(block, of_queries[queries]) | case.mask()[head][blocks].any(0)
    return blocks, keys


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("of", ["key", "value", "grad_out", "grad_lse"])
@settings(max_examples=80)
@given(
    case=cases(40, fixed_patterns()),
    bad=st.sampled_from((math.nan, math.inf, -math.inf)),
    bounds=each_bounds,
    data=st.data(),
)
def test_bad_numbers_reach_readers_and_their_blocks_only(
    rows: str, of: str, case: Case, bad: float, bounds: Bounds, data: st.DataObject
) -> None:
    """Forward and backward; everything else has the same bits as with good numbers."""
    inputs = case.inputs()
    tensor = getattr(inputs, of).clone()
    head = data.draw(st.integers(0, case.kv_heads - 1), label="head")
    if of in ("key", "value"):
        j = data.draw(st.integers(0, case.kv_len - 1), label="position")
        tensor[0, head, j] = bad
        queries = case.reach(head, j)
    else:
        i = data.draw(st.integers(0, case.q_len - 1), label="query")
        tensor[0, case.queries_of(head).start, i] = bad
        queries = torch.arange(case.q_len) == i
    with _on_a_device(bounds, rows):
        before = attend(case, inputs, "eager")
        after = attend(case, inputs._replace(**{of: tensor}), "eager")
    of_blocks, keys = _reached(case, head, queries)
    same_queries = torch.ones(before.lse.shape, dtype=torch.bool)
    same_queries[0, case.queries_of(head)] = ~of_blocks
    same_keys = torch.ones(before.grad_key.shape[:3], dtype=torch.bool)
    same_keys[0, head] = ~keys
    if of in ("key", "value"):
        same_keys[0, head, j] = False
    for name, found, expected in zip(Results._fields, after, before, strict=True):
        same = same_keys if name in ("grad_key", "grad_value") else same_queries
        assert torch.equal(found[same], expected[same]), name


@settings(max_examples=120)
@given(
    pattern=fixed_patterns(),
    lengths=st.integers(1, 40).flatmap(cuts),
    bounds=each_bounds,
    which=st.integers(0, 5),
)
# The second document's last block has no own keys, and shares a tile with some that have one.
@example(FixedPattern(6, 3, subblocks=2, causal=False), (10, 9, 10), DEVICE, 0)
def test_bad_numbers_stay_in_their_document(
    pattern: FixedPattern, lengths: tuple[int, ...], bounds: Bounds, which: int
) -> None:
    """Whatever a row is padded with, it is nothing of another document."""
    case = packed_case(Case(pattern), lengths)
    inputs = case.inputs()
    where = list(documents(case, lengths))
    bad = where[which % len(where)][0]
    spoilt = Inputs(*[t.clone() for t in inputs])
    for tensor in spoilt:
        tensor[:, :, bad] = math.nan
    with _on_a_device(bounds):
        before, after = (
            attend_packed(case, each, cu_seqlens_of(lengths), "eager") for each in (inputs, spoilt)
        )
    for part, _ in where:
        if part != bad:
            assert all(map(torch.equal, after.part(part), before.part(part)))


def _layout(plan: Plan, most: int = 2**26) -> Layout:
    """Return the layout for one head of width 64."""
    return layout_of(plan, 1, 128, most)


def _check_layout(plan: Plan, found: Layout) -> None:
    """Assert that each row with a key is in one tile, and that there is little padding."""
    table = plan.table
    with_keys = (table[:, 3] > table[:, 2]) | (table[:, 6] > table[:, 5])
    ends = [shape.row_end for shape in found.shapes]
    assert [shape.row_begin for shape in found.shapes] == [0, *ends][: len(ends)]
    assert max(ends, default=0) == with_keys.sum()
    for shape in found.shapes:
        slots = found.slots[shape.row_begin : shape.row_end]
        assert (slots.min(), slots.max()) == (shape.fewest_slots, shape.slots)
        padded_keys = len(slots) * (shape.slots + shape.own_keys)
        assert padded_keys <= (1 + PADDING) * (slots + shape.own_keys).sum()
    rows = table_rows(table)
    laid_out = sum((s.row_end - s.row_begin) * s.queries for s in found.shapes)
    assert laid_out < 2 * max(sum(row.q_end - row.q_begin for row in rows), 1)


@given(
    pattern=fixed_patterns(40),
    lengths=st.integers(0, 300).flatmap(cuts),
    most=st.sampled_from((1, 20_000, 2**26)),
)
def test_each_row_is_in_one_tile(
    pattern: FixedPattern, lengths: tuple[int, ...], most: int
) -> None:
    for heads in heads_by_plan(pattern, 3):
        plan = packed_plan(pattern, lengths, heads)
        _check_layout(plan, _layout(plan, most))


@pytest.mark.parametrize(
    ("seq_len", "most"), [(1_024, 3), (16_384, 10), (131_072, 25), (131_200, 26)]
)
def test_the_number_of_tiles_hardly_grows(seq_len: int, most: int) -> None:
    """Up to 1,025 blocks, which were a tile each. The last block of 131,200 is another half."""
    plan = fixed_plan(FixedPattern(128, 8), seq_len, seq_len, [0])
    found = _layout(plan)
    _check_layout(plan, found)
    print(f"{len(found.shapes)} tiles for {len(plan.table)} rows")
    assert len(found.shapes) <= most


def test_documents_of_all_lengths_share_tiles() -> None:
    """1,500 documents of up to 2,048 tokens: last blocks are of every length, with any slots."""
    lengths = torch.randint(1, 2_049, (1_500,), generator=torch.Generator().manual_seed(0))
    plan = packed_plan(FixedPattern(128, 8), lengths, [0])
    found = _layout(plan)
    _check_layout(plan, found)
    print(f"{len(found.shapes)} tiles for {len(plan.table)} rows")
    assert len(found.shapes) <= 100 < len(plan.table) / 100


def test_queries_that_lie_in_the_order_of_tiles_are_not_copied() -> None:
    pattern = FixedPattern(4, 1)
    inputs = Case(pattern, q_len=13, kv_len=13).inputs()
    plan = fixed_plan(pattern, 13, 13, [0, 1])
    rows = PaddedRows(plan, *inputs[:3])
    assert rows.lay_out(inputs.query) is inputs.query
    plan = fixed_plan(pattern, 11, 13, [0, 1])
    query = inputs.query[:, :, 2:]
    rows = PaddedRows(plan, query, *inputs[1:3])
    laid_out = rows.lay_out(query)
    assert not torch.equal(laid_out, query)
    assert torch.equal(rows.take_out(laid_out), query)


def test_keys_that_no_query_sees_may_be_nan() -> None:
    """The last key stands for the summaries that a short last block lacks."""
    case = Case(FixedPattern(8, 2, part="summary"), q_len=21, kv_len=21)
    inputs = case.inputs()
    with _on_a_device(DEVICE):
        before = attend(case, inputs, "eager")
        inputs.key[:, :, 20] = math.nan
        after = attend(case, inputs, "eager")
    assert torch.equal(after.out, before.out)
    for name in ("grad_key", "grad_value"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def test_cpus_take_tiles_of_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, the tests of CPUs would pass if they took the padded ones."""
    monkeypatch.setattr(fixed, "PaddedRows", None)
    case = Case()
    output(*case.inputs()[:3], case.pattern, "eager")
