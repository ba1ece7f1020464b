"""The kernels of the backward, without atomics: every sum is added up by one program, in order.

    grad_query_of_pieces  the gradients of queries, by pieces of rows of the table
    grad_of_slots         those of slots, by tiles of slots, over shares of the queries behind them
    grad_of_own_keys      those of keys, by tiles of own keys; adds what the slots have

Each computes its scores again, and the weights from the log-sum-exp. Under dropout a weight P has
the factor Z that it had forward:

    dV = (P Z)ᵀ dO    dS = P (Z dP - delta)    with dP = dO Vᵀ and delta = Σ dO O - dlse

Shapes are those of the forward.
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
    load_each,
    of_head,
    of_query_head,
    piece_of_program,
    product,
    sees,
    store,
    store_each,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=COUNTS)
def grad_query_of_pieces(
    query,
    key,
    value,
    slot_key,
    slot_value,
    out,
    lse,
    grad_out,
    grad_lse,
    grad_query,
    delta,
    pieces,
    shift,
    num_pieces,
    heads,
    scale,
    dropped,
    S: tl.constexpr,
):
    """Compute the gradients of one piece's queries, and delta = Σ dO O - dlse for other kernels."""
    piece = piece_of_program(pieces, shift, num_pieces, heads, S)
    batch, head, member = piece.batch, piece.head, piece.member
    slot_begin, slot_end = piece.slot_begin, piece.slot_end
    own_begin, own_end = piece.own_begin, piece.own_end

    r = tl.arange(0, S.queries)
    n = keys_of_tile(S)
    row = piece.q_begin + r
    is_row = row < piece.q_end
    q = load(of_query_head(query, batch, head, member), row, is_row, S.qk_dim, S.qk_width)
    o = load(of_query_head(out, batch, head, member), row, is_row, S.v_dim, S.v_width)
    d_o = load(of_query_head(grad_out, batch, head, member), row, is_row, S.v_dim, S.v_width)
    natural = load_each(of_query_head(lse, batch, head, member), row, is_row, float("-inf"))
    d_lse = load_each(of_query_head(grad_lse, batch, head, member), row, is_row, 0.0)
    difference = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1) - d_lse
    # 0 for a query that reads nothing, whatever gradient arrives.
    difference = tl.where(natural == float("-inf"), 0.0, difference)
    store_each(of_query_head(delta, batch, head, member), difference, row, is_row)
    draws = draws_of(dropped, batch, head, member, row, is_row)
    acc = tl.full([S.queries, S.qk_width], 0.0, tl.float32)

    keys = of_head(slot_key, batch, head)
    values = of_head(slot_value, batch, head)
    for at in tl.range(slot_begin, slot_end, S.keys):
        there = at + n < slot_end
        k = load(keys, at + n, there, S.qk_dim, S.qk_width)
        v = load(values, at + n, there, S.v_dim, S.v_width)
        weights = _weights(q, k, natural, there[None, :], scale, S)
        kept = kept_slots(draws, at, slot_end, S)
        d_scores = _grad_scores(weights, v, d_o, difference, kept, dropped, S)
        acc += product(d_scores.to(k.dtype), k, S)

    keys = of_head(key, batch, head)
    values = of_head(value, batch, head)
    for at in tl.range(own_begin, piece.own_stop, S.keys):
        k = load(keys, at + n, at + n < own_end, S.qk_dim, S.qk_width)
        v = load(values, at + n, at + n < own_end, S.v_dim, S.v_width)
        seen = sees(r, piece.first, at - own_begin + n, own_end - own_begin)
        weights = _weights(q, k, natural, seen, scale, S)
        kept = kept_own_keys(draws, at, own_end, S)
        d_scores = _grad_scores(weights, v, d_o, difference, kept, dropped, S)
        acc += product(d_scores.to(k.dtype), k, S)
    acc *= scale
    store(of_query_head(grad_query, batch, head, member), acc, row, is_row, S.qk_dim, S.qk_width)


@triton.jit(do_not_specialize=COUNTS)
def grad_of_slots(
    query,
    slot_key,
    slot_value,
    lse,
    grad_out,
    delta,
    key_sums,
    value_sums,
    tiles,
    slots_seen,
    num_tiles,
    heads,
    scale,
    dropped,
    S: tl.constexpr,
):
    """Sum the gradients of a tile of slots over one share of the queries that see some of it.

    The sums are [shares, batch, heads, slots, …] in float32, of the slots that are read. `tiles` is
    `work.slot_tiles`, and `slots_seen` says for each query before which slot those end that it
    sees.
    """
    tile = tiles + tl.program_id(0) % num_tiles * 5
    slot_begin = tl.load(tile)
    slot_end = tl.load(tile + 1)
    q_begin = tl.load(tile + 2)
    q_end = tl.load(tile + 3)
    share = tl.load(tile + 4)
    number = tl.program_id(0) // num_tiles
    head = number % heads
    batch = number // heads

    slot = slot_begin + keys_of_tile(S)
    is_slot = slot < slot_end
    k = load(of_head(slot_key, batch, head), slot, is_slot, S.qk_dim, S.qk_width)
    v = load(of_head(slot_value, batch, head), slot, is_slot, S.v_dim, S.v_width)
    acc_k = tl.full([S.keys, S.qk_width], 0.0, tl.float32)
    acc_v = tl.full([S.keys, S.v_width], 0.0, tl.float32)
    for member in tl.range(0, S.group):
        queries = of_query_head(query, batch, head, member)
        grads = of_query_head(grad_out, batch, head, member)
        lses = of_query_head(lse, batch, head, member)
        deltas = of_query_head(delta, batch, head, member)
        for at in tl.range(q_begin, q_end, S.queries):
            row = at + tl.arange(0, S.queries)
            ends = tl.load(slots_seen + row, mask=row < q_end, other=0)
            seen = (slot[None, :] < ends[:, None]) & is_slot[None, :]
            draws = draws_of(dropped, batch, head, member, row, row < q_end)
            kept = kept_slots(draws, slot_begin, slot_end, S)
            d_k, d_v = _grad_keys(
                queries, grads, lses, deltas, row, q_end, k, v, seen, scale, kept, dropped, S
            )
            acc_k += d_k
            acc_v += d_v
    sums = of_query_head(key_sums, share, batch, head)
    store(sums, acc_k * scale, slot, is_slot, S.qk_dim, S.qk_width)
    sums = of_query_head(value_sums, share, batch, head)
    store(sums, scaled(acc_v, dropped), slot, is_slot, S.v_dim, S.v_width)


@triton.jit(do_not_specialize=COUNTS)
def grad_of_own_keys(
    query,
    key,
    value,
    lse,
    grad_out,
    delta,
    key_sums,
    value_sums,
    grad_key,
    grad_value,
    partner,
    tiles,
    shares_of_slot,
    shift,
    num_tiles,
    heads,
    scale,
    dropped,
    OWN_FROM_SLOTS: tl.constexpr,
    S: tl.constexpr,
):
    """Compute the gradients of a tile of keys: those as own keys, and the sums of their slots.

    `key` and `value` hold the keys, or the slots if OWN_FROM_SLOTS. `tiles` is `work.own_tiles`.
    `partner` [batch, heads, keys] is the slot of each key, or the key of each slot, or -1 if there
    is none. Both sums are added in float32, and rounded once.
    """
    tile = tiles + tl.program_id(0) % num_tiles * 6
    key_begin = tl.load(tile)
    key_end = tl.load(tile + 1)
    own_begin = tl.load(tile + 2)
    lead = tl.load(tile + 3)
    q_begin = tl.load(tile + 4)
    q_end = tl.load(tile + 5)
    number = tl.program_id(0) // num_tiles
    head = number % heads
    batch = number // heads

    place = key_begin + keys_of_tile(S)
    is_key = place < key_end
    k = load(of_head(key, batch, head), place, is_key, S.qk_dim, S.qk_width)
    v = load(of_head(value, batch, head), place, is_key, S.v_dim, S.v_width)
    acc_k = tl.full([S.keys, S.qk_width], 0.0, tl.float32)
    acc_v = tl.full([S.keys, S.v_width], 0.0, tl.float32)
    # Query r of the row sees own keys before r + first.
    first = lead + 1 - tl.load(shift + head)
    begin = q_begin + tl.maximum(key_begin - own_begin - first + 1, 0)
    for member in tl.range(0, S.group):
        queries = of_query_head(query, batch, head, member)
        grads = of_query_head(grad_out, batch, head, member)
        lses = of_query_head(lse, batch, head, member)
        deltas = of_query_head(delta, batch, head, member)
        for at in tl.range(begin, q_end, S.queries):
            row = at + tl.arange(0, S.queries)
            seen = sees(row - q_begin, first, place - own_begin, key_end - own_begin)
            draws = draws_of(dropped, batch, head, member, row, row < q_end)
            kept = kept_own_keys(draws, key_begin, key_end, S)
            d_k, d_v = _grad_keys(
                queries, grads, lses, deltas, row, q_end, k, v, seen, scale, kept, dropped, S
            )
            acc_k += d_k
            acc_v += d_v
    acc_k *= scale
    acc_v = scaled(acc_v, dropped)

    other = load_each(of_head(partner, batch, head), place, is_key, -1)
    slot = place if OWN_FROM_SLOTS else other
    goal = other if OWN_FROM_SLOTS else place
    shares = tl.load(shares_of_slot + slot, mask=is_key & (slot >= 0), other=0)
    for share in tl.range(0, tl.max(shares, 0)):
        sums = of_query_head(key_sums, share, batch, head)
        acc_k += load(sums, slot, share < shares, S.qk_dim, S.qk_width)
        sums = of_query_head(value_sums, share, batch, head)
        acc_v += load(sums, slot, share < shares, S.v_dim, S.v_width)
    is_goal = is_key & (goal >= 0)
    store(of_head(grad_key, batch, head), acc_k, goal, is_goal, S.qk_dim, S.qk_width)
    store(of_head(grad_value, batch, head), acc_v, goal, is_goal, S.v_dim, S.v_width)


@triton.jit
def _grad_keys(
    query, grad_out, lse, delta, row, q_end, k, v, seen, scale, kept, dropped, S: tl.constexpr
):
    """Return what some queries of one head give to a tile of keys.

    That is d_k without the scale, and d_v without the factor of weights that are kept.
    """
    is_row = row < q_end
    q = load(query, row, is_row, S.qk_dim, S.qk_width)
    d_o = load(grad_out, row, is_row, S.v_dim, S.v_width)
    natural = load_each(lse, row, is_row, float("-inf"))
    difference = load_each(delta, row, is_row, 0.0)
    weights = _weights(q, k, natural, seen, scale, S)
    d_v = product(tl.trans(only_kept(weights, kept).to(d_o.dtype)), d_o, S)
    d_scores = _grad_scores(weights, v, d_o, difference, kept, dropped, S)
    d_k = product(tl.trans(d_scores.to(q.dtype)), q, S)
    return d_k, d_v


@triton.jit
def _weights(q, k, lse, seen, scale, S: tl.constexpr):
    """Return the weights [queries, keys] of a tile; 0 where a query does not see a key."""
    scores = product(q, tl.trans(k), S) * (scale * LOG2_E)
    # The log-sum-exp of a query that reads nothing is -inf; its weights are 0.
    base = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    return tl.exp2(tl.where(seen, scores - base[:, None], float("-inf")))


@triton.jit
def _grad_scores(weights, v, d_o, delta, kept, dropped, S: tl.constexpr):
    """Return the gradients [queries, keys] of the scores of a tile."""
    d_weights = scaled(only_kept(product(d_o, tl.trans(v), S), kept), dropped)
    return weights * (d_weights - delta[:, None])
