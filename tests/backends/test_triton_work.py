"""The lists of work of backend "triton", against the table that they are cut from. No Triton."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade import FixedPattern
from colonnade.backends.call import Call, Kept, Packed, Whole
from colonnade.backends.planning import PlanOptions, make_places, make_plan
from colonnade.backends.triton import work
from colonnade.backends.triton.configurations import (
    CHECKED,
    KERNELS,
    WIDEST,
    Kernel,
    Precision,
    configuration,
    power_of_two,
)
from colonnade.plan.kept import num_slots
from colonnade.plan.places import lie_in_quads
from colonnade.plan.table import Plan, fixed_plan, heads_by_plan, packed_plan
from tests.cases import fixed_patterns
from tests.packing import cu_seqlens_of, cuts

pytestmark = pytest.mark.plain  # Run-time type checks look at random entries while plans are drawn.
HEADS = 3
sizes = st.sampled_from((16, 32))


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, int]:
    """Draw a plan and its number of keys: fewer queries, reduced blocks, documents."""
    pattern: FixedPattern = draw(fixed_patterns(max_stride=20))
    kv_len = draw(st.integers(0, 90))
    heads = draw(st.sampled_from(heads_by_plan(pattern, HEADS)))
    if draw(st.booleans()):
        return packed_plan(pattern, draw(cuts(kv_len)), heads), kv_len
    if pattern.causal and draw(st.booleans()):
        begin, rest = pattern.stride * draw(st.integers(1, 4)), draw(st.integers(0, 40))
        kv_len = num_slots(pattern, begin) + rest
        return fixed_plan(pattern, draw(st.integers(0, rest)), kv_len, heads, begin), kv_len
    return fixed_plan(pattern, draw(st.integers(0, kv_len)), kv_len, heads), kv_len


@settings(max_examples=200)
@given(plan_and_keys=plans(), queries=sizes)
def test_pieces_are_the_rows(plan_and_keys: tuple[Plan, int], queries: int) -> None:
    """A piece is a row of a table: together they read what the table reads, the last ones first."""
    plan, kv_len = plan_and_keys
    pieces = work.pieces(plan, queries)
    assert (pieces[:, 1] - pieces[:, 0] <= queries).all()
    cut = Plan(plan.gather, pieces.flip(0).long(), plan.shift, plan.own_from_slots)
    assert torch.equal(cut.mask(kv_len), plan.mask(kv_len))


@settings(max_examples=200)
@given(plan_and_keys=plans(), keys=sizes, queries=sizes, most=st.integers(1, 5))
def test_tiles_of_slots_are_seen_by_their_queries(
    plan_and_keys: tuple[Plan, int], keys: int, queries: int, most: int
) -> None:
    """Each pair of a query and a slot is in one share, and the shares of a slot are 0, 1 …"""
    plan, _ = plan_and_keys
    num_slots = plan.gather.shape[1]
    expected = torch.zeros(int(plan.table[:, 1].max()) if len(plan.table) else 0, num_slots)
    for q_begin, q_end, *_, slot_begin, slot_end in plan.table.tolist():
        expected[q_begin:q_end, slot_begin:slot_end] += 1
    found, shares = torch.zeros_like(expected), [set[int]() for _ in range(num_slots)]
    lists = work.slot_tiles(plan, keys, queries, most)
    for slot_begin, slot_end, q_begin, q_end, share in lists.tiles.tolist():
        assert 0 < slot_end - slot_begin <= keys
        assert q_begin < q_end
        slots = torch.arange(slot_begin, slot_end)
        found[q_begin:q_end, slots] += (slots < lists.seen[q_begin:q_end, None]).float()
        for slot in slots.tolist():
            assert share not in shares[slot]
            shares[slot].add(share)
    assert torch.equal(found, expected)
    assert [set(range(n)) for n in lists.shares.tolist()] == shares
    assert lists.most == max(lists.shares.tolist(), default=0) <= most


@settings(max_examples=100)
@given(plan_and_keys=plans())
def test_slots_with_shares_are_among_those_that_are_read(plan_and_keys: tuple[Plan, int]) -> None:
    plan, _ = plan_and_keys
    shares = work.slot_tiles(plan, 16, 16, 4).shares
    ends = [slot + 1 for slot, count in enumerate(shares.tolist()) if count > 0]
    assert work.num_read(plan) == max(ends, default=0)


def test_bidirectional_sums_are_those_of_summaries() -> None:
    assert work.num_read(fixed_plan(FixedPattern(16, 2, causal=False), 64, 64, [0])) == 8


@settings(max_examples=200)
@given(plan_and_keys=plans(), keys=sizes)
def test_tiles_of_own_keys_write_every_key_once(plan_and_keys: tuple[Plan, int], keys: int) -> None:
    """And what a query reads as an own key is in the tile of its row."""
    plan, kv_len = plan_and_keys
    num_keys = plan.gather.shape[1] if plan.own_from_slots else kv_len
    written = torch.zeros(num_keys)
    rows = {(row[2], row[0], row[1], row[4]) for row in plan.table.tolist() if row[3] > row[2]}
    for begin, end, own_begin, lead, q_begin, q_end in work.own_tiles(
        plan, num_keys, keys
    ).tolist():
        assert 0 < end - begin <= keys
        written[begin:end] += 1
        assert q_begin == q_end or (own_begin, q_begin, q_end, lead) in rows
    assert (written == 1).all()


@settings(max_examples=100)
@given(plan_and_keys=plans())
def test_partners_lead_from_keys_to_slots_and_back(plan_and_keys: tuple[Plan, int]) -> None:
    """A key is the partner of one slot; only columns that no query sees share one."""
    plan, kv_len = plan_and_keys
    partner: Tensor = work.partner(plan, kv_len)
    partner = partner.expand(plan.gather.shape[0], -1)
    for of_head, gather in zip(partner.tolist(), plan.gather.tolist(), strict=True):
        if plan.own_from_slots:
            keys = [key for key in of_head if key >= 0]
            assert sorted(keys) == sorted(set(gather))
            assert all(key in (gather[slot], -1) for slot, key in enumerate(of_head))
        else:
            expected = {key: slot for slot, key in enumerate(gather)}
            assert of_head == [expected.get(key, -1) for key in range(kv_len)]


@given(
    kernel=st.sampled_from(KERNELS),
    precision=st.sampled_from(("half", "tf32")),
    width=st.integers(1, WIDEST),
    target=st.sampled_from((*CHECKED, "sm_87", "xpu")),
    longest=st.integers(1, 300),
)
def test_a_tile_is_no_larger_than_a_row_needs(
    kernel: Kernel, precision: Precision, width: int, target: str, longest: int
) -> None:
    found = configuration(kernel, precision, width, target, longest)
    assert found is not None
    assert 16 <= found.queries <= power_of_two(longest)
    assert found.queries & (found.queries - 1) == found.keys & (found.keys - 1) == 0


@settings(max_examples=300)
@given(data=st.data())
def test_keys_lie_in_quads_where_a_pattern_says_so(data: st.DataObject) -> None:
    """From the first own key of a row on, and from its first slot, as far as they are read."""
    drawn = data.draw(fixed_patterns(max_stride=6))
    sizes = {name: 4 * getattr(drawn, name) for name in ("stride", "summary", "sinks")}
    pattern = replace(drawn, **sizes)
    assert lie_in_quads(pattern)
    kv_len = data.draw(st.integers(0, 120))
    keys: Whole | Packed | Kept = Whole()
    q_len = data.draw(st.integers(0, kv_len))
    if data.draw(st.booleans()):
        keys, q_len = Packed(cu_seqlens_of(data.draw(cuts(kv_len)))), kv_len
    elif pattern.causal and data.draw(st.booleans()):
        keys = Kept(pattern.stride * data.draw(st.integers(1, 3)))
        kv_len += num_slots(pattern, keys.begin)
    options = PlanOptions.of(Call(pattern, 1.0, keys=keys))
    heads = data.draw(st.sampled_from(heads_by_plan(pattern, HEADS)))
    plan = make_plan(options, q_len, kv_len, heads)
    placed = work.placed(plan, make_places(options, q_len, kv_len, heads))
    for head, shift in enumerate(plan.shift.tolist()):
        slot = placed.slot[head].tolist()
        own = placed.own.expand(len(heads), -1)[head].tolist()
        for q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end in plan.table.tolist():
            seen = min(max(q_end - q_begin + lead - shift, 0), own_end - own_begin)
            for places in (own[own_begin : own_begin + seen], slot[slot_begin:slot_end]):
                quads = [place // 4 for place in places]
                assert [place % 4 for place in places] == [n % 4 for n in range(len(places))]
                assert all(quads[n] == quads[n // 4 * 4] for n in range(len(quads)))
