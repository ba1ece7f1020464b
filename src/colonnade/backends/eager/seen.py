"""Queries that read all keys, or the marked ones: a decoder's token, and static caches.

The queries of a group share their keys, and none hides one from another: they are the rows of one
product, and no key is repeated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.backends.call import Call, Seen
from colonnade.backends.dropout import factors
from colonnade.backends.tracing.device import on_device
from colonnade.backends.tracing.operation import first_order, is_mapped, may_be_counted
from colonnade.shapes import Key, LogSumExp, Output, Query, SeenMask, Value

HALF = (torch.bfloat16, torch.float16)
ROWS = 4
"""A product with one row in half precision takes PyTorch's CPU kernel 2.5 times as long as this."""


def attend(
    query: Query, key: Key, value: Value, keys: Seen, call: Call
) -> tuple[Output, LogSumExp | None]:
    """softmax(scale · q kᵀ) v over the keys that are marked, 0 where there is none.

    Keys that are not marked must be finite, for PyTorch multiplies them by 0.
    """
    mask = keys.mask
    batch, heads, q_len, _ = query.shape
    if key.shape[2] == 0:
        compute = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_full((batch, heads, q_len), -math.inf, dtype=compute)
        return query.new_zeros(batch, heads, q_len, value.shape[3]), lse
    grouped = query.unflatten(1, (key.shape[1], -1))
    rows = grouped.flatten(2, 3)
    empty = None
    if mask is not None:
        some = mask.any(-1, keepdim=True)
        # A softmax over nothing would be NaN: such a query reads everything, and is set aside.
        mask, empty = mask | ~some, ~some
        if mask.shape[2] > 1:  # The mask of a single query is broadcast over its group.
            mask, empty = (
                t[:, :, None].expand(*grouped.shape[:4], -1).flatten(2, 3) for t in (mask, empty)
            )
    products = (
        call.return_lse
        or call.dropout.p > 0
        or (key.device.type == "cpu" and (may_be_counted() or is_mapped(query, key, value)))
    )
    lse_of_rows: Tensor | None
    if products:
        kept = _factors(keys, grouped, call) if call.dropout.p > 0 else None
        out, lse_of_rows = _in_two_products(rows, key, value, mask, call.scale, kept)
    else:
        out, lse_of_rows = _in_pytorchs_kernel(rows, key, value, mask, call.scale), None
    if empty is not None:
        out = out.masked_fill(empty, 0.0)
        if lse_of_rows is not None:
            lse_of_rows = lse_of_rows.masked_fill(empty[..., 0], -math.inf)
    by_head = grouped.shape[2:4]
    out = out.unflatten(2, by_head).flatten(1, 2)
    if lse_of_rows is None:
        return out, None
    return out, lse_of_rows.unflatten(2, by_head).flatten(1, 2)


def _factors(keys: Seen, grouped: Tensor, call: Call) -> Tensor:
    """Return the factors of the weights of queries [batch, kv_heads, group, q_len, …], as rows."""
    assert keys.query is not None
    assert keys.key is not None
    batch, kv_heads, group = grouped.shape[:3]
    device = grouped.device
    row = torch.arange(batch, device=device)[:, None, None, None]
    head = torch.arange(kv_heads * group, device=device).view(1, kv_heads, group, 1)
    query = on_device(keys.query, device)[:, None, None]
    key = on_device(keys.key, device)[:, :, None]
    return factors(call.dropout, row, head, query, key).flatten(2, 3)


def _in_pytorchs_kernel(
    rows: Tensor, key: Tensor, value: Tensor, mask: SeenMask | None, scale: float
) -> Tensor:
    """It gives no log-sum-exp, and drops other weights."""
    wanted = rows.shape[2]
    if wanted == 1 and rows.dtype in HALF and rows.device.type == "cpu":
        rows = rows.repeat(1, 1, ROWS, 1)
    rows, key, value = first_order(rows, key, value)
    out: Tensor = F.scaled_dot_product_attention(rows, key, value, mask, scale=scale)
    return first_order(out)[0][:, :, :wanted]


def _in_two_products(
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SeenMask | None,
    scale: float,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`kept` holds the factors of the weights, None if nothing is dropped."""
    compute = torch.promote_types(rows.dtype, torch.float32)
    scores = rows.to(compute) @ key.to(compute).mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1)
    if kept is not None:
        weights = weights * kept
    return (weights @ value.to(compute)).to(rows.dtype), scores.logsumexp(-1)
