"""Fixed patterns in plain PyTorch: one operation to a compiler, a loop over tiles of rows.

A row of a plan is two matrix products around one softmax over [slots ; own keys]. Rows are computed
together as a tile, on CPUs those of one shape and elsewhere those of similar shapes. The backward
computes the scores again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from colonnade.backends.call import Call, in_order, only_heads
from colonnade.backends.dropout import DROPOUT_SCHEMA, Dropout, multiply_
from colonnade.backends.eager.padded import PaddedRows
from colonnade.backends.eager.rows import Dropped, Rows
from colonnade.backends.eager.stacked import StackedRows
from colonnade.backends.planning import (
    PLAN_SCHEMA,
    PlanOptions,
    count_pairs,
    make_places,
    make_plan,
)
from colonnade.backends.tracing.operation import LSE, define_attention
from colonnade.plan.table import Plan, heads_by_plan
from colonnade.shapes import Key, LogSumExp, Output, Query, Value


def attend(query: Query, key: Key, value: Value, call: Call) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over what a fixed pattern reads, and the log of its denominator."""
    return _attend(query, key, value, *PlanOptions.of(call), call.scale, *call.dropout)


class _Group(NamedTuple):
    """Key heads that share a plan, with everything that is asked of them."""

    heads: range
    plan: Plan
    scale: float
    dropped: Dropped | None


def _groups(query: Tensor, key: Tensor, options: tuple[Any, ...]) -> list[_Group]:
    num_sets = len(PlanOptions._fields)
    given, scale = PlanOptions(*options[:num_sets]), options[num_sets]
    dropout, lengths = Dropout(*options[num_sets + 1 :]), (query.shape[2], key.shape[2])
    groups = []
    for heads in heads_by_plan(given.pattern, key.shape[1]):
        plan = make_plan(given, *lengths, heads)
        dropped = None
        if dropout.p > 0:
            group = query.shape[1] // key.shape[1]
            dropped = Dropped(dropout, make_places(given, *lengths, heads), heads, group)
        groups.append(_Group(heads, plan, scale, dropped))
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


def _rows(group: _Group, query: Tensor, key: Tensor, value: Tensor) -> Rows:
    """A CPU wants tiles that fit into its caches, every other device few launches."""
    way = StackedRows if query.device.type == "cpu" else PaddedRows
    return way(group.plan, query, key, value, group.dropped)


def _forward_of(group: _Group, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(group, query, key, value)
    query = rows.lay_out(query)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full((*query.shape[:3], 1), -math.inf, dtype=rows.compute)
    for tile in rows.tiles():
        q = tile.queries(query).mul(group.scale)
        scores = q @ tile.keys().mT
        tile.hide(scores)
        peak = scores.amax(-1, keepdim=True)
        # A row that reads nothing: weights 0, denominator 0, output 0, lse -inf.
        peak.masked_fill_(peak == -math.inf, 0.0)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        multiply_(weights, tile.factors())
        result = (weights @ tile.values()).div_(total.masked_fill(total == 0, 1.0))
        tile.put(out, result)
        tile.put(lse, peak + total.log())
    return rows.take_out(out), rows.take_out(lse)[..., 0]


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
    rows = _rows(group, query, key, value)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    query, grad_out, grad_lse = map(rows.lay_out, (query, grad_out, grad_lse[..., None]))
    lse = rows.lay_out(lse[..., None], padding=math.inf)  # There all weights are 0.
    grad_query = query.new_zeros(query.shape)
    grad_key, grad_value = rows.gradient(key), rows.gradient(value)
    for tile in rows.tiles():
        q = tile.queries(query).mul(group.scale)
        k, v = tile.keys(), tile.values()
        scores = q @ k.mT
        tile.hide(scores)
        weights = scores.sub_(tile.queries(lse)).exp_()
        d_out = tile.queries(grad_out)
        kept = tile.factors()
        d_value = (weights if kept is None else weights * kept).mT @ d_out
        d_weights = multiply_(d_out @ v.mT, kept)
        # delta = sum_j P_ij dP_ij: the whole row is at hand, so the rounded output is not needed.
        delta = (weights * d_weights).sum(-1, keepdim=True)
        delta -= tile.queries(grad_lse)
        d_scores = d_weights.sub_(delta).mul_(weights)
        d_key = d_scores.mT @ q
        tile.put(grad_query, (d_scores @ k).mul_(group.scale))
        tile.add(grad_key, d_key)
        tile.add(grad_value, d_value)
    return (
        rows.take_out(grad_query),
        rows.total(grad_key).to(key.dtype).contiguous(),
        rows.total(grad_value).to(value.dtype).contiguous(),
    )


_attend = define_attention(
    "colonnade::eager",
    f"{PLAN_SCHEMA}, float scale, {DROPOUT_SCHEMA}",
    _forward,
    _backward,
    LSE,
    count_pairs,
)
