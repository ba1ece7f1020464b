"""Fixed patterns in plain PyTorch: one operation to a compiler, a loop over the plan's rows.

A row is two matrix products around one softmax over [slots ; own keys]; rows of one shape are
computed together as a tile, and the backward computes the scores again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.backends.call import Call, in_order, only_heads
from colonnade.backends.eager.dropout import Dropout, draw_seed
from colonnade.backends.tracing.memo import remembered
from colonnade.backends.tracing.operation import LSE, register
from colonnade.backends.tracing.planning import make_plan
from colonnade.pattern import FixedPattern
from colonnade.plan.table import Row, heads_by_plan, table_rows
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

STACKED_SCORES = 2**19
"""Scores of rows of one shape that are computed together: some MB, which fit into a cache."""


def attend(
    query: Query, key: Key, value: Value, pattern: FixedPattern, call: Call
) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over what a fixed pattern reads, and the log of its denominator."""
    num_kv_heads = key.shape[1]
    heads = heads_by_plan(pattern, num_kv_heads)
    outs, lses = [], []
    for group in heads:
        plan = make_plan(pattern, query.shape[2], key.shape[2], call.keys, group)
        q, k, v = (only_heads(t, group, num_kv_heads) for t in (query, key, value))
        out, lse = _forward(
            q,
            k,
            v,
            plan.gather.to(key.device),
            plan.table,
            plan.shift,
            plan.own_from_slots,
            call.scale,
            call.dropout_p,
            draw_seed(call.dropout_p),
        )
        outs.append(out)
        lses.append(lse)
    return in_order(outs, heads), in_order(lses, heads)


class _Tile(NamedTuple):
    """Rows of one shape that are computed together: r queries, s slots and w own keys each."""

    q_begin: list[int]
    own_begin: list[int]
    slot_begin: list[int]
    queries: int
    own_keys: int
    slots: int
    lead: int


@remembered
def _tiles(table: Tensor, heads: int, most_scores: int) -> list[_Tile]:
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
    tiles = []
    for (queries, own_keys, slots, lead), rows in by_shape.items():
        together = max(most_scores // max(heads * queries * (own_keys + slots), 1), 1)
        for first in range(0, len(rows), together):
            some = rows[first : first + together]
            q_begin, own_begin, slot_begin = (
                [getattr(row, f"{of}_begin") for row in some] for of in ("q", "own", "slot")
            )
            tiles.append(_Tile(q_begin, own_begin, slot_begin, queries, own_keys, slots, lead))
    return tiles


def _take(tensor: Tensor, begins: list[int], length: int) -> Tensor:
    """Runs of `length` positions of [B, H, n, D], as [B, H, m, length, D]; a view if m is 1."""
    if len(begins) == 1:
        return tensor.narrow(2, begins[0], length)[:, :, None]
    return tensor[:, :, _positions(begins, length).to(tensor.device)]


def _add(tensor: Tensor, begins: list[int], rows: Tensor) -> None:
    """Add [B, H, m, length, D] where `_take` would read it."""
    length = rows.shape[3]
    if len(begins) == 1:
        tensor.narrow(2, begins[0], length).add_(rows[:, :, 0])
    else:
        index = _positions(begins, length).flatten().to(tensor.device)
        tensor.index_add_(2, index, rows.flatten(2, 3))


def _put(tensor: Tensor, begins: list[int], rows: Tensor) -> None:
    """Write [B, Hkv, m, G·length, D] of stacked query heads into [B, Hq, n, D]."""
    num_heads = tensor.shape[1]
    by_head = rows.unflatten(3, (num_heads // rows.shape[1], -1)).transpose(2, 3).flatten(1, 2)
    length = by_head.shape[3]
    if len(begins) == 1:
        tensor.narrow(2, begins[0], length).copy_(by_head[:, :, 0])
    else:
        tensor[:, :, _positions(begins, length).to(tensor.device)] = by_head.to(tensor.dtype)


def _positions(begins: list[int], length: int) -> Tensor:
    return torch.tensor(begins)[:, None] + torch.arange(length)


class _Operands:
    """The operands of one tile after another, in the type that is computed in."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        gather: Tensor,
        shift: Tensor,
        own_from_slots: bool,
    ) -> None:
        self.hidden_of: dict[tuple[int, int, int], Tensor] = {}
        self.compute = torch.promote_types(key.dtype, torch.float32)
        index = gather[None, :, :, None]
        self.slot_key = key.take_along_dim(index, 2).to(self.compute)
        self.slot_value = value.take_along_dim(index, 2).to(self.compute)
        self.own_key = self.slot_key if own_from_slots else key
        self.own_value = self.slot_value if own_from_slots else value
        self.shift = shift.to(key.device)[:, None, None]

    def queries(self, tensor: Tensor, tile: _Tile) -> Tensor:
        """Rows of [B, Hq, Tq, D] as [B, Hkv, m, G·r, D]: the query heads of a key head stacked."""
        num_kv_heads = self.slot_key.shape[1]
        rows = _take(tensor, tile.q_begin, tile.queries).to(self.compute)
        stacked: Tensor = rows.unflatten(1, (num_kv_heads, -1)).transpose(2, 3).flatten(3, 4)
        return stacked

    def keys(self, tile: _Tile) -> Tensor:
        """The keys [B, Hkv, m, s + w, D] that rows read: their slots, then their own."""
        return self._read(self.slot_key, self.own_key, tile)

    def values(self, tile: _Tile) -> Tensor:
        """The values [B, Hkv, m, s + w, D] that rows read: their slots, then their own."""
        return self._read(self.slot_value, self.own_value, tile)

    def _read(self, slots: Tensor, own: Tensor, tile: _Tile) -> Tensor:
        own_part = _take(own, tile.own_begin, tile.own_keys).to(self.compute)
        return torch.cat([_take(slots, tile.slot_begin, tile.slots), own_part], 3)

    def scores(self, query: Tensor, key: Tensor, tile: _Tile) -> Tensor:
        """q kᵀ of rows, -inf at the own keys that a query does not see; q is scaled already."""
        scores = query @ key.mT
        own_scores = scores.unflatten(3, (-1, tile.queries))[..., tile.slots :]
        own_scores.masked_fill_(self._hidden(tile), -math.inf)
        return scores

    def _hidden(self, tile: _Tile) -> Tensor:
        """[Hkv, 1, 1, r, w], True where a query does not see an own key; alike for most rows."""
        shape = (tile.queries, tile.own_keys, tile.lead)
        if shape not in self.hidden_of:
            queries, own_keys, lead = shape
            last_seen = torch.arange(queries, device=self.shift.device)[:, None] + lead - self.shift
            own = torch.arange(own_keys, device=self.shift.device)
            self.hidden_of[shape] = (own > last_seen)[:, None, None]
        return self.hidden_of[shape]


# The schemas are spelled out: read off annotations they would depend on who wraps the functions.
_PLAN = (
    "Tensor gather, Tensor table, Tensor shift, bool own_from_slots, float scale, "
    "float dropout_p, Tensor? seed"
)
_FORWARD = f"(Tensor query, Tensor key, Tensor value, {_PLAN}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor lse, "
    f"{_PLAN}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("colonnade::eager_forward", mutates_args=(), schema=_FORWARD)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gather: Tensor,
    table: Tensor,
    shift: Tensor,
    own_from_slots: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    operands = _Operands(key, value, gather, shift, own_from_slots)
    dropout = Dropout(dropout_p, seed, query.device)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], -math.inf, dtype=operands.compute)
    for tile in _tiles(table, query.shape[:2].numel(), STACKED_SCORES):
        scores = operands.scores(
            operands.queries(query, tile).mul(scale), operands.keys(tile), tile
        )
        peak = scores.amax(-1, keepdim=True)
        # A row that reads nothing: weights 0, denominator 0, output 0, lse -inf.
        peak.masked_fill_(peak == -math.inf, 0.0)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        weights *= dropout.factors(weights)
        result = (weights @ operands.values(tile)).div_(total.masked_fill(total == 0, 1.0))
        _put(out, tile.q_begin, result)
        _put(lse[..., None], tile.q_begin, peak + total.log())
    return out, lse


@torch.library.custom_op("colonnade::eager_backward", mutates_args=(), schema=_BACKWARD)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    gather: Tensor,
    table: Tensor,
    shift: Tensor,
    own_from_slots: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _Operands(key, value, gather, shift, own_from_slots)
    dropout = Dropout(dropout_p, seed, query.device)
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (x.new_zeros(x.shape, dtype=operands.compute) for x in (key, value))
    grad_slot_key = torch.zeros_like(operands.slot_key)
    grad_slot_value = torch.zeros_like(operands.slot_value)
    grad_own_key = grad_slot_key if own_from_slots else grad_key
    grad_own_value = grad_slot_value if own_from_slots else grad_value
    for tile in _tiles(table, query.shape[:2].numel(), STACKED_SCORES):
        q = operands.queries(query, tile).mul(scale)
        k, v = operands.keys(tile), operands.values(tile)
        lse_of_tile = operands.queries(lse[..., None], tile)
        lse_of_tile = lse_of_tile.masked_fill(lse_of_tile == -math.inf, 0.0)
        weights = operands.scores(q, k, tile).sub_(lse_of_tile).exp_()
        d_out = operands.queries(grad_out, tile)
        kept = dropout.factors(weights)
        d_value = (weights * kept).mT @ d_out
        d_weights = (d_out @ v.mT) * kept
        # delta = sum_j P_ij dP_ij: the whole row is at hand, so the rounded output is not needed.
        delta = (weights * d_weights).sum(-1, keepdim=True)
        delta -= operands.queries(grad_lse[..., None], tile)
        d_scores = d_weights.sub_(delta).mul_(weights)
        d_key = d_scores.mT @ q
        _put(grad_query, tile.q_begin, (d_scores @ k).mul_(scale))
        for grad_slots, grad_own, d in (
            (grad_slot_key, grad_own_key, d_key),
            (grad_slot_value, grad_own_value, d_value),
        ):
            _add(grad_slots, tile.slot_begin, d[..., : tile.slots, :])
            _add(grad_own, tile.own_begin, d[..., tile.slots :, :])
    index = gather[None, :, :, None]
    grad_key.scatter_add_(2, index.expand_as(grad_slot_key), grad_slot_key)
    grad_value.scatter_add_(2, index.expand_as(grad_slot_value), grad_slot_value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


register("colonnade::eager", _backward, LSE)
