"""Attention of new queries over the entries that a cache keeps: [slots | tail].

A single query of a decoder reads a run of them that has no gap, in nearly all cases: attention
over a part of the buffer, in C++ where that runs, else by PyTorch. Chunks go through the plan.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from colonnade.backends import native
from colonnade.ops.attention import attention, attention_reduced
from colonnade.backends.tracing.autocast import cast_as_autocast_would, without_autocast
from colonnade.pattern import FixedPattern, Pattern
from colonnade.plan.kept import last_reads, last_span, num_slots
from colonnade.plan.lines import num_blocks
from colonnade.shapes import Key, Output, Query, Value

HALF = (torch.bfloat16, torch.float16)
ROWS = 4
"""A product with one row in half precision takes PyTorch's CPU kernel 2.5 times as long as this."""


def attend_held(
    query: Query,
    key: Key,
    value: Value,
    pattern: Pattern,
    seq_len: int,
    begin: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Output:
    """The last queries of `seq_len` positions, of which all rows keep the same.

    Args:
        query: [batch, heads, q_len, qk_dim].
        key: [batch, kv_heads, kept, qk_dim]: the summaries of the blocks before position `begin`,
            then all positions from there on.
        value: [batch, kv_heads, kept, v_dim].
        pattern: Causal.
        seq_len: Positions, the queries included.
        begin: Where the tail begins.
        scale: Factor on the scores; 1/sqrt(qk_dim) if None.
        dropout_p: Share of the weights that is dropped.
    """
    if query.shape[2] == 1:
        span = last_span(pattern, seq_len, begin, key.shape[1])
        if span is not None:
            if len(span) < key.shape[2]:
                key, value = (t[:, :, span.start : span.stop] for t in (key, value))
            return _attend(query, key, value, scale, dropout_p)
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    if num_slots(pattern, begin) == 0:
        # Blocks and windows do not notice that positions before the tail are gone.
        out = attention(query, key, value, pattern, **options)
        assert isinstance(out, Tensor)
        return out
    assert isinstance(pattern, FixedPattern)
    reduced = num_blocks(begin, pattern.stride)
    return attention_reduced(query, key, value, pattern, reduced, **options)


def attend_last(
    query: Query,
    key: Key,
    value: Value,
    pattern: Pattern,
    seq_lens: list[int],
    begins: list[int],
    is_token: Bool[Tensor, " batch"],
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Output:
    """One query a row, where rows keep different numbers of entries; else as `attend_held`.

    A row whose query is no token, or reads nothing, gives 0. What lies behind a row's entries must
    be finite.
    """
    lengths = torch.tensor(seq_lens), torch.tensor(begins)
    reads = last_reads(pattern, *lengths, key.shape[2], key.shape[1]).to(query.device)
    reads = reads & is_token[:, None, None]
    return _attend(query, key, value, scale, dropout_p, reads[:, :, None])


def attend_positions(
    query: Query,
    key: Key,
    value: Value,
    pattern: Pattern,
    query_position: Int[Tensor, "batch q_len"],
    key_position: Int[Tensor, "batch kv_len"],
    is_token: Bool[Tensor, "batch kv_len"],
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Output:
    """Queries over keys whose positions are known as numbers only: dense, under a mask.

    For a buffer whose size does not say how much of it is filled, where a compiler may not look.
    """
    q, k = query_position[:, :, None], key_position[:, None]
    of_heads = [pattern.reads(q, k, head) & is_token[:, None] for head in range(key.shape[1])]
    return _attend(query, key, value, scale, dropout_p, torch.stack(of_heads, 1))


def _attend(
    query: Query,
    key: Key,
    value: Value,
    scale: float | None,
    dropout_p: float,
    reads: Bool[Tensor, "batch kv_heads q_len kept"] | None = None,
) -> Output:
    """Queries over all keys, or those that they `read`; 0 where there is none."""
    query, key, value = cast_as_autocast_would(query, key, value)
    if dropout_p == 0 and native.decodes(query, key, value):
        return native.decode(query, key, value, None if reads is None else reads[:, :, 0], scale)
    if key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    if reads is None:
        return _dense(query, key, value, scale, dropout_p, None)
    some = reads.any(-1)
    # A softmax over nothing would be NaN: such a query reads everything, and is set aside.
    out = _dense(query, key, value, scale, dropout_p, reads | ~some[..., None])
    group = query.shape[1] // key.shape[1]
    return out.masked_fill(~some.repeat_interleave(group, 1)[..., None], 0.0)


def _dense(
    query: Query,
    key: Key,
    value: Value,
    scale: float | None,
    dropout_p: float,
    reads: Bool[Tensor, "batch kv_heads q_len kept"] | None,
) -> Output:
    """PyTorch's attention over all keys, or those that each query `reads`.

    The queries of a group share their keys, and none hides one from another: they are the rows of
    one product, and no key is repeated.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    if reads is not None and reads.shape[2] > 1:  # That of a single query is broadcast.
        reads = reads[:, :, None].expand(*grouped.shape[:4], -1).flatten(2, 3)
    rows = grouped.flatten(2, 3)
    wanted = rows.shape[2]
    if wanted == 1 and query.dtype in HALF and query.device.type == "cpu":
        rows = rows.repeat(1, 1, ROWS, 1)
    with without_autocast(query.device.type):
        out = scaled_dot_product_attention(rows, key, value, reads, dropout_p, scale=scale)
    found: Tensor = out[:, :, :wanted].unflatten(2, grouped.shape[2:4])
    return found.flatten(1, 2)
