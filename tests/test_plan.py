"""The plan against the pattern: read from its table, every pair is there exactly once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colonnade import FixedPattern
from colonnade.pattern import Part
from colonnade.plan import Plan, fixed_plan, row_and_column, table_rows
from tests.cases import Case, cases


def _plan(case: Case) -> Plan:
    return fixed_plan(case.pattern, case.q_len, case.kv_len, case.kv_heads)


def _keys_read(plan: Plan, head: int) -> list[list[int]]:
    """For each query the key positions that it reads, as often as it reads them.

    The rule at the top of plan.py, written once more, column by column of the bare table.
    """
    gathered = plan.gather[head].tolist()
    read = []
    for q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end in plan.table.tolist():
        for r in range(q_end - q_begin):
            own_end_of_r = own_begin + r + 1 + lead - int(plan.shift[head])
            own = list(range(own_begin, min(own_end_of_r, own_end)))
            slots = [gathered[slot] for slot in range(slot_begin, slot_end)]
            read.append(slots + ([gathered[slot] for slot in own] if plan.own_from_slots else own))
    return read


@given(case=cases(max_len=40, max_stride=10))
def test_each_query_reads_its_set_and_no_key_twice(case: Case) -> None:
    plan = _plan(case)
    expected = case.mask()
    for head in range(case.kv_heads):
        read = _keys_read(plan, head)
        assert [sorted(keys) for keys in read] == [
            row.nonzero().flatten().tolist() for row in expected[head]
        ]


@given(case=cases(max_len=40, max_stride=10))
def test_the_drawn_plan_is_the_pattern(case: Case) -> None:
    mask = case.pattern.mask(case.kv_len, case.kv_heads)
    assert torch.equal(_plan(case).mask(case.kv_len), mask[:, case.kv_len - case.q_len :])


@given(case=cases(max_len=40, max_stride=10))
def test_rows_are_runs_of_queries_inside_one_block(case: Case) -> None:
    """In order, without a gap; only the first row may start in mid-block."""
    rows = table_rows(_plan(case).table)
    offset = case.kv_len - case.q_len
    assert [row.q_begin for row in rows] == [0, *(row.q_end for row in rows[:-1])]
    assert rows[-1].q_end == case.q_len
    for row in rows:
        first, last = row.q_begin + offset, row.q_end - 1 + offset
        assert first // case.pattern.stride == last // case.pattern.stride
        assert row.lead == first % case.pattern.stride
    assert all(row.lead == 0 for row in rows[1:])


@given(case=cases(max_len=40, max_stride=10))
def test_no_slot_is_gathered_for_nobody(case: Case) -> None:
    """Every block but the last has its columns gathered once; the last only where A2 is alone."""
    plan = _plan(case)
    rows = table_rows(plan.table)
    blocks = -(-case.kv_len // case.pattern.stride)
    gathered = {"merged": blocks - 1, "local": 0, "summary": blocks}[case.pattern.part]
    assert plan.gather.shape == (case.kv_heads, gathered * case.pattern.summary)
    last_read = rows[-1].own_end if plan.own_from_slots else rows[-1].slot_end
    assert last_read == plan.gather.shape[1]
    own_keys = plan.gather.shape[1] if plan.own_from_slots else case.kv_len
    assert all(0 <= row.own_begin <= row.own_end <= own_keys for row in rows)
    assert all(0 <= position < case.kv_len for position in plan.gather.flatten().tolist())


@pytest.mark.parametrize("part", ["merged", "local", "summary"])
@pytest.mark.parametrize("kv_len", [0, 1, 9])
def test_without_queries_there_are_no_rows(part: Part, kv_len: int) -> None:
    pattern = FixedPattern(4, 1, part=part)
    plan = fixed_plan(pattern, 0, kv_len, 2)
    assert plan.table.shape == (0, 7)
    assert plan.gather.shape == (2, 0)
    assert plan.mask(kv_len).shape == (2, 0, kv_len)


def test_a_plan_at_full_length() -> None:
    """The paper's size: one row a block, and the c·n/l slots but the last block's."""
    plan = fixed_plan(FixedPattern(128, 8), 65_536, 65_536, 1)
    assert plan.table.shape == (512, 7)
    assert plan.gather.shape == (1, 511 * 8)
    assert plan.gather[0, :9].tolist() == [*range(120, 128), 248]


@given(
    positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=5), stride=st.integers(1, 1000)
)
def test_row_and_column(positions: list[int], stride: int) -> None:
    """Python's own division is the independent one here."""
    rows, columns = row_and_column(torch.tensor([positions]), stride)
    assert rows.tolist() == [[divmod(i, stride)[0] for i in positions]]
    assert columns.tolist() == [[divmod(i, stride)[1] for i in positions]]
