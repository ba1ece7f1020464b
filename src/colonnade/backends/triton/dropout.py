"""Dropout in the kernels: which weights of a tile are kept, by the seed and by where they are.

backends/dropout.py has the definition. Philox gives the words of four keys at once, a **quad**.
Where the keys of tiles lie in quads (`Shape.quads`), each is computed once for its four keys;
elsewhere it is computed for every key. The factor of weights that are kept comes last, on sums in
float32, so that no weight in half precision is above 1.

Functions marked with `triton.jit` run inside of a kernel. Without dropout `dropped` is None, and so
is everything that is made of it: nothing of all this is compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from colonnade.backends.triton.tiles import load_each, of_head

MULTIPLIER = tl.constexpr(0xD2511F53)
OTHER_MULTIPLIER = tl.constexpr(0xCD9E8D57)
KEY_STEP = tl.constexpr(0x9E3779B9)
OTHER_KEY_STEP = tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(7)
WORD = tl.constexpr(2**32 - 1)


class Dropped(NamedTuple):
    """The dropout of a call, as a kernel takes it."""

    seed: Any
    """The address of an int64 on the device."""
    document: Any
    """`Array` [q_len], the number of the document of each query."""
    query: Any
    """`Array` [q_len], the position of each query in its sequence."""
    own: Any
    """`Array` [batch, heads, positions], the position of each key; of each slot, if own keys are
    slots."""
    slot: Any
    """`Array` [batch, heads, slots], the position of the key that fills each slot."""
    threshold: Any
    """Words from this one on are kept: the bits of it, as an int32."""
    factor: Any
    """The factor of weights that are kept."""
    first_row: Any
    """Number of the first batch row, or document."""
    first_head: Any
    """Number of the first query head of the first key head."""
    heads_apart: Any
    """Query heads from the first of one key head to the first of the next."""
    first_position: Any
    """Position of the first key."""


class Draws(NamedTuple):
    """The counters of some queries of one head, without the keys, and where to find those."""

    seed: Any
    query: Any
    head: Any
    row: Any
    threshold: Any
    first_position: Any
    own: Any
    slot: Any


@triton.jit
def draws_of(dropped, batch, head, member, row, is_row):
    """Return the draws for some queries of one query head; None without dropout."""
    draws = None
    if dropped is not None:
        document = load_each(dropped.document, row, is_row, 0)
        query = load_each(dropped.query, row, is_row, 0) + dropped.first_position
        number = head * dropped.heads_apart + member + dropped.first_head
        draws = Draws(
            tl.load(dropped.seed),
            query.to(tl.uint32),
            tl.cast(number, tl.uint32),
            (document + batch + dropped.first_row).to(tl.uint32),
            tl.cast(dropped.threshold, tl.uint32),
            dropped.first_position,
            of_head(dropped.own, batch, head),
            of_head(dropped.slot, batch, head),
        )
    return draws


@triton.jit
def kept_own_keys(draws, begin, end, S: tl.constexpr):
    """Return [queries, keys], which weights of the own keys from `begin` on are kept."""
    kept = None
    if draws is not None:
        kept = _kept(draws, draws.own, begin, end, S)
    return kept


@triton.jit
def kept_slots(draws, begin, end, S: tl.constexpr):
    """Return [queries, keys], which weights of the slots from `begin` on are kept."""
    kept = None
    if draws is not None:
        kept = _kept(draws, draws.slot, begin, end, S)
    return kept


@triton.jit
def only_kept(tile, kept):
    """Return a tile with 0 where the weight is dropped."""
    if kept is not None:
        tile = tl.where(kept, tile, 0.0)
    return tile


@triton.jit
def scaled(sums, dropped):
    """Return sums over weights that were kept, with their factor."""
    if dropped is not None:
        sums = sums * dropped.factor
    return sums


@triton.jit
def keys_of_tile(S: tl.constexpr):
    """Return [keys], which key of the tile each column has.

    Where keys lie in quads they change their places: a thread of NVIDIA's has two columns of a
    product that lie side by side, and the two that lie eight columns on. With the keys of a quad
    there, it computes the words that it needs, and no others.
    """
    column = tl.arange(0, S.keys)
    if S.quads:
        column = column // 16 * 16 + column % 8 // 2 * 4 + column % 16 // 8 * 2 + column % 2
    return column


@triton.jit
def _kept(draws, places, begin, end, S: tl.constexpr):
    """Return [queries, keys], which weights of the keys from `begin` on are kept.

    Keys are in the order of `keys_of_tile`.
    """
    if S.quads:
        first = begin + 4 * tl.arange(0, S.keys // 4)
        place = load_each(places, first, first < end, 0) + draws.first_position
        one, two, three, four = _words(draws, place >> 2)
        # One tensor of bits, not four that are joined: Triton computes it where it is needed.
        bits = (one >= draws.threshold).to(tl.int32)
        bits |= (two >= draws.threshold).to(tl.int32) << 1
        bits |= (three >= draws.threshold).to(tl.int32) << 2
        bits |= (four >= draws.threshold).to(tl.int32) << 3
        of_key = bits[:, :, None] >> tl.arange(0, 4)[None, None, :] & 1
        of_key = tl.reshape(of_key, [S.queries, S.keys // 16, 4, 2, 2])
        kept = tl.reshape(tl.permute(of_key, [0, 1, 3, 2, 4]), [S.queries, S.keys]) != 0
    else:
        key = begin + tl.arange(0, S.keys)
        place = load_each(places, key, key < end, 0) + draws.first_position
        one, two, three, four = _words(draws, place >> 2)
        number = (place & 3)[None, :]
        low = tl.where(number == 0, one, two)
        high = tl.where(number == 2, three, four)
        kept = tl.where(number < 2, low, high) >= draws.threshold
    return kept


@triton.jit
def _words(draws, quad):
    """Return the four words [queries, quads] of Philox for each query and each quad of keys."""
    return philox(
        draws.seed,
        quad.to(tl.uint32)[None, :],
        draws.query[:, None],
        draws.head,
        draws.row[:, None],
    )


@triton.jit
def philox(seed, one, two, three, four):
    """Return the four words of Philox-4x32 for a counter, all of uint32, with an int64 as the key.

    Counters that broadcast stay small for the first two rounds. A product of 64 bits is one
    instruction, and its halves are two.
    """
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    for step in tl.static_range(ROUNDS):
        first = one.to(tl.uint64) * MULTIPLIER
        second = three.to(tl.uint64) * OTHER_MULTIPLIER
        one = (second >> 32).to(tl.uint32) ^ two ^ (low + (step * KEY_STEP & WORD))
        three = (first >> 32).to(tl.uint32) ^ four ^ (high + (step * OTHER_KEY_STEP & WORD))
        two = second.to(tl.uint32)
        four = first.to(tl.uint32)
    return one, two, three, four
