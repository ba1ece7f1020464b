"""A pass over a plan's table: its rows, one tile at a time, and the keys that they read.

A tile is a batch of m rows that are treated as equal: r queries each, and N keys each, which are
slots and then own keys. `stacked.py` and `padded.py` choose which rows form one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.backends.dropout import Dropout, factors
from colonnade.backends.tracing.device import kept_on_device
from colonnade.plan.places import Places
from colonnade.plan.table import Plan
from colonnade.shapes import Gather, Key


class Dropped(NamedTuple):
    """The dropout of some key heads, and where their queries and keys are."""

    dropout: Dropout
    places: Places
    heads: range
    """Numbers of the key heads."""
    group: int
    """Query heads of each key head."""


class Placed(NamedTuple):
    """`Places` laid out as the queries, keys and slots are that they belong to."""

    document: Tensor
    query: Tensor
    key: Tensor
    slot: Tensor


class Gradient(NamedTuple):
    """The gradient of keys, or of values, while tiles add to it."""

    slots: Tensor
    keys: Tensor
    """[B, Hkv, Tk, D], what keys get that are no slots."""
    read: tuple[Tensor, ...]
    """The tensors that tiles add to: `slots` and `keys`, or one of which both are views."""


class Rows(ABC):
    """All rows of a plan, with the keys and values that they read.

    Tensors of queries are laid out before the first tile, [B, Hq, P, D], and what tiles have
    written is taken out again after the last one.
    """

    def __init__(self, plan: Plan, key: Key, dropped: Dropped | None) -> None:
        self.own_from_slots = plan.own_from_slots
        self.plan = plan
        self.dropped = dropped
        self.compute = torch.promote_types(key.dtype, torch.float32)
        self.batch, self.kv_heads = key.shape[:2]
        self.index = kept_on_device(key.device, _gather, plan)[None, :, :, None]

    @abstractmethod
    def tiles(self) -> Iterator[Tile]:
        """Yield all tiles, in every pass the same ones in the same order."""

    def lay_out(self, tensor: Tensor, padding: float | None = None) -> Tensor:
        """Lay [B, Hq, Tq, D] out as tiles take it; `padding` is written where there is no query."""
        return tensor

    def take_out(self, laid_out: Tensor) -> Tensor:
        """Return [B, Hq, Tq, D] of what was laid out."""
        return laid_out

    @cached_property
    def placed(self) -> Placed:
        """The places of queries and keys, where weights are dropped."""
        assert self.dropped is not None
        device = self.index.device
        document, query, key, slot = kept_on_device(device, _placed, self.plan, self.dropped.places)
        return Placed(
            self.lay_out(document), self.lay_out(query), key.expand(-1, self.kv_heads, -1, -1), slot
        )

    @abstractmethod
    def gradient(self, tensor: Tensor) -> Gradient:
        """Return zeros for the gradient of the keys or of the values."""

    def total(self, gradient: Gradient) -> Tensor:
        """Return the sum of what keys got, as slots and otherwise."""
        index = self.index.expand_as(gradient.slots)
        return gradient.keys.scatter_add_(2, index, gradient.slots)


class Tile(ABC):
    """Some rows as one batch."""

    rows: Rows

    def queries(self, laid_out: Tensor) -> Tensor:
        """Queries as [B, Hkv, m, G·r, D]: the query heads of a key head stacked."""
        rows = self._take(laid_out).to(self.rows.compute)
        stacked: Tensor = rows.unflatten(1, (self.rows.kv_heads, -1)).transpose(2, 3).flatten(3, 4)
        return stacked

    def factors(self) -> Tensor | None:
        """The factors [B, Hkv, m, G·r, N] of the weights; None if nothing is dropped."""
        dropped = self.rows.dropped
        if dropped is None:
            return None
        placed, (heads, group) = self.rows.placed, dropped[2:]
        # Stacked as `queries` stacks them.
        document, query = (self._take(each)[..., 0].repeat(1, 1, 1, group) for each in placed[:2])
        device, length = query.device, query.shape[3] // group
        kv_head = torch.arange(heads.start, heads.stop, heads.step, device=device)
        head = kv_head[:, None] * group + torch.arange(group, device=device)
        row = torch.arange(self.rows.batch, device=device)[:, None, None, None] + document
        head = head.repeat_interleave(length, 1)[:, None]
        return factors(dropped.dropout, row, head[None], query, self._places_of_keys()[..., 0])

    def put(self, laid_out: Tensor, rows: Tensor) -> None:
        """Write [B, Hkv, m, G·r, D] where `queries` reads."""
        group = laid_out.shape[1] // rows.shape[1]
        self._write(laid_out, rows.unflatten(3, (group, -1)).transpose(2, 3).flatten(1, 2))

    @abstractmethod
    def _take(self, laid_out: Tensor) -> Tensor:
        """Queries as [B, Hq, m, r, D]."""

    @abstractmethod
    def _write(self, laid_out: Tensor, rows: Tensor) -> None:
        """Write [B, Hq, m, r, D] where `_take` reads."""

    @abstractmethod
    def keys(self) -> Tensor:
        """The keys [B, Hkv, m, N, D] that rows read."""

    @abstractmethod
    def values(self) -> Tensor:
        """The values [B, Hkv, m, N, D] that rows read."""

    @abstractmethod
    def _places_of_keys(self) -> Tensor:
        """The positions [1, Hkv, m, N, 1] of the keys that rows read."""

    @abstractmethod
    def hide(self, scores: Tensor) -> None:
        """Write -inf into [B, Hkv, m, G·r, N] where a query does not read a key."""

    @abstractmethod
    def add(self, gradient: Gradient, rows: Tensor) -> None:
        """Add [B, Hkv, m, N, D] to the gradient of the keys, or values, that rows read."""


def _gather(plan: Plan) -> Gather:
    return plan.gather


def _placed(plan: Plan, places: Places) -> Placed:
    document, query = (each[None, None, :, None] for each in (places.document, places.query))
    key, slot = (each[None, :, :, None] for each in (places.key, places.slots(plan.gather)))
    return Placed(document, query, key, slot)
