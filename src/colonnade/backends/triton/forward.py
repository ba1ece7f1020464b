"""The kernel of the forward: a program for each piece of a row of the table, and each query head.

It reads whole tiles of slots, then the slots that are left over, then the own keys under the
triangle, in one online softmax in base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from colonnade.backends.triton.dropout import (
    draws_of,
    kept_own_keys,
    kept_slots,
    keys_of_tile,
    only_kept,
    scaled,
)
from colonnade.backends.triton.tiles import (
    COUNTS,
    load,
    load_whole,
    of_head,
    of_query_head,
    piece_of_program,
    product,
    sees,
    store,
    store_each,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=COUNTS)
def attend_pieces(
    query,
    key,
    value,
    slot_key,
    slot_value,
    out,
    lse,
    pieces,
    shift,
    num_pieces,
    heads,
    scale_log2,
    dropped,
    S: tl.constexpr,
):
    """Compute output and log-sum-exp of one piece.

    Queries, output and log-sum-exp are [batch, heads, group, q_len, …], keys, values and slots
    [batch, heads, positions, …]. `pieces` is `work.pieces`, `shift` that of the plan. The scale has
    a factor log2(e), for exponentials in base 2. `dropped` is a `dropout.Dropped`, or None.
    """
    piece = piece_of_program(pieces, shift, num_pieces, heads, S)
    batch, head, member = piece.batch, piece.head, piece.member
    slot_begin, slot_end = piece.slot_begin, piece.slot_end
    own_begin, own_end = piece.own_begin, piece.own_end

    r = tl.arange(0, S.queries)
    n = keys_of_tile(S)
    row = piece.q_begin + r
    is_row = row < piece.q_end
    q = load(of_query_head(query, batch, head, member), row, is_row, S.qk_dim, S.qk_width)
    draws = draws_of(dropped, batch, head, member, row, is_row)
    peak = tl.full([S.queries], float("-inf"), tl.float32)
    total = tl.full([S.queries], 0.0, tl.float32)
    acc = tl.full([S.queries, S.v_width], 0.0, tl.float32)

    keys = of_head(slot_key, batch, head)
    values = of_head(slot_value, batch, head)
    whole = slot_begin + (slot_end - slot_begin) // S.keys * S.keys
    for at in tl.range(slot_begin, whole, S.keys):
        k = load_whole(keys, at + n, S.qk_dim, S.qk_width)
        v = load_whole(values, at + n, S.v_dim, S.v_width)
        scores = product(q, tl.trans(k), S) * scale_log2
        kept = kept_slots(draws, at, slot_end, S)
        acc, peak, total = _add(acc, peak, total, scores, v, kept, S)
    if whole < slot_end:
        there = whole + n < slot_end
        k = load(keys, whole + n, there, S.qk_dim, S.qk_width)
        v = load(values, whole + n, there, S.v_dim, S.v_width)
        scores = product(q, tl.trans(k), S) * scale_log2
        scores = tl.where(there[None, :], scores, float("-inf"))
        kept = kept_slots(draws, whole, slot_end, S)
        acc, peak, total = _add(acc, peak, total, scores, v, kept, S)

    keys = of_head(key, batch, head)
    values = of_head(value, batch, head)
    for at in tl.range(own_begin, piece.own_stop, S.keys):
        k = load(keys, at + n, at + n < own_end, S.qk_dim, S.qk_width)
        v = load(values, at + n, at + n < own_end, S.v_dim, S.v_width)
        scores = product(q, tl.trans(k), S) * scale_log2
        seen = sees(r, piece.first, at - own_begin + n, own_end - own_begin)
        scores = tl.where(seen, scores, float("-inf"))
        kept = kept_own_keys(draws, at, own_end, S)
        acc, peak, total = _add(acc, peak, total, scores, v, kept, S)

    # A query that reads nothing: output 0, log-sum-exp -inf.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = scaled(acc / total[:, None], dropped)
    store(of_query_head(out, batch, head, member), acc, row, is_row, S.v_dim, S.v_width)
    natural = tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN_2)
    store_each(of_query_head(lse, batch, head, member), natural, row, is_row)


@triton.jit
def _add(acc, peak, total, scores, v, kept, S: tl.constexpr):
    """Add a tile of scores, in base 2, and its values to the softmax so far.

    Weights that are dropped count in the denominator.
    """
    higher = tl.maximum(peak, tl.max(scores, 1))
    # Where nothing was seen yet the peak is -inf, and its difference from itself would be NaN.
    top = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - top[:, None])
    factor = tl.exp2(peak - top)
    total = total * factor + tl.sum(weights, 1)
    weights = only_kept(weights, kept)
    acc = acc * factor[:, None] + product(weights.to(v.dtype), v, S)
    return acc, higher, total
