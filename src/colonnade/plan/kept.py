"""The entries that a decoder keeps, [slots | tail]: sinks and summaries, then all positions after.

Slots are what is left of the positions before the tail, because every later position reads it.

Row b of a batch may have its own `seq_len` and `begin`, the position where its tail begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, Pattern
from colonnade.shapes import Gather, KeptMask, Positions

Length = TypeVar("Length", int, Tensor)


class Lengths(NamedTuple):
    """The number of positions of a batch row, and the one where its tail begins."""

    seq_len: int = 0
    begin: int = 0


class RowGroup(NamedTuple):
    """Batch rows with equal lengths and number of new positions, so that one slice serves all."""

    rows: list[int]
    all_rows: bool
    seq_len: int
    """Positions before the new ones."""
    begin: int
    """The first position of the tail."""
    num_new: int
    """New positions."""
    num_kept: int
    """Entries before the new ones."""
    slots: int
    """Entries before the tail."""
    span: range | None
    """The entries that one new position reads, where they have no gap and all heads share them."""

    @property
    def width(self) -> int:
        """Entries with the new ones."""
        return self.num_kept + self.num_new

    @property
    def pick(self) -> slice | list[int]:
        """Index that picks these rows out of a batch; all of them without a copy."""
        return slice(None) if self.all_rows else self.rows


class Step(NamedTuple):
    """The change that new positions make to what is kept; see `next_step`."""

    evicts: bool
    """Whether entries that no later position reads have to go first."""
    fits: bool
    """Whether the tails then have room for the new positions."""
    groups: list[RowGroup]
    """The batch rows as they are then."""
    width: int
    """Entries of the longest batch row, the new ones included."""
    rows: list[Lengths]
    """The lengths with the new positions, before anything more is evicted."""


def next_step(
    pattern: Pattern,
    rows: Sequence[Lengths],
    counts: Sequence[int],
    num_kv_heads: int,
    evicting: bool,
) -> Step:
    """Work out what happens when counts[b] positions are appended to batch row b.

    Entries go when a tail has no room for the next ones, not when a block closes: the last query
    of a block still reads it. Nothing goes unless `evicting`.
    """
    room = tail_room(pattern) if evicting else None
    evicts = room is not None and _longest_tail(rows, counts) > room
    if evicts:
        rows = [evicted(pattern, row) for row in rows]
    fits = room is None or not evicts or _longest_tail(rows, counts) <= room
    groups = grouped(pattern, rows, counts, num_kv_heads)
    width = max((group.width for group in groups), default=0)
    after = [Lengths(row.seq_len + n, row.begin) for row, n in zip(rows, counts, strict=True)]
    return Step(evicts, fits, groups, width, after)


def _longest_tail(rows: Sequence[Lengths], counts: Sequence[int]) -> int:
    tails = (row.seq_len + n - row.begin for row, n in zip(rows, counts, strict=True))
    return max(tails, default=0)


def grouped(
    pattern: Pattern, rows: Sequence[Lengths], counts: Sequence[int], num_kv_heads: int
) -> list[RowGroup]:
    """Put batch rows together that are alike."""
    indices: dict[tuple[int, int, int], list[int]] = {}
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        indices.setdefault((row.seq_len, row.begin, count), []).append(index)
    groups = []
    for (seq_len, begin, count), of_group in indices.items():
        slots = num_slots(pattern, begin)
        span = last_span(pattern, seq_len + 1, begin, num_kv_heads) if count == 1 else None
        groups.append(
            RowGroup(
                of_group,
                len(indices) == 1,
                seq_len,
                begin,
                count,
                num_kept=slots + seq_len - begin,
                slots=slots,
                span=span,
            )
        )
    return groups


def evicted(pattern: Pattern, row: Lengths) -> Lengths:
    """The lengths of a batch row once everything is gone that no later position reads."""
    return Lengths(row.seq_len, max(kept_begin(pattern, row.seq_len), row.begin))


def kept_begin(pattern: Pattern, seq_len: int) -> int:
    """The first position that has to be kept whatever it is, after `seq_len` positions.

    It is that of the open block, or of the window; strided and full patterns keep everything.
    """
    if isinstance(pattern, FixedPattern):
        return seq_len // pattern.stride * pattern.stride
    return max(seq_len - pattern.window, 0) if isinstance(pattern, LocalPattern) else 0


def num_slots(pattern: Pattern, begin: Length) -> Length:
    """The number of positions before `begin` that every later position reads: sinks, summaries.

    In a FixedPattern `begin` counts as the start of its block.
    """
    if isinstance(pattern, LocalPattern):
        return begin - (begin > pattern.sinks) * (begin - pattern.sinks)
    if not isinstance(pattern, FixedPattern):
        return begin * 0
    blocks = begin // pattern.stride
    return blocks * columns_read(pattern) + (blocks > 0) * pattern.sinks


def columns_read(pattern: FixedPattern) -> int:
    """The number of columns of a block that all later blocks read."""
    return 0 if pattern.part == "local" else pattern.summary


def num_positions(pattern: Pattern, kv_len: int, begin: int) -> int:
    """The number of positions of which there are `kv_len` entries, the tail beginning at `begin`.

    It undoes `num_kept`.
    """
    return kv_len + begin - num_slots(pattern, begin)


def num_kept(pattern: Pattern, seq_len: int, begin: int) -> int:
    """The number of entries that each key head keeps of a batch row."""
    return num_slots(pattern, begin) + seq_len - begin


def tail_room(pattern: Pattern) -> int | None:
    """Tail length at which entries can first be evicted, or None if the pattern never evicts.

    For a window it is twice the window, so that what is left of one is moved once in as many
    tokens.
    """
    if isinstance(pattern, FixedPattern):
        return pattern.stride
    return 2 * pattern.window if isinstance(pattern, LocalPattern) else None


def begin_of_shorter(pattern: Pattern, row: Lengths, seq_len: int) -> int | None:
    """Return where the tail of a cropped batch row begins; None: entries that it reads are gone."""
    shorter = kept_begin(pattern, seq_len)
    if seq_len == 0 or holds_all(pattern, row, seq_len):
        return min(row.begin, shorter)
    if isinstance(pattern, FixedPattern):
        if seq_len >= row.begin or shorter == seq_len:
            return min(row.begin, shorter)
    elif seq_len == row.seq_len or kept_begin(pattern, seq_len + 1) >= row.begin:
        return row.begin
    return None


def holds_all(pattern: Pattern, row: Lengths, seq_len: int) -> bool:
    """Whether of the first `seq_len` positions none is gone: all are slots, or of the tail."""
    slots = num_slots(pattern, row.begin)
    return slots == row.begin or (isinstance(pattern, LocalPattern) and seq_len <= slots)


def new_slots(pattern: Pattern, begin: int, end: int, num_kv_heads: int) -> Gather:
    """Positions from `begin` to `end` that become slots, sinks first, counted from `begin`."""
    sinks = torch.arange(0, device="cpu")
    if isinstance(pattern, LocalPattern) or (isinstance(pattern, FixedPattern) and begin == 0):
        sinks = torch.arange(begin, max(min(pattern.sinks, end), begin), device="cpu") - begin
    sinks = sinks.expand(num_kv_heads, -1)
    if not isinstance(pattern, FixedPattern) or pattern.part == "local":
        return sinks
    columns = [pattern.summary_columns(head) for head in range(num_kv_heads)]
    of_block = torch.stack([torch.arange(c.start, c.stop, device="cpu") for c in columns])
    first = torch.arange(0, end - begin, pattern.stride, device="cpu")
    return torch.cat([sinks, (first[:, None] + of_block[:, None]).flatten(1)], 1)


def kept_positions(
    pattern: Pattern, seq_len: int, begin: int, num_kv_heads: int
) -> Int[Tensor, "kv_heads kept"]:
    """The positions of the entries of each key head, when the tail begins at `begin`."""
    slots = new_slots(pattern, 0, begin, num_kv_heads)
    tail = torch.arange(begin, seq_len, device="cpu")
    return torch.cat([slots, tail.expand(num_kv_heads, -1)], 1)


def last_reads(
    pattern: Pattern, seq_len: Positions, begin: Positions, width: int, num_kv_heads: int
) -> KeptMask:
    """Mark which of the first `width` entries each batch row's last position reads.

    Args:
        pattern: Causal.
        seq_len: [batch]; a row without a position reads nothing.
        begin: [batch]: where each row's tail begins.
        width: Number of entries.
        num_kv_heads: Number of key heads.
    """
    entry = torch.arange(width, device=begin.device)
    slots = num_slots(pattern, begin)[:, None]
    query, key = seq_len[:, None] - 1, begin[:, None] + entry - slots
    of_tail = [pattern.reads(query, key, head) for head in range(num_kv_heads)]
    return torch.where((entry < slots)[:, None], True, torch.stack(of_tail, 1))


def last_span(pattern: Pattern, seq_len: int, begin: int, num_kv_heads: int) -> range | None:
    """The entries that the last position reads, where they have no gap and all heads share them."""
    slots = num_slots(pattern, begin)
    kept = slots + seq_len - begin
    if isinstance(pattern, FullPattern):
        return range(kept)
    if isinstance(pattern, LocalPattern):
        first = max(kept - pattern.window, 0)
        if pattern.sinks == 0:
            return range(first, kept)
        return range(kept) if first <= pattern.sinks else None
    if not isinstance(pattern, FixedPattern) or kept_begin(pattern, seq_len - 1) != begin:
        return None
    if pattern.part == "summary":
        first = min(pattern.summary_columns(head).start for head in range(num_kv_heads))
        read = slots if slots > 0 else min(pattern.sinks, kept)
        return range(read) if seq_len - 1 - begin < first else None
    return range(kept)
