"""The plan against the pattern: read from its table, every pair is there exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colonnade import FixedPattern
from colonnade.pattern import Part
from colonnade.plan.table import Plan, fixed_plan, heads_by_plan, packed_plan, table_rows
from tests.cases import PARTS, Case, cases, fixed_patterns, set_of

Reads = list[list[int]]


def _stride(case: Case) -> int:
    assert isinstance(case.pattern, FixedPattern)
    return case.pattern.stride


def _plans(case: Case) -> list[tuple[range, Plan]]:
    """Return each group of key heads with its plan."""
    pattern = case.pattern
    assert isinstance(pattern, FixedPattern)
    return [
        (heads, fixed_plan(pattern, case.q_len, case.kv_len, heads))
        for heads in heads_by_plan(pattern, case.kv_heads)
    ]


def _keys_read(plan: Plan, index: int, q_len: int) -> Reads:
    """Return the key positions that each query reads, ascending, as often as it reads them.

    The rule at the top of plan.py, written once more, column by column of the bare table, for the
    plan's head number `index`.
    """
    gathered = plan.gather[index].tolist()
    read: dict[int, list[int]] = {}
    for q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end in plan.table.tolist():
        for r in range(q_end - q_begin):
            own_end_of_r = own_begin + r + 1 + lead - int(plan.shift[index])
            own = list(range(own_begin, min(own_end_of_r, own_end)))
            slots = [gathered[slot] for slot in range(slot_begin, slot_end)]
            own = [gathered[slot] for slot in own] if plan.own_from_slots else own
            assert q_begin + r not in read, "a query has one row"
            read[q_begin + r] = sorted(slots + own)
    assert sorted(read) == list(range(q_len))
    return [read[q] for q in range(q_len)]


def _sets(pattern: FixedPattern, lengths: Sequence[int], head: int) -> Reads:
    """Return the keys that the definition has each query of packed documents read."""
    sets, begin = [], 0
    for length in lengths:
        sets += [sorted(begin + j for j in set_of(pattern, i, length, head)) for i in range(length)]
        begin += length
    return sets


@given(pattern=fixed_patterns(), num_kv_heads=st.integers(1, 12))
def test_every_head_is_in_one_group_with_its_like(pattern: FixedPattern, num_kv_heads: int) -> None:
    """A causal plan serves all heads; a bidirectional one, those with equal columns."""
    groups = heads_by_plan(pattern, num_kv_heads)
    assert sorted(head for heads in groups for head in heads) == list(range(num_kv_heads))
    if pattern.causal:
        assert len(groups) == 1
    else:
        columns = [{pattern.summary_columns(head) for head in heads} for heads in groups]
        assert all(len(of_group) == 1 for of_group in columns)
        assert len(set.union(*columns)) == len(groups)


@given(case=cases(40, fixed_patterns(10)))
def test_each_query_reads_its_set_and_no_key_twice(case: Case) -> None:
    expected = case.mask()
    for heads, plan in _plans(case):
        assert plan.gather.shape[0] == plan.shift.shape[0] == len(heads)
        for index, head in enumerate(heads):
            assert _keys_read(plan, index, case.q_len) == [
                row.nonzero().flatten().tolist() for row in expected[head]
            ]


@given(case=cases(40, fixed_patterns(10)))
def test_the_drawn_plan_is_the_pattern(case: Case) -> None:
    mask = case.pattern.mask(case.kv_len, case.kv_heads)[:, case.kv_len - case.q_len :]
    for heads, plan in _plans(case):
        assert torch.equal(plan.mask(case.kv_len), mask[list(heads)])


@given(case=cases(40, fixed_patterns(10)))
def test_rows_are_runs_of_queries_inside_one_block(case: Case) -> None:
    """In order, without a gap; only the first row may start in mid-block.

    But where block 0 has sinks for slots, each of these is a row, and the rest of the block.
    """
    stride = _stride(case)
    offset = case.kv_len - case.q_len
    assert isinstance(case.pattern, FixedPattern)
    by_slot = case.pattern.part == "summary" and case.pattern.causal
    alone = range(case.pattern.sinks + 1 if by_slot else 0)
    for _, plan in _plans(case):
        rows = table_rows(plan.table)
        begins = [row.q_begin for row in rows[1:]]
        assert [row.q_begin for row in rows] == [0, *(row.q_end for row in rows[:-1])]
        assert rows[-1].q_end == case.q_len
        for row in rows:
            first, last = row.q_begin + offset, row.q_end - 1 + offset
            assert first // stride == last // stride
            if case.pattern.causal:
                assert row.lead == first % stride
            else:
                assert row.lead >= row.own_end - row.own_begin
        assert all((q + offset) % stride == 0 or q + offset in alone for q in begins)


def _check_bounds(plan: Plan, kv_len: int) -> None:
    """Assert that every piece lies where there is something to read."""
    slots = plan.gather.shape[1]
    own_keys = slots if plan.own_from_slots else kv_len
    for row in table_rows(plan.table):
        assert 0 <= row.slot_begin <= row.slot_end <= slots
        assert 0 <= row.own_begin <= row.own_end <= own_keys
    assert all(0 <= position < kv_len for position in plan.gather.flatten().tolist())


@given(case=cases(40, fixed_patterns(10)))
def test_pieces_lie_within_the_sequence(case: Case) -> None:
    for _, plan in _plans(case):
        _check_bounds(plan, case.kv_len)


def _num_slots(pattern: FixedPattern, length: int) -> int:
    blocks = -(-length // pattern.stride)
    gathered = {"merged": blocks - 1, "local": 0, "summary": blocks}[pattern.part]
    has_sinks = blocks > 1 or pattern.part == "summary"
    return gathered * pattern.summary + pattern.sinks * has_sinks


@given(case=cases(40, fixed_patterns(10, causal=True)))
def test_no_slot_is_gathered_for_nobody(case: Case) -> None:
    """Every block but the last has its columns gathered once; the last only where A2 is alone.

    Sinks are gathered where another block reads them, or the first one reads slots alone.
    """
    pattern = case.pattern
    assert isinstance(pattern, FixedPattern)
    ((_, plan),) = _plans(case)
    rows = table_rows(plan.table)
    assert plan.gather.shape == (case.kv_heads, _num_slots(pattern, case.kv_len))
    last_read = rows[-1].own_end if plan.own_from_slots else rows[-1].slot_end
    assert last_read == plan.gather.shape[1]


@given(case=cases(40, fixed_patterns(10, causal=False)))
def test_a_bidirectional_gather_holds_no_position_twice(case: Case) -> None:
    """It is the sequence in another order, slots first; without summaries, the sinks."""
    assert isinstance(case.pattern, FixedPattern)
    everything = list(range(case.kv_len))
    if case.pattern.part == "local":
        everything = everything[: case.pattern.sinks]
    for heads, plan in _plans(case):
        assert plan.gather.sort(-1).values.tolist() == [everything] * len(heads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kv_len", [0, 1, 9])
def test_without_queries_there_are_no_rows(part: Part, causal: bool, kv_len: int) -> None:
    plan = fixed_plan(FixedPattern(4, 1, part=part, causal=causal), 0, kv_len, range(2))
    assert plan.table.shape == (0, 7)
    assert plan.mask(kv_len).shape == (2, 0, kv_len)
    if causal:
        assert plan.gather.shape == (2, 0)


def test_a_plan_at_full_length() -> None:
    """The paper's size: one row a block, and the c·n/l slots but the last block's."""
    plan = fixed_plan(FixedPattern(128, 8), 65_536, 65_536, range(1))
    assert plan.table.shape == (512, 7)
    assert plan.gather.shape == (1, 511 * 8)
    assert plan.gather[0, :9].tolist() == [*range(120, 128), 248]


def _check_documents(pattern: FixedPattern, lengths: Sequence[int], num_kv_heads: int) -> None:
    total = sum(lengths)
    for heads in heads_by_plan(pattern, num_kv_heads):
        plan = packed_plan(pattern, lengths, heads)
        _check_bounds(plan, total)
        for index, head in enumerate(heads):
            assert _keys_read(plan, index, total) == _sets(pattern, lengths, head)


@given(
    pattern=fixed_patterns(),
    lengths=st.lists(st.integers(0, 20), max_size=6),
    num_kv_heads=st.integers(1, 4),
)
def test_each_query_reads_its_set_of_its_document(
    pattern: FixedPattern, lengths: list[int], num_kv_heads: int
) -> None:
    """Blocks restart at every document, nothing crosses a boundary, and no key is read twice."""
    _check_documents(pattern, lengths, num_kv_heads)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "lengths",
    [[], [0], [0, 0, 0], [1] * 60 + [250] + [1, 0, 2] * 20, [0, 0, 7, 0], [8] * 9],
    ids=["none", "empty", "all empty", "tiny and huge", "empty around", "whole blocks"],
)
def test_unlike_documents(lengths: list[int], part: Part, causal: bool, sinks: int) -> None:
    _check_documents(FixedPattern(8, 2, 3, part, causal, sinks=sinks), lengths, 4)


@given(
    pattern=fixed_patterns(causal=True),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    num_kv_heads=st.integers(1, 3),
)
def test_documents_gather_no_slot_for_nobody(
    pattern: FixedPattern, lengths: list[int], num_kv_heads: int
) -> None:
    """As for one sequence: the last block of each document counts under part "summary" alone."""
    plan = packed_plan(pattern, lengths, range(num_kv_heads))
    gathered = sum(_num_slots(pattern, length) for length in lengths if length > 0)
    assert plan.gather.shape == (num_kv_heads, gathered)


@given(pattern=fixed_patterns(), length=st.integers(1, 40), num_kv_heads=st.integers(1, 4))
def test_one_document_is_one_sequence(
    pattern: FixedPattern, length: int, num_kv_heads: int
) -> None:
    for heads in heads_by_plan(pattern, num_kv_heads):
        packed, alone = (
            packed_plan(pattern, [length], heads),
            fixed_plan(pattern, length, length, heads),
        )
        assert torch.equal(packed.table, alone.table)
        assert torch.equal(packed.gather, alone.gather)
        assert torch.equal(packed.shift, alone.shift)
        assert packed.own_from_slots == alone.own_from_slots
