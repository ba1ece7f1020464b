"""From a pattern and lengths to positions: which columns to gather, and a table of rows of queries.

Outside its own block a query sees only sinks and summaries, and all queries of a block see the same
ones. So these are gathered once, into **slots**, and each **row** of the table (some queries of one
block) reads two dense pieces in one softmax. Query q_begin + r of key head h reads

    own keys   own_begin … own_begin + clamp(r + 1 + lead - shift[h], 0, own_end - own_begin) - 1
    slots      slot_begin … slot_end - 1

Only the files in this folder turn index sets into positions. Kernels know the table and nothing of
patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.pattern import FixedPattern
from colonnade.plan.kept import columns_read, num_positions, num_slots
from colonnade.plan.lines import num_blocks
from colonnade.shapes import Gather, Mask, Positions, Shift, Table


class Row(NamedTuple):
    """Consecutive queries of one block, and the two pieces that they read."""

    q_begin: int
    q_end: int
    own_begin: int
    own_end: int
    lead: int
    """Offset of the first query in its block; above 0 when the queries start mid-block. In a
    bidirectional plan the stride, so that every query sees all own keys."""
    slot_begin: int
    slot_end: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a kernel needs to know of a pattern.

    Attributes:
        gather: For each key head, the key position that fills each slot.
        table: One `Row` a line.
        shift: For each key head, how many queries of a block come before its first own key.
        own_from_slots: Whether own_begin … own_end count slots, not keys.
    """

    gather: Gather
    table: Table
    shift: Shift
    own_from_slots: bool

    def num_pairs(self) -> int:
        """Return the number of keys that all queries of the table read, summed over key heads."""
        q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end = self.table.unbind(1)
        queries, own_keys = q_end - q_begin, own_end - own_begin
        # Query r sees clamp(first + r, 0, own_keys) own keys: two sums from 1 on, one cut off.
        first = lead + 1 - self.shift[:, None]
        before, last = (n.clamp(min=0) for n in (first - 1, first + queries - 1))
        seen, seen_before = (
            n * (n + 1) // 2 - (n - own_keys).clamp(min=0) * (n - own_keys + 1) // 2
            for n in (last, before)
        )
        return int((seen - seen_before + queries * (slot_end - slot_begin)).sum())

    def mask(self, kv_len: int) -> Mask:
        """Draw the plan as a dense mask [kv_heads, q_len, kv_len]: slow, to look at and to test."""
        num_kv_heads = self.gather.shape[0]
        rows = table_rows(self.table)
        q_len = rows[-1].q_end if rows else 0
        mask = torch.zeros(num_kv_heads, q_len, kv_len, dtype=torch.bool, device="cpu")
        for head, (gather, shift) in enumerate(
            zip(self.gather.tolist(), self.shift.tolist(), strict=True)
        ):
            own = gather if self.own_from_slots else range(kv_len)
            for row in rows:
                for r in range(row.q_end - row.q_begin):
                    seen = min(max(r + 1 + row.lead - shift, 0), row.own_end - row.own_begin)
                    read = list(own[row.own_begin : row.own_begin + seen])
                    read += gather[row.slot_begin : row.slot_end]
                    mask[head, row.q_begin + r, read] = True
        return mask


def table_rows(table: Table) -> list[Row]:
    """Return the table as named tuples."""
    return [Row(*line) for line in table.tolist()]


def heads_by_plan(pattern: FixedPattern, num_kv_heads: int) -> list[range]:
    """Return the key heads that each plan serves: all, or bidirectionally those of one sub-block.

    A short last block holds different numbers of summaries for different sub-blocks. Where the
    block is read in both directions, that shows in the number of slots, and a table has one.
    """
    if pattern.causal:
        return [range(num_kv_heads)]
    different = min(pattern.subblocks, num_kv_heads)
    return [range(first, num_kv_heads, pattern.subblocks) for first in range(different)]


def fixed_plan(
    pattern: FixedPattern,
    q_len: int,
    kv_len: int,
    heads: Sequence[int],
    begin: int = 0,
) -> Plan:
    """Make the plan of a `FixedPattern` for the last `q_len` of `kv_len` keys.

    Rows are the blocks that hold a query; the first row may start mid-block. `heads` is one of
    `heads_by_plan`. Of the blocks before position `begin`, the start of one, the keys hold only
    the slots, and no query lies there.
    """
    seq_len, already = num_positions(pattern, kv_len, begin), num_slots(pattern, begin)
    blocks = num_blocks(seq_len, pattern.stride)
    skipped = kv_len - q_len
    first = (seq_len - q_len) // pattern.stride if q_len > 0 else blocks
    # Where the sequence would begin if the blocks before `begin` were whole.
    everything = torch.tensor(already - begin), torch.tensor(kv_len)
    rows = _Blocks(torch.arange(first, blocks), *everything)
    if not pattern.causal:
        return _bidirectional_plan(pattern, rows, skipped, torch.arange(kv_len), heads)
    in_reach = 0
    if q_len > 0:
        in_reach = blocks if pattern.part == "summary" else blocks - 1
    reduced = begin // pattern.stride
    whole = _Blocks(torch.arange(reduced, max(in_reach, reduced)), *everything)
    plan = _causal_plan(pattern, rows, skipped, whole, 0, heads)
    slots = torch.arange(already).expand(len(heads), -1)
    return replace(plan, gather=torch.cat([slots, plan.gather], 1))


def packed_plan(
    pattern: FixedPattern,
    lengths: Sequence[int] | Tensor,
    heads: Sequence[int],
) -> Plan:
    """Make the plan of documents that lie one after the other; blocks restart at every document.

    A document's rows point at its own slots. Nothing is padded, and empty documents have no rows.
    """
    length = torch.as_tensor(lengths, dtype=torch.long)
    end = length.cumsum(0)
    counts = num_blocks(length, pattern.stride)
    document = torch.arange(len(lengths)).repeat_interleave(counts)
    index = torch.arange(len(document)) - _sums_before(counts)[document]
    rows = _Blocks(index, (end - length)[document], end[document])
    if not pattern.causal:
        in_document = torch.arange(int(length.sum())) - (end - length).repeat_interleave(length)
        return _bidirectional_plan(pattern, rows, 0, in_document, heads)
    kept = (index < counts[document] - 1) | (pattern.part == "summary")
    gathered = _Blocks(*(part[kept] for part in rows))
    # The slots before the first block of each row's document.
    slots_before = _sums_before(kept * _slots_of(pattern, index))[torch.arange(len(index)) - index]
    return _causal_plan(pattern, rows, 0, gathered, slots_before, heads)


def own_from_slots(pattern: FixedPattern) -> bool:
    """Whether the own keys of a plan are gathered too.

    Under part "summary" the own keys of a block are its summary columns. In a bidirectional plan
    they are the columns of the block that are no summaries, gathered after all summaries.
    """
    return pattern.part == "summary" or (not pattern.causal and pattern.part == "merged")


class _Blocks(NamedTuple):
    """Blocks of sequences that lie one after the other in memory."""

    number: Tensor
    """Number of each block in its sequence."""
    sequence_begin: Tensor
    sequence_end: Tensor

    def begin(self, stride: int) -> Tensor:
        """The first position of each block."""
        return self.sequence_begin + self.number * stride

    def end(self, stride: int) -> Tensor:
        """The position after the last of each block; the last block of a sequence may be short."""
        return torch.minimum(self.begin(stride) + stride, self.sequence_end)


def _causal_plan(
    pattern: FixedPattern,
    rows: _Blocks,
    skipped: int,
    gathered: _Blocks,
    first_slot: Tensor | int,
    heads: Sequence[int],
) -> Plan:
    """Slots are the sinks of every sequence, and the summaries of every block, that are read so.

    These are the blocks that some query reads from outside; under part "summary" the last one too.
    Positions that a short sequence lacks are clamped to its last key, and no query sees them.
    """
    stride = pattern.stride
    by_slot = pattern.part == "summary"
    begin, end = rows.begin(stride), rows.end(stride)
    first_query = begin.clamp(min=skipped)
    slot_begin = torch.zeros_like(begin) + first_slot
    slot_end = slot_begin + num_slots(pattern, rows.number * stride)
    if by_slot:
        slot_end = slot_begin + pattern.sinks + rows.number * pattern.summary
    table = torch.stack(
        [
            first_query - skipped,
            end - skipped,
            slot_end if by_slot else begin,
            slot_end + pattern.summary if by_slot else end,
            first_query - begin,
            slot_begin,
            slot_end,
        ],
        dim=1,
    )
    if by_slot and pattern.sinks > 0:
        table = _one_by_one(table, torch.where(rows.number == 0, pattern.sinks, 0))
    columns = [pattern.summary_columns(head) for head in heads]
    shift = torch.tensor([c.start if by_slot else 0 for c in columns])
    return Plan(_gather(pattern, gathered, columns), table, shift, by_slot)


def _slots_of(pattern: FixedPattern, number: Tensor) -> Tensor:
    """Return how many slots come of blocks with these numbers in their sequence."""
    return columns_read(pattern) + pattern.sinks * (number == 0)


def _gather(pattern: FixedPattern, blocks: _Blocks, columns: Sequence[range]) -> Gather:
    """Return the keys in the slots of blocks: the sinks of a first one, then its summaries."""
    counts = _slots_of(pattern, blocks.number)
    of_block = torch.arange(len(counts)).repeat_interleave(counts)
    # Counted from the first summary of each block, so that sinks are below 0.
    number = torch.arange(len(of_block)) - _sums_before(counts)[of_block]
    number = number - pattern.sinks * (blocks.number == 0)[of_block]
    first = torch.tensor([c.start for c in columns])[:, None]
    column = torch.where(number < 0, number + pattern.sinks, first + number)
    ends = blocks.sequence_end.expand_as(blocks.number)[of_block]
    return torch.minimum(blocks.begin(pattern.stride)[of_block] + column, ends - 1)


def _one_by_one(table: Tensor, sinks: Tensor) -> Tensor:
    """Give each of the first `sinks` queries of a block, which are sinks, a row of the table.

    Query r of these reads r + 1 slots, the sinks up to itself, and no own key.
    """
    q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end = table.unbind(1)
    alone = torch.minimum(sinks - lead, q_end - q_begin).clamp(min=0)
    copies = alone + (q_end - q_begin > alone)
    row = torch.arange(len(table)).repeat_interleave(copies)
    number = torch.arange(len(row)) - _sums_before(copies)[row]
    is_alone = number < alone[row]
    lead = lead[row] + number
    return torch.stack(
        [
            q_begin[row] + number,
            torch.where(is_alone, q_begin[row] + number + 1, q_end[row]),
            own_begin[row],
            torch.where(is_alone, own_begin[row], own_end[row]),
            lead,
            slot_begin[row],
            torch.where(is_alone, slot_begin[row] + lead + 1, slot_end[row]),
        ],
        dim=1,
    )


def _bidirectional_plan(
    pattern: FixedPattern,
    rows: _Blocks,
    skipped: int,
    in_sequence: Positions,
    heads: Sequence[int],
) -> Plan:
    """The gather reorders all keys: first every sink and summary, then every other column.

    All queries of a sequence read all of the former, in slots; own keys are the block's other
    columns, so that no key comes twice. `in_sequence` counts positions from their sequence's start.
    Under part "local" slots are sinks, and block 0 has them among its own keys.
    """
    columns = pattern.summary_columns(heads[0])
    column = in_sequence % pattern.stride
    is_slot = in_sequence < pattern.sinks
    if pattern.part != "local":
        is_slot = is_slot | ((column >= columns.start) & (column < columns.stop))
    gather = torch.argsort(~is_slot, stable=True)
    before = torch.cat([torch.zeros(1, dtype=torch.long), is_slot.cumsum(0)])
    begin, end = rows.begin(pattern.stride), rows.end(pattern.stride)
    first_query = begin.clamp(min=skipped)
    own_begin, own_end = begin, end
    slot_begin, slot_end = before[rows.sequence_begin], before[rows.sequence_end]
    if pattern.part == "merged":
        own_begin, own_end = (before[-1] + at - before[at] for at in (begin, end))
    elif pattern.part == "local":
        slot_end = torch.where(rows.number > 0, slot_end, slot_begin)
        gather = gather[: int(before[-1])]
    else:
        own_begin = own_end = begin
    every = torch.full_like(begin, pattern.stride)
    parts = first_query - skipped, end - skipped, own_begin, own_end, every, slot_begin, slot_end
    return Plan(
        gather.expand(len(heads), -1),
        torch.stack([part.expand_as(begin) for part in parts], dim=1),
        torch.zeros(len(heads), dtype=torch.long),
        own_from_slots(pattern),
    )


def gathered_mask(
    pattern: FixedPattern, seq_len: int
) -> tuple[Positions, Callable[[Positions, Positions], Tensor]]:
    """Return the slots of a causal merged pattern, and a mask function over [slots ; keys].

    For attention that takes a mask function: the plan's two pieces as one row of keys.
    """
    slots = fixed_plan(pattern, seq_len, seq_len, [0]).gather[0]
    sinks = pattern.sinks
    count = len(slots)

    def reads(query: Positions, key: Positions) -> Tensor:
        block = query // pattern.stride
        position = key - count
        own = (position // pattern.stride == block) & (position <= query)
        earlier = ((key - sinks) // pattern.summary).clamp(min=0) < block
        return torch.where(key < count, earlier, own)

    return slots, reads


def _sums_before(counts: Tensor) -> Tensor:
    """Return for each entry the sum of those before it."""
    return counts.cumsum(0) - counts.long()
