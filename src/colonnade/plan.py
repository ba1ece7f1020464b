"""From a pattern and lengths to positions: which columns to gather, and a table of rows of queries.

Outside its own block a query sees only summaries, and all queries of a block see the same ones.
So the summary columns are gathered once, into **slots**, and each **row** of the table (a run of
queries inside one block) reads two dense pieces in one softmax. Query q_begin + r of key head h
reads

    own keys   own_begin … own_begin + clamp(r + 1 + lead - shift[h], 0, own_end - own_begin) - 1
    slots      slot_begin … slot_end - 1

This is the only file that turns index sets into positions. Kernels know the table and nothing of
patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from colonnade.pattern import FixedPattern
from colonnade.shapes import Gather, Mask, Positions, Shift, Table


class Row(NamedTuple):
    """A run of queries inside one block, and the two pieces that they read."""

    q_begin: int
    q_end: int
    own_begin: int
    own_end: int
    lead: int
    """Offset of the first query in its block; above 0 only when the queries start mid-block."""
    slot_begin: int
    slot_end: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What a kernel needs to know.

    Attributes:
        gather: For each key head, the key position that fills each slot; on the keys' device.
        table: One `Row` a line, on the CPU.
        shift: For each key head, how many queries of a block come before its first own key.
        own_from_slots: Whether own_begin … own_end count slots, not keys: under part "summary"
            the own keys of a block are its summary columns.
    """

    gather: Gather
    table: Table
    shift: Shift
    own_from_slots: bool

    def mask(self, kv_len: int) -> Mask:
        """The plan as a dense mask [kv_heads, q_len, kv_len]: slow, to look at and to test."""
        num_kv_heads = self.gather.shape[0]
        rows = table_rows(self.table)
        mask = torch.zeros(num_kv_heads, rows[-1].q_end if rows else 0, kv_len, dtype=torch.bool)
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
    """The table as named tuples."""
    return [Row(*line) for line in table.tolist()]


def fixed_plan(
    pattern: FixedPattern,
    q_len: int,
    kv_len: int,
    num_kv_heads: int,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan of a causal `FixedPattern` for the last `q_len` of `kv_len` positions.

    Rows are the blocks that hold a query; the first row may start mid-block. Slots are the
    summaries of every block that some query reads from outside; under part "summary" those of
    the last block too. Columns that a short last block lacks are clamped to the last key, and
    no query sees them.
    """
    assert pattern.causal, "bidirectional patterns have no plan"
    stride = pattern.stride
    skipped = kv_len - q_len
    num_blocks = num_rows(kv_len, stride)
    blocks = torch.arange(skipped // stride if q_len > 0 else num_blocks, num_blocks)
    block_begin = blocks * stride
    block_end = (block_begin + stride).clamp(max=kv_len)
    first_query = block_begin.clamp(min=skipped)
    slots_before = blocks * (0 if pattern.part == "local" else pattern.summary)
    own_from_slots = pattern.part == "summary"
    table = torch.stack(
        [
            first_query - skipped,
            block_end - skipped,
            slots_before if own_from_slots else block_begin,
            slots_before + pattern.summary if own_from_slots else block_end,
            first_query - block_begin,
            torch.zeros_like(blocks),
            slots_before,
        ],
        dim=1,
    )
    in_reach = num_blocks if q_len > 0 else 0
    gathered_blocks = {"merged": max(in_reach - 1, 0), "local": 0, "summary": in_reach}
    begins = torch.arange(gathered_blocks[pattern.part], device=device)[:, None] * stride
    columns = [pattern.summary_columns(head) for head in range(num_kv_heads)]
    gather = torch.stack(
        [
            (begins + torch.arange(c.start, c.stop, device=device)).flatten().clamp(max=kv_len - 1)
            for c in columns
        ]
    )
    shift = torch.tensor([c.start if own_from_slots else 0 for c in columns])
    return Plan(gather, table, shift, own_from_slots)


def num_rows(seq_len: int, stride: int) -> int:
    """Blocks of a sequence, a short last one included: rows of it laid out `stride` wide."""
    return -(-seq_len // stride)


def row_and_column(positions: Positions, stride: int) -> tuple[Positions, Positions]:
    """(block, offset in the block): row and column of the sequence laid out `stride` wide."""
    return positions // stride, positions % stride
