"""The arguments that kernels take, and the operations on tiles that they share.

Offsets are of 64 bits, for a tensor may have more than 2³¹ elements. Functions marked with
`triton.jit` run inside of a kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

COUNTS = ("num_pieces", "num_tiles", "heads")
"""Arguments that follow lengths. By itself Triton compiles a kernel again for numbers that are 1 or
a multiple of 16, and here there is nothing to gain by that."""


class Array(NamedTuple):
    """A tensor as a kernel sees it: the address of its first element, and all strides."""

    data: Any
    strides: Any


class Shape(NamedTuple):
    """The constants that a kernel is compiled with."""

    group: int
    """Query heads of each key head."""
    qk_dim: int
    v_dim: int
    qk_width: int
    """`qk_dim`, rounded up to a power of two; the rest is 0."""
    v_width: int
    queries: int
    """Queries of a tile."""
    keys: int
    """Keys or slots of a tile."""
    precision: str
    """Precision of products in float32: "ieee" or "tf32"."""
    lift: bool
    """Convert operands to float32 first: Triton's interpreter multiplies bits of bfloat16."""
    quads: bool = False
    """Whether the keys of each tile lie in quads, see dropout.py; of no meaning without dropout."""


class Piece(NamedTuple):
    """One piece of a row of the table, and the head that a program computes it for."""

    q_begin: Any
    q_end: Any
    own_begin: Any
    own_end: Any
    slot_begin: Any
    slot_end: Any
    first: Any
    """Query r of the piece sees own keys before r + first."""
    own_stop: Any
    """The end of the own keys that some query of the piece sees."""
    batch: Any
    head: Any
    member: Any


@triton.jit
def piece_of_program(pieces, shift, num_pieces, heads, S: tl.constexpr):
    """Return the piece of this program; `pieces` is `work.pieces`, `shift` that of the plan."""
    piece = pieces + tl.program_id(0) % num_pieces * 7
    number = tl.program_id(0) // num_pieces
    head = number // S.group % heads
    q_begin = tl.load(piece)
    q_end = tl.load(piece + 1)
    own_begin = tl.load(piece + 2)
    own_end = tl.load(piece + 3)
    first = tl.load(piece + 4) + 1 - tl.load(shift + head)
    seen_by_last = tl.maximum(q_end - q_begin - 1 + first, 0)
    return Piece(
        q_begin,
        q_end,
        own_begin,
        own_end,
        tl.load(piece + 5),
        tl.load(piece + 6),
        first,
        tl.minimum(own_begin + seen_by_last, own_end),
        number // S.group // heads,
        head,
        number % S.group,
    )


@triton.jit
def of_head(array, batch, head):
    """Return one head of [batch, heads, …]."""
    start = tl.cast(batch, tl.int64) * array.strides[0] + tl.cast(head, tl.int64) * array.strides[1]
    return Array(array.data + start, array.strides)


@triton.jit
def of_query_head(array, batch, head, member):
    """Return one query head of [batch, key heads, query heads of each, …]."""
    start = tl.cast(member, tl.int64) * array.strides[2]
    array = of_head(array, batch, head)
    return Array(array.data + start, array.strides)


@triton.jit
def load(array, row, there, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return some rows of [positions, D] as [rows, WIDTH]; 0 where there is none."""
    column = tl.arange(0, WIDTH)
    there = there[:, None]
    if WIDTH != D:
        there = there & (column < D)[None, :]
    return tl.load(array.data + _offsets(array, row, column), mask=there, other=0.0)


@triton.jit
def load_whole(array, row, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return some rows of [positions, D] as [rows, WIDTH], where all of them are there."""
    column = tl.arange(0, WIDTH)
    place = array.data + _offsets(array, row, column)
    if WIDTH == D:
        return tl.load(place)
    return tl.load(place, mask=(column < D)[None, :], other=0.0)


@triton.jit
def store(array, rows, row, there, D: tl.constexpr, WIDTH: tl.constexpr):
    """Round rows [rows, WIDTH] to the type of [positions, D], and write those that there are."""
    column = tl.arange(0, WIDTH)
    there = there[:, None] & (column < D)[None, :]
    place = array.data + _offsets(array, row, column)
    tl.store(place, rows.to(array.data.dtype.element_ty), mask=there)


@triton.jit
def _offsets(array, row, column):
    of_row = row.to(tl.int64)[:, None] * array.strides[-2]
    return of_row + column.to(tl.int64)[None, :] * array.strides[-1]


@triton.jit
def load_each(array, row, there, other):
    """Return some entries of [positions]; `other` where there is none."""
    return tl.load(array.data + row.to(tl.int64) * array.strides[-1], mask=there, other=other)


@triton.jit
def store_each(array, entries, row, there):
    """Write some entries of [positions]."""
    tl.store(array.data + row.to(tl.int64) * array.strides[-1], entries, mask=there)


@triton.jit
def product(a, b, S: tl.constexpr):
    """Return a b, added up in float32."""
    if S.lift:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=S.precision)


@triton.jit
def sees(row, first, key, key_end):
    """Return [rows, keys]: row r sees keys before r + first, as far as there are any."""
    return (key[None, :] < (row + first)[:, None]) & (key < key_end)[None, :]
