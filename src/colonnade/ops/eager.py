"""Backend "eager": a plan in plain PyTorch, on any device, in any floating type and width.

One operation for the compiler, a loop over the plan's rows inside. A row is two matrix products
around one softmax over [slots ; own keys]; the backward computes the scores anew. Nothing grows
like n². Scores, weights and all gradients are kept in float32 for half-precision inputs (in
float64 for float64); only results are rounded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from colonnade.ops.autocast import without_autocast
from colonnade.pattern import FixedPattern
from colonnade.plan import Row, fixed_plan, table_rows
from colonnade.shapes import Key, LogSumExp, Output, Query, Value


def declines(query: Query, key: Key, value: Value, pattern: object) -> str | None:
    """Why this backend does not take these inputs, or None if it does."""
    if not isinstance(pattern, FixedPattern):
        return f"runs FixedPattern only, got a {type(pattern).__name__}"
    if not pattern.causal:
        return "runs causal patterns only, got causal=False"
    return None


def attend(
    query: Query, key: Key, value: Value, pattern: FixedPattern, scale: float
) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over the plan's rows, and the log of its denominator."""
    plan = fixed_plan(pattern, query.shape[2], key.shape[2], key.shape[1], query.device)
    out, lse = _forward(
        query, key, value, plan.gather, plan.table, plan.shift, plan.own_from_slots, scale
    )
    return out, lse


class _Tiles:
    """The operands of one row after another, in the type that is computed in."""

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

    def queries(self, tensor: Tensor, row: Row) -> Tensor:
        """A row of [B, Hq, Tq, D] as [B, Hkv, G·r, D]: the query heads of a key head stacked."""
        num_kv_heads = self.slot_key.shape[1]
        rows = tensor[:, :, row.q_begin : row.q_end].to(self.compute)
        stacked: Tensor = rows.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
        return stacked

    def keys(self, row: Row) -> Tensor:
        """The keys [B, Hkv, w, D] that a row reads: its slots, then its own."""
        return self._read(self.slot_key, self.own_key, row)

    def values(self, row: Row) -> Tensor:
        """The values [B, Hkv, w, D] that a row reads: its slots, then its own."""
        return self._read(self.slot_value, self.own_value, row)

    def _read(self, slots: Tensor, own: Tensor, row: Row) -> Tensor:
        own_part = own[:, :, row.own_begin : row.own_end].to(self.compute)
        return torch.cat([slots[:, :, row.slot_begin : row.slot_end], own_part], 2)

    def scores(self, query: Tensor, key: Tensor, row: Row) -> Tensor:
        """q kᵀ of a row, -inf at the own keys that a query does not see; q is scaled already."""
        scores = query @ key.mT
        by_group = scores.unflatten(2, (-1, row.q_end - row.q_begin))
        own_scores = by_group[..., row.slot_end - row.slot_begin :]
        own_scores.masked_fill_(self._hidden(row), -math.inf)
        return scores

    def _hidden(self, row: Row) -> Tensor:
        """[Hkv, 1, r, own keys], True where a query does not see a key; alike for most rows."""
        shape = (row.q_end - row.q_begin, row.own_end - row.own_begin, row.lead)
        if shape not in self.hidden_of:
            queries, own_keys, lead = shape
            last_seen = torch.arange(queries, device=self.shift.device)[:, None] + lead - self.shift
            own = torch.arange(own_keys, device=self.shift.device)
            self.hidden_of[shape] = (own > last_seen)[:, None]
        return self.hidden_of[shape]


def _ungroup(rows: Tensor, num_heads: int) -> Tensor:
    """[B, Hkv, G·r, …] back to [B, Hq, r, …]."""
    groups = num_heads // rows.shape[1]
    by_head: Tensor = rows.unflatten(2, (groups, -1)).flatten(1, 2)
    return by_head


# The schemas are spelled out: read off annotations they would depend on who wraps the functions.
_PLAN = "Tensor gather, Tensor table, Tensor shift, bool own_from_slots, float scale"
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
) -> tuple[Tensor, Tensor]:
    tiles = _Tiles(key, value, gather, shift, own_from_slots)
    num_heads = query.shape[1]
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=tiles.compute)
    for row in table_rows(table):
        scores = tiles.scores(tiles.queries(query, row).mul(scale), tiles.keys(row), row)
        peak = scores.amax(-1, keepdim=True)
        # A row that reads nothing: weights 0, denominator 0, output 0, lse -inf.
        peak.masked_fill_(peak == -math.inf, 0.0)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        result = (weights @ tiles.values(row)).div_(total.masked_fill(total == 0, 1.0))
        out[:, :, row.q_begin : row.q_end] = _ungroup(result, num_heads)
        lse[:, :, row.q_begin : row.q_end] = _ungroup(peak + total.log(), num_heads)[..., 0]
    return out, lse


@_forward.register_fake
def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, *plan_and_scale: Any
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(query.shape[:3], dtype=compute),
    )


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
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _Tiles(key, value, gather, shift, own_from_slots)
    num_heads = query.shape[1]
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = (x.new_zeros(x.shape, dtype=tiles.compute) for x in (key, value))
    grad_slot_key = torch.zeros_like(tiles.slot_key)
    grad_slot_value = torch.zeros_like(tiles.slot_value)
    grad_own_key = grad_slot_key if own_from_slots else grad_key
    grad_own_value = grad_slot_value if own_from_slots else grad_value
    for row in table_rows(table):
        num_slots = row.slot_end - row.slot_begin
        q = tiles.queries(query, row).mul(scale)
        k, v = tiles.keys(row), tiles.values(row)
        row_lse = tiles.queries(lse[..., None], row)
        row_lse = row_lse.masked_fill(row_lse == -math.inf, 0.0)
        weights = tiles.scores(q, k, row).sub_(row_lse).exp_()
        d_out = tiles.queries(grad_out, row)
        d_value = weights.mT @ d_out
        d_weights = d_out @ v.mT
        # delta = sum_j P_ij dP_ij: the whole row is at hand, so the rounded output is not needed.
        delta = (weights * d_weights).sum(-1, keepdim=True)
        delta -= tiles.queries(grad_lse[..., None], row)
        d_scores = d_weights.sub_(delta).mul_(weights)
        d_key = d_scores.mT @ q
        grad_query[:, :, row.q_begin : row.q_end] = _ungroup((d_scores @ k).mul_(scale), num_heads)
        for grad_slots, grad_own, d in (
            (grad_slot_key, grad_own_key, d_key),
            (grad_slot_value, grad_own_value, d_value),
        ):
            grad_slots[:, :, row.slot_begin : row.slot_end] += d[:, :, :num_slots]
            grad_own[:, :, row.own_begin : row.own_end] += d[:, :, num_slots:]
    index = gather[None, :, :, None]
    grad_key.scatter_add_(2, index.expand_as(grad_slot_key), grad_slot_key)
    grad_value.scatter_add_(2, index.expand_as(grad_slot_value), grad_slot_value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@_backward.register_fake
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, gather, table, shift, ctx.own_from_slots, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, output[1], gather, table, shift)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, lse, gather, table, shift = ctx.saved_tensors
    plan = (gather, table, shift, ctx.own_from_slots)
    # The caller's autocast would run the float32 products in half precision.
    with without_autocast(grad_out.device.type):
        grads = _backward(grad_out, grad_lse, query, key, value, lse, *plan, ctx.scale)
    return (*grads, None, None, None, None, None)


torch.library.register_autograd(
    "colonnade::eager_forward", _gradients, setup_context=_setup_context
)
