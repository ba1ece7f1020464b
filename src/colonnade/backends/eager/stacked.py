"""Rows of one shape as a batch, as many as keep their scores in a processor's cache: for CPUs.

A row whose shape no other has is a tile of its own, and its operands are views.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.backends.eager.rows import Dropped, Gradient, Rows, Tile
from colonnade.backends.tracing.memo import remembered
from colonnade.plan.table import Plan, Row, table_rows
from colonnade.shapes import Key, Query, Value

STACKED_SCORES = 2**19
"""Scores of rows of one shape that are computed together: some MB, which fit into a cache."""


class _Shape(NamedTuple):
    """Rows of one shape that are computed together: r queries, s slots and w own keys each."""

    q_begin: list[int]
    own_begin: list[int]
    slot_begin: list[int]
    queries: int
    own_keys: int
    slots: int
    lead: int


@remembered
def _shapes(table: Tensor, heads: int, most_scores: int) -> list[_Shape]:
    """Put the table's rows of one shape together; `heads` counts the heads of all batch rows.

    Rows without a key, which a bidirectional plan may have, are left out.
    """
    by_shape: dict[tuple[int, int, int, int], list[Row]] = {}
    for row in table_rows(table):
        shape = (
            row.q_end - row.q_begin,
            row.own_end - row.own_begin,
            row.slot_end - row.slot_begin,
            row.lead,
        )
        if row.own_end > row.own_begin or row.slot_end > row.slot_begin:
            by_shape.setdefault(shape, []).append(row)
    found = []
    for (queries, own_keys, slots, lead), rows in by_shape.items():
        together = max(most_scores // max(heads * queries * (own_keys + slots), 1), 1)
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            q_begin, own_begin, slot_begin = (
                [getattr(row, f"{of}_begin") for row in some] for of in ("q", "own", "slot")
            )
            found.append(_Shape(q_begin, own_begin, slot_begin, queries, own_keys, slots, lead))
    return found


class StackedRows(Rows):
    """Rows of one shape form tiles; queries stay where they are."""

    def __init__(
        self, plan: Plan, query: Query, key: Key, value: Value, dropped: Dropped | None = None
    ) -> None:
        super().__init__(plan, key, dropped)
        self.shapes = _shapes(plan.table, query.shape[:2].numel(), STACKED_SCORES)
        self.shift = plan.shift[:, None, None]
        self.slot_key = key.take_along_dim(self.index, 2).to(self.compute)
        self.slot_value = value.take_along_dim(self.index, 2).to(self.compute)
        self.own_key = self.slot_key if plan.own_from_slots else key
        self.own_value = self.slot_value if plan.own_from_slots else value
        self.hidden_of: dict[tuple[int, int, int], Tensor] = {}

    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles."""
        return (_StackedTile(self, shape) for shape in self.shapes)

    def gradient(self, tensor: Tensor) -> Gradient:
        """Return zeros; own keys that are slots are added up there."""
        keys = tensor.new_zeros(tensor.shape, dtype=self.compute)
        slots = keys.new_zeros(*keys.shape[:2], self.index.shape[2], keys.shape[3])
        return Gradient(slots, keys, (slots, slots if self.own_from_slots else keys))

    def hidden(self, queries: int, own_keys: int, lead: int) -> Tensor:
        """[Hkv, 1, 1, r, w], True where a query does not see an own key; alike for most rows."""
        shape = queries, own_keys, lead
        if shape not in self.hidden_of:
            last_seen = torch.arange(queries, device="cpu")[:, None] + lead - self.shift
            own = torch.arange(own_keys, device="cpu")
            self.hidden_of[shape] = (own > last_seen)[:, None, None]
        return self.hidden_of[shape]


class _StackedTile(Tile):
    rows: StackedRows

    def __init__(self, rows: StackedRows, shape: _Shape) -> None:
        self.rows = rows
        self.shape = shape

    def _take(self, laid_out: Tensor) -> Tensor:
        return _take(laid_out, self.shape.q_begin, self.shape.queries)

    def _write(self, laid_out: Tensor, rows: Tensor) -> None:
        begins, length = self.shape.q_begin, self.shape.queries
        if len(begins) == 1:
            laid_out.narrow(2, begins[0], length).copy_(rows[:, :, 0])
        else:
            laid_out[:, :, _positions(begins, length)] = rows.to(laid_out.dtype)

    def keys(self) -> Tensor:
        """The keys that rows read."""
        return self._read(self.rows.slot_key, self.rows.own_key)

    def values(self) -> Tensor:
        """The values that rows read."""
        return self._read(self.rows.slot_value, self.rows.own_value)

    def _read(self, slots: Tensor, own: Tensor) -> Tensor:
        shape = self.shape
        own_part = _take(own, shape.own_begin, shape.own_keys).to(slots.dtype)
        return torch.cat([_take(slots, shape.slot_begin, shape.slots), own_part], 3)

    def _places_of_keys(self) -> Tensor:
        placed = self.rows.placed
        return self._read(placed.slot, placed.slot if self.rows.own_from_slots else placed.key)

    def hide(self, scores: Tensor) -> None:
        """Hide the own keys that a query does not see: all slots of a row are read."""
        shape = self.shape
        own_scores = scores.unflatten(3, (-1, shape.queries))[..., shape.slots :]
        hidden = self.rows.hidden(shape.queries, shape.own_keys, shape.lead)
        own_scores.masked_fill_(hidden, -math.inf)

    def add(self, gradient: Gradient, rows: Tensor) -> None:
        """Add to slots, and to own keys."""
        slots, own = gradient.read
        shape = self.shape
        _add(slots, shape.slot_begin, rows[..., : shape.slots, :])
        _add(own, shape.own_begin, rows[..., shape.slots :, :])


def _take(tensor: Tensor, begins: list[int], length: int) -> Tensor:
    """Runs of `length` positions of [B, H, n, D], as [B, H, m, length, D]; a view if m is 1."""
    if len(begins) == 1:
        return tensor.narrow(2, begins[0], length)[:, :, None]
    return tensor[:, :, _positions(begins, length)]


def _add(tensor: Tensor, begins: list[int], rows: Tensor) -> None:
    """Add [B, H, m, length, D] where `_take` would read it."""
    length = rows.shape[3]
    if len(begins) == 1:
        tensor.narrow(2, begins[0], length).add_(rows[:, :, 0])
    else:
        tensor.index_add_(2, _positions(begins, length).flatten(), rows.flatten(2, 3))


def _positions(begins: list[int], length: int) -> Tensor:
    return torch.tensor(begins, device="cpu")[:, None] + torch.arange(length, device="cpu")
