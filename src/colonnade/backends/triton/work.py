"""The plan's table as lists of work, with one line for each program of a kernel.

Lines are of int32. In a sequence, work that takes longest comes first, so that none of it is left
at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.plan.places import Places
from colonnade.plan.table import Plan

PROGRAMS = 1024
"""Programs of a kernel that keep any GPU busy."""
FARTHEST = 2**30
"""A stride may be longer than any sequence, and lines are of int32."""


def busy_shares(tiles: int) -> int:
    """Return how many shares of the queries that many tiles of slots need, to keep a GPU busy."""
    return max(PROGRAMS // max(tiles, 1), 1)


def gather(plan: Plan) -> Tensor:
    """Return [heads, slots], the key that fills each slot."""
    return plan.gather


def shift(plan: Plan) -> Tensor:
    """Return [heads], how many queries of a block come before its first own key."""
    return plan.shift.clamp(max=FARTHEST).int()


class Placed(NamedTuple):
    """The places of queries, keys and slots, see `plan.places`.

    Attributes:
        document: [q_len], the number of the document of each query.
        query: [q_len], the position of each query in its sequence.
        own: [heads or 1, positions], the position of each key, or of each slot if own keys are
            slots.
        slot: [heads, slots], the position of the key that fills each slot.
    """

    document: Tensor
    query: Tensor
    own: Tensor
    slot: Tensor


def placed(plan: Plan, places: Places) -> Placed:
    """Return the places as lists for kernels."""
    slot = places.slots(plan.gather).int()
    own = slot if plan.own_from_slots else places.key.int()
    return Placed(places.document.int(), places.query.int(), own, slot)


def pieces(plan: Plan, queries: int) -> Tensor:
    """Cut rows into pieces of at most that many queries, each a line like a row of the table."""
    q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end = plan.table.unbind(1)
    lead = lead.clamp(max=FARTHEST)
    row, place = _cut(q_end - q_begin, queries)
    begin = q_begin[row] + place
    end = torch.minimum(begin + queries, q_end[row])
    own = own_begin[row], own_end[row], lead[row] + place
    return _lines(begin, end, *own, slot_begin[row], slot_end[row]).flip(0)


def own_tiles(plan: Plan, num_keys: int, keys: int) -> Tensor:
    """Cut own keys into tiles of one row each.

    A line is (key_begin, key_end, own_begin, lead, q_begin, q_end). The keys between own ones have
    tiles without a query: what slots give them has to be written too.
    """
    rows = plan.table[plan.table[:, 3] > plan.table[:, 2]]
    q_begin, q_end, own_begin, own_end, lead, *_ = rows.unbind(1)
    lead = lead.clamp(max=FARTHEST)
    row, place = _cut(own_end - own_begin, keys)
    begin = own_begin[row] + place
    end = torch.minimum(begin + keys, own_end[row])
    of_rows = _lines(begin, end, own_begin[row], lead[row], q_begin[row], q_end[row])
    begins, ends = F.pad(own_end, (1, 0)), F.pad(own_begin, (0, 1), value=num_keys)
    gap, place = _cut(ends - begins, keys)
    first = begins[gap] + place
    none = torch.zeros_like(first)
    between = _lines(first, torch.minimum(first + keys, ends[gap]), first, none, none, none)
    return torch.cat([of_rows, between])


def num_read(plan: Plan) -> int:
    """Return how many slots, from the first one on, have all those that a query reads as slots.

    Own keys may be slots too: bidirectionally most slots are nothing else.
    """
    rows = plan.table[plan.table[:, 6] > plan.table[:, 5]]
    return int(rows[:, 6].max()) if len(rows) else 0


class SlotTiles(NamedTuple):
    """Tiles of slots, each with shares of the queries that see some of it.

    Attributes:
        tiles: (slot_begin, slot_end, q_begin, q_end, share), one line for each share.
        seen: [q_len], before which slot those end that each query sees.
        shares: [slots], the number of shares of each slot.
        most: The most shares of any slot.
    """

    tiles: Tensor
    seen: Tensor
    shares: Tensor
    most: int


def slot_tiles(plan: Plan, keys: int, queries: int, most: int) -> SlotTiles:
    """Cut slots into tiles of a sequence, and the queries behind a tile into shares.

    Args:
        plan: The plan.
        keys: Most slots of a tile.
        queries: A share of queries is a multiple of that many.
        most: Most shares of a slot.
    """
    num_slots, rows = plan.gather.shape[1], plan.table
    seen = rows[:, 6].int().repeat_interleave(rows[:, 1] - rows[:, 0])
    rows = rows[rows[:, 6] > rows[:, 5]]
    if len(rows) == 0:
        none = torch.zeros(num_slots, dtype=torch.int32)
        return SlotTiles(_lines(*torch.zeros(5, 0)), seen, none, 0)
    q_begin, _, _, _, _, slot_begin, slot_end = rows.unbind(1)
    # The rows of one sequence have one slot_begin, and their slot_end never goes down.
    _, sequence, count = slot_begin.unique_consecutive(return_inverse=True, return_counts=True)
    last = count.cumsum(0) - 1
    of, place = _cut(slot_end[last] - slot_begin[last], keys)
    begin = slot_begin[last][of] + place
    end = torch.minimum(begin + keys, slot_end[last][of])
    order = num_slots + 1
    sees = torch.searchsorted(sequence * order + slot_end, of * order + begin, right=True)
    q_stop = rows[last, 1][of]
    length = q_stop - q_begin[sees]
    share = max(-(-int(length.max()) // most), 512)
    share = -(-share // queries) * queries
    tile, behind = _cut(length, share)
    first = q_begin[sees][tile] + behind
    stop = torch.minimum(first + share, q_stop[tile])
    lines = _lines(begin[tile], end[tile], first, stop, behind // share)
    count = -(-length // share)
    change = torch.zeros(num_slots + 1, dtype=torch.long)
    change.index_add_(0, begin, count).index_add_(0, end, -count)
    return SlotTiles(lines, seen, change.cumsum(0)[:-1].int(), int(count.max()))


def partner(plan: Plan, num_keys: int) -> Tensor:
    """Return [heads, keys] the slot of each key, or if own keys are slots the key of each; else -1.

    Of columns that were clamped to one key, which no query sees, the first counts. If all heads
    have the same slots, there is a line for one of them only.
    """
    gather = plan.gather
    if (gather == gather[:1]).all():
        gather = gather[:1]
    if plan.own_from_slots:
        again = F.pad(gather[:, 1:] == gather[:, :-1], (1, 0))
        return gather.masked_fill(again, -1).int()
    found = torch.full((gather.shape[0], num_keys), -1, dtype=torch.int32)
    slots = torch.arange(gather.shape[1], dtype=torch.int32)
    return found.scatter_(1, gather, slots.expand(gather.shape))


def _cut(lengths: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Cut each length into parts; return for every part (whose it is, where it begins)."""
    counts = -(-lengths // most)
    index = torch.arange(len(lengths)).repeat_interleave(counts)
    before = F.pad(counts.cumsum(0), (1, 0))[:-1]
    return index, (torch.arange(len(index)) - before[index]) * most


def _lines(*columns: Tensor) -> Tensor:
    return torch.stack(columns, 1).int()
