"""Fixed patterns in plain PyTorch: one operation to a compiler, a loop over the plan's rows.

A row is two matrix products around one softmax over [slots ; own keys]; rows of one shape are
computed together as a tile, and the backward computes the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colonnade.backends.call import Call, Seen, in_order, only_heads
from colonnade.backends.eager.dropout import Dropout, draw_seeds
from colonnade.backends.planning import PLAN_SCHEMA, PlanOptions, count_pairs, make_plan
from colonnade.backends.tracing.memo import remembered
from colonnade.backends.tracing.operation import LSE, define_attention
from colonnade.pattern import FixedPattern
from colonnade.plan.table import Plan, Row, heads_by_plan, table_rows
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

STACKED_SCORES = 2**19
"""Scores of rows of one shape that are computed together: some MB, which fit into a cache."""


def attend(
    query: Query, key: Key, value: Value, pattern: FixedPattern, call: Call
) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over what a fixed pattern reads, and the log of its denominator."""
    seeds = draw_seeds(call.dropout_p, len(heads_by_plan(pattern, key.shape[1])))
    p, keys = pattern, call.keys
    assert not isinstance(keys, Seen)
    sets = p.stride, p.summary, p.subblocks, p.part, p.causal, keys.reduced, keys.cu_seqlens
    return _attend(query, key, value, *sets, call.scale, call.dropout_p, seeds)


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
    return torch.tensor(begins, device="cpu")[:, None] + torch.arange(length, device="cpu")


class _Operands:
    """The operands of one tile after another, in the type that is computed in."""

    def __init__(self, key: Tensor, value: Tensor, plan: Plan) -> None:
        self.hidden_of: dict[tuple[int, int, int], Tensor] = {}
        self.compute = torch.promote_types(key.dtype, torch.float32)
        self.index = plan.gather.to(key.device)[None, :, :, None]
        self.slot_key = key.take_along_dim(self.index, 2).to(self.compute)
        self.slot_value = value.take_along_dim(self.index, 2).to(self.compute)
        self.own_key = self.slot_key if plan.own_from_slots else key
        self.own_value = self.slot_value if plan.own_from_slots else value
        self.shift = plan.shift.to(key.device)[:, None, None]

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


class _Group(NamedTuple):
    """Key heads that share a plan, with everything that is asked of them."""

    heads: range
    plan: Plan
    scale: float
    dropout: Dropout


def _groups(query: Tensor, key: Tensor, options: tuple[Any, ...]) -> list[_Group]:
    *sets, scale, dropout_p, seeds = options
    given = PlanOptions(*sets)
    groups = []
    for index, heads in enumerate(heads_by_plan(given.pattern, key.shape[1])):
        plan = make_plan(given, query.shape[2], key.shape[2], heads)
        dropout = Dropout(dropout_p, None if seeds is None else seeds[index], query.device)
        groups.append(_Group(heads, plan, scale, dropout))
    return groups


def _by_groups(
    run: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    query: Tensor,
    key: Tensor,
    options: tuple[Any, ...],
) -> Any:
    """Run each group of key heads by itself, and put the results together."""
    groups = _groups(query, key, options)
    results = [
        run(group, *(only_heads(t, group.heads, key.shape[1]) for t in tensors)) for group in groups
    ]
    heads = [group.heads for group in groups]
    return tuple(in_order(parts, heads) for parts in zip(*results, strict=True))


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _by_groups(_forward_of, (query, key, value), query, key, options)
    return out, lse


def _forward_of(group: _Group, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    operands = _Operands(key, value, group.plan)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], -math.inf, dtype=operands.compute)
    for tile in _tiles(group.plan.table, query.shape[:2].numel(), STACKED_SCORES):
        q = operands.queries(query, tile).mul(group.scale)
        scores = operands.scores(q, operands.keys(tile), tile)
        peak = scores.amax(-1, keepdim=True)
        # A row that reads nothing: weights 0, denominator 0, output 0, lse -inf.
        peak.masked_fill_(peak == -math.inf, 0.0)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        weights *= group.dropout.factors(weights)
        result = (weights @ operands.values(tile)).div_(total.masked_fill(total == 0, 1.0))
        _put(out, tile.q_begin, result)
        _put(lse[..., None], tile.q_begin, peak + total.log())
    return out, lse


def _backward(*tensors_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Take what `_backward_of` takes, and the options."""
    tensors, options = tensors_and_options[:6], tensors_and_options[6:]
    d_query, d_key, d_value = _by_groups(_backward_of, tensors, tensors[2], tensors[3], options)
    return d_query, d_key, d_value


def _backward_of(
    group: _Group,
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _Operands(key, value, group.plan)
    grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (x.new_zeros(x.shape, dtype=operands.compute) for x in (key, value))
    grad_slot_key = torch.zeros_like(operands.slot_key)
    grad_slot_value = torch.zeros_like(operands.slot_value)
    own_from_slots = group.plan.own_from_slots
    grad_own_key = grad_slot_key if own_from_slots else grad_key
    grad_own_value = grad_slot_value if own_from_slots else grad_value
    for tile in _tiles(group.plan.table, query.shape[:2].numel(), STACKED_SCORES):
        q = operands.queries(query, tile).mul(group.scale)
        k, v = operands.keys(tile), operands.values(tile)
        lse_of_tile = operands.queries(lse[..., None], tile)
        lse_of_tile = lse_of_tile.masked_fill(lse_of_tile == -math.inf, 0.0)
        weights = operands.scores(q, k, tile).sub_(lse_of_tile).exp_()
        d_out = operands.queries(grad_out, tile)
        kept = group.dropout.factors(weights)
        d_value = (weights * kept).mT @ d_out
        d_weights = (d_out @ v.mT) * kept
        # delta = sum_j P_ij dP_ij: the whole row is at hand, so the rounded output is not needed.
        delta = (weights * d_weights).sum(-1, keepdim=True)
        delta -= operands.queries(grad_lse[..., None], tile)
        d_scores = d_weights.sub_(delta).mul_(weights)
        d_key = d_scores.mT @ q
        _put(grad_query, tile.q_begin, (d_scores @ k).mul_(group.scale))
        for grad_slots, grad_own, d in (
            (grad_slot_key, grad_own_key, d_key),
            (grad_slot_value, grad_own_value, d_value),
        ):
            _add(grad_slots, tile.slot_begin, d[..., : tile.slots, :])
            _add(grad_own, tile.own_begin, d[..., tile.slots :, :])
    index = operands.index
    grad_key.scatter_add_(2, index.expand_as(grad_slot_key), grad_slot_key)
    grad_value.scatter_add_(2, index.expand_as(grad_slot_value), grad_slot_value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


_attend = define_attention(
    "colonnade::eager",
    f"{PLAN_SCHEMA}, float scale, float dropout_p, Tensor? seeds",
    _forward,
    _backward,
    LSE,
    count_pairs,
)
