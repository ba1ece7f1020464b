"""Rows of similar shapes as a batch, padded to one shape: for GPUs and other accelerators.

A launch takes a device longer than most rows do, so there are few tiles, whatever the length. What
tells them where they read and write is on the device before the first one (`layout.py`).

What stands for a key that a row does not have is a key that all queries of the row read, or one of
its own block. Its scores are hidden like those of any key that a query does not see. So nothing
foreign is multiplied by a weight of 0, and NaN in it reaches no row that it would not reach anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from colonnade.backends.eager.layout import Shape, layout_of
from colonnade.backends.eager.rows import Dropped, Gradient, Rows, Tile
from colonnade.backends.tracing.device import kept_on_device
from colonnade.plan.table import Plan
from colonnade.shapes import Key, Query, Value

MOST_ENTRIES = 2**26
"""Most scores of a tile, and most entries of its keys and values, unless a single row has more."""


class PaddedRows(Rows):
    """Rows of similar shapes form tiles; queries are laid out in the order of the tiles."""

    def __init__(
        self, plan: Plan, query: Query, key: Key, value: Value, dropped: Dropped | None = None
    ) -> None:
        super().__init__(plan, key, dropped)
        heads, widths = query.shape[:2].numel(), key.shape[3] + value.shape[3]
        entries = key.shape[:2].numel() * widths
        self.layout = kept_on_device(key.device, layout_of, plan, heads, entries, MOST_ENTRIES)
        self.key, self.value = (self._readable(tensor) for tensor in (key, value))
        most = max((max(s.slots, s.own_keys) for s in self.layout.shapes), default=0)
        self.place = torch.arange(most, device=key.device)

    def _readable(self, tensor: Tensor) -> Tensor:
        """Return what rows may read: the slots, and behind them all keys where own keys are any."""
        index = self.index.expand(*tensor.shape[:2], -1, tensor.shape[3])
        return self._side_by_side(tensor.gather(2, index), tensor)

    def _side_by_side(self, slots: Tensor, keys: Tensor) -> Tensor:
        return slots if self.own_from_slots else torch.cat([slots, keys], 2)

    @cached_property
    def key_places(self) -> Tensor:
        """The positions of what rows may read."""
        return self._side_by_side(self.placed.slot, self.placed.key)

    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles."""
        return (_PaddedTile(self, shape) for shape in self.layout.shapes)

    def lay_out(self, tensor: Tensor, padding: float | None = None) -> Tensor:
        """Lay queries out in the order of the tiles."""
        moves = self.layout.moves
        if moves is None:
            return tensor
        laid_out = tensor.index_select(2, moves.query)
        if padding is not None:
            laid_out.masked_fill_(moves.is_padding[:, None], padding)
        return laid_out

    def take_out(self, laid_out: Tensor) -> Tensor:
        """Return what was laid out in the order of positions."""
        moves = self.layout.moves
        return laid_out if moves is None else laid_out.index_select(2, moves.place)

    def gradient(self, tensor: Tensor) -> Gradient:
        """Return zeros, slots and keys side by side as rows read them."""
        num_slots, num_keys = self.index.shape[2], tensor.shape[2]
        sizes = *tensor.shape[:2], num_slots + num_keys, tensor.shape[3]
        both = tensor.new_zeros(sizes, dtype=self.compute)
        slots, keys = both.split([num_slots, num_keys], 2)
        return Gradient(slots, keys, (both,))


class _PaddedTile(Tile):
    rows: PaddedRows

    def __init__(self, rows: PaddedRows, shape: Shape) -> None:
        self.rows = rows
        self.shape = shape
        layout, place = rows.layout, rows.place
        slots, own = (
            torch.minimum(self._of(begin) + place[:length], self._of(last))
            for begin, last, length in (
                (layout.slot_begin, layout.slot_last, shape.slots),
                (layout.own_begin, layout.own_last, shape.own_keys),
            )
        )
        self.index = torch.cat([slots, own], 1).flatten()

    def _of(self, column: Tensor) -> Tensor:
        return column[self.shape.row_begin : self.shape.row_end]

    def _take(self, laid_out: Tensor) -> Tensor:
        of_tile = laid_out[:, :, self.shape.q_begin : self.shape.q_end]
        rows: Tensor = of_tile.unflatten(2, (-1, self.shape.queries))
        return rows

    def _write(self, laid_out: Tensor, rows: Tensor) -> None:
        self._take(laid_out).copy_(rows)

    def keys(self) -> Tensor:
        """The keys that rows read."""
        return self._read(self.rows.key).to(self.rows.compute)

    def values(self) -> Tensor:
        """The values that rows read."""
        return self._read(self.rows.value).to(self.rows.compute)

    def _read(self, readable: Tensor) -> Tensor:
        read = readable.index_select(2, self.index)
        by_row: Tensor = read.unflatten(2, (-1, self.shape.slots + self.shape.own_keys))
        return by_row

    def _places_of_keys(self) -> Tensor:
        return self._read(self.rows.key_places)

    def hide(self, scores: Tensor) -> None:
        """Hide padding, and the own keys that a query does not see."""
        shape, place = self.shape, self.rows.place
        seen = self.rows.layout.seen[:, shape.q_begin : shape.q_end, None]
        unseen = (place[: shape.own_keys] >= seen).unflatten(1, (-1, 1, shape.queries))
        own_scores = scores.unflatten(3, (-1, shape.queries))[..., shape.slots :]
        own_scores.masked_fill_(unseen, -math.inf)
        if shape.fewest_slots < shape.slots:
            uneven = slice(shape.fewest_slots, shape.slots)
            missing = place[uneven] >= self._of(self.rows.layout.slots)
            scores[..., uneven].masked_fill_(missing[:, None], -math.inf)

    def add(self, gradient: Gradient, rows: Tensor) -> None:
        """Add to slots and own keys at once."""
        (read,) = gradient.read
        read.index_add_(2, self.index, rows.flatten(2, 3))
