"""Groups the rows of a plan into padded tiles, and computes the indices that tiles read and write.

This happens on the CPU, the first time a plan is used on a device. The result is sent and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from colonnade.plan.table import Plan, Row, table_rows
from colonnade.shapes import Positions, Shift, Table

PADDING = 1 / 8
"""Largest share of slot padding in a tile, relative to its other keys."""


class Shape(NamedTuple):
    """The tile of rows row_begin … row_end - 1, in the order in which queries are laid out."""

    row_begin: int
    row_end: int
    q_begin: int
    """Index of its first query in the laid-out order."""
    queries: int
    own_keys: int
    slots: int
    fewest_slots: int

    @property
    def q_end(self) -> int:
        """Index after its last query in the laid-out order, padding included."""
        return self.q_begin + (self.row_end - self.row_begin) * self.queries


class Moves(NamedTuple):
    """Indices that move queries into the laid-out order and back."""

    query: Positions
    """The position of each query that is laid out."""
    place: Positions
    """The index of each query in the laid-out order."""
    is_padding: Bool[Tensor, " laid_out"]
    """True for padding, which repeats the last query of its row."""


class Layout(NamedTuple):
    """The indices that tiles read and write. Keys are numbered after all slots."""

    shapes: list[Shape]
    moves: Moves | None
    """None if the laid-out order is that of the positions, without padding."""
    seen: Int[Tensor, "heads_or_1 laid_out"]
    """Number of own keys that each query sees."""
    slot_begin: Int[Tensor, "rows 1"]
    slot_last: Int[Tensor, "rows 1"]
    slots: Int[Tensor, "rows 1"]
    own_begin: Int[Tensor, "rows 1"]
    own_last: Int[Tensor, "rows 1"]


def layout_of(plan: Plan, scores: int, entries: int, most: int) -> Layout:
    """Lay out the rows of a plan.

    Args:
        plan: The plan.
        scores: Scores of a query and a key, with all batch rows and heads.
        entries: Entries of a key and its value, with all batch rows and heads.
        most: Most scores of a tile, and most entries, unless a single row has more.
    """
    shapes, order = _put_together(table_rows(plan.table), scores, entries, most)
    table = plan.table[order]
    query, is_padding, seen = _lay_out(shapes, table, plan.shift)
    place = torch.empty(int((~is_padding).sum()), dtype=torch.long)
    place[query[~is_padding]] = torch.arange(len(query))[~is_padding]
    first_own = 0 if plan.own_from_slots else plan.gather.shape[1]
    as_they_lie = torch.equal(query, torch.arange(len(place)))
    moves = None if as_they_lie else Moves(query, place, is_padding)
    return Layout(shapes, moves, seen, *_columns(table, first_own))


def _put_together(
    rows: Sequence[Row], scores: int, entries: int, most: int
) -> tuple[list[Shape], list[int]]:
    """Return the tiles, and the order in which they take the rows.

    The rows of a tile differ in queries and in own keys by less than a factor of 2 each, and there
    are as many of them, in ascending order of slots, as the bounds allow. Rows without a key, which
    a bidirectional plan may have, are in no tile, and come last.
    """

    def kind(index: int) -> tuple[bool, int, int]:
        row = rows[index]
        queries, own_keys = row.q_end - row.q_begin, row.own_end - row.own_begin
        is_empty = own_keys == 0 and row.slot_end == row.slot_begin
        return is_empty, -(queries - 1).bit_length(), -max(own_keys - 1, 0).bit_length()

    def num_slots(index: int) -> int:
        return rows[index].slot_end - rows[index].slot_begin

    order = sorted(range(len(rows)), key=lambda index: (kind(index), num_slots(index)))
    shapes: list[Shape] = []
    row_begin = q_begin = 0
    for (is_empty, *_), indices in groupby(order, kind):
        alike = list(indices)
        queries = max(rows[index].q_end - rows[index].q_begin for index in alike)
        own_keys = max(rows[index].own_end - rows[index].own_begin for index in alike)
        most_keys = most // max(queries * scores, entries, 1)
        slots = [num_slots(index) for index in alike]
        while slots and not is_empty:
            count = _how_many(slots, own_keys, most_keys)
            row_end = row_begin + count
            sizes = queries, own_keys, slots[count - 1], slots[0]
            shapes.append(Shape(row_begin, row_end, q_begin, *sizes))
            row_begin, q_begin, slots = row_end, shapes[-1].q_end, slots[count:]
    return shapes, order


def _how_many(slots: Sequence[int], own_keys: int, most_keys: int) -> int:
    """Return how many rows with these numbers of slots, which ascend, form one tile."""
    total = 0
    for count, width in enumerate((n + own_keys for n in slots), start=1):
        total += width
        padded = count * width
        if count > 1 and (padded > (1 + PADDING) * total or padded > most_keys):
            return count - 1
    return len(slots)


def _lay_out(
    shapes: Sequence[Shape], table: Table, shift: Shift
) -> tuple[Positions, Bool[Tensor, " laid_out"], Int[Tensor, "heads_or_1 laid_out"]]:
    """Return for each query that is laid out its position, whether it is padding, and what it sees.

    It sees that many own keys, as `Layout.seen` says.
    """
    q_begin, q_end, own_begin, own_end, lead, *_ = table.unbind(1)
    length = q_end - q_begin
    for shape in shapes:
        length[shape.row_begin : shape.row_end] = shape.queries
    row = torch.arange(len(table)).repeat_interleave(length)
    place = torch.arange(len(row)) - (length.cumsum(0) - length)[row]
    position = q_begin[row] + place
    # All heads at once where they see the same.
    shift = shift[:1] if bool((shift == shift[:1]).all()) else shift
    seen = (place + 1 + lead[row] - shift[:, None]).clamp(min=0)
    seen = torch.minimum(seen, (own_end - own_begin)[row])
    is_padding = position >= q_end[row]
    # What no query of a row sees may be NaN, and the backward adds up what all queries give.
    seen = seen.masked_fill(is_padding, 0)
    return torch.minimum(position, q_end[row] - 1), is_padding, seen


def _columns(table: Table, first_own: int) -> list[Tensor]:
    """Return [rows, 1] each: slot_begin, slot_last, slots, own_begin, own_last of `Layout`.

    A row without slots has an own key in their place, and one without own keys a slot.
    """
    _, _, own_begin, own_end, _, slot_begin, slot_end = table[..., None].unbind(1)
    own_begin, own_end = own_begin + first_own, own_end + first_own
    slots, own_keys = slot_end - slot_begin, own_end - own_begin
    some_slot, some_own = slot_end - 1, own_begin
    return [
        torch.where(slots > 0, slot_begin, some_own),
        torch.where(slots > 0, slot_end - 1, some_own),
        slots,
        torch.where(own_keys > 0, own_begin, some_slot),
        torch.where(own_keys > 0, own_end - 1, some_slot),
    ]
