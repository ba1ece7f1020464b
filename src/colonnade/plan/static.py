"""Where a cache of fixed size keeps positions: index arithmetic on tensors, without a branch.

The entries are [slots | tail], both as long as `max_seq_len` positions may ever need. A sink or a
summary is written twice, to its slot and to the tail, so nothing has to move when its block closes:

    position p, block b = p // l, offset o = p mod l         FixedPattern, part "merged"
    slot p               if p < k, the number of sinks
    slot k + b·c + column    if o is the column-th summary column of the head
    tail o               always; the next block writes over it

Part "local" has sinks and the tail. Part "summary" reads nothing but sinks and summaries, so its
tail is a single entry that takes what is neither, and stays 0. A LocalPattern has sinks and a ring
of `window` entries. A StridedPattern and a FullPattern keep every position at its own number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from colonnade.pattern import FixedPattern, LocalPattern, Pattern, StridedPattern
from colonnade.plan.kept import Lengths, kept_begin, num_slots
from colonnade.shapes import KeptMask


class Sizes(NamedTuple):
    """Number of entries of each kind that a key head has."""

    slots: int
    tail: int

    @property
    def entries(self) -> int:
        """Number of all entries."""
        return self.slots + self.tail


class Written(NamedTuple):
    """The entries to which new positions are written."""

    entries: Int[Tensor, "batch kv_heads places"]
    is_kept: Bool[Tensor, "batch kv_heads places"] | None
    """False where 0 is written instead, because no later position reads this one; None: nowhere."""


def static_sizes(pattern: Pattern, max_seq_len: int, num_kv_heads: int) -> Sizes:
    """Return how many entries each key head needs for up to `max_seq_len` positions."""
    if isinstance(pattern, LocalPattern):
        tail = min(pattern.window, max_seq_len)
        return Sizes(min(pattern.sinks, max_seq_len - tail), tail)
    if not isinstance(pattern, FixedPattern):
        return Sizes(0, max_seq_len)
    tail = min(pattern.stride, max_seq_len)
    if pattern.part != "summary":
        # Nobody reads the last block from outside. But where every column is a summary, a crop may
        # lead into any block, whose positions are then found in their slots.
        last = max_seq_len - (pattern.summary < pattern.stride)
        return Sizes(num_slots(pattern, last), tail)
    first = min(pattern.summary_columns(head).start for head in range(num_kv_heads))
    of_last = min(max(max_seq_len % pattern.stride - first, 0), pattern.summary)
    closed = max_seq_len // pattern.stride * pattern.summary
    return Sizes(pattern.sinks + closed + of_last, 1)


def first_columns(pattern: Pattern, num_kv_heads: int) -> Int[Tensor, " kv_heads"]:
    """Return the column of a block at which the summaries of each key head begin, on the CPU."""
    columns = [0] * num_kv_heads
    if isinstance(pattern, FixedPattern):
        columns = [pattern.summary_columns(head).start for head in range(num_kv_heads)]
    return torch.tensor(columns, device="cpu")


def places_of(
    pattern: Pattern,
    sizes: Sizes,
    position: Int[Tensor, " batch"],
    first: Int[Tensor, " kv_heads"],
) -> Written:
    """Return the entries to which the position of each batch row is written.

    Args:
        pattern: The pattern of these heads.
        sizes: Of their entries.
        position: [batch], below the `max_seq_len` of the sizes.
        first: See `first_columns`.
    """
    own = position[:, None].expand(-1, first.shape[0])
    if isinstance(pattern, LocalPattern):
        return _written_twice(sizes.slots + own % sizes.tail, own, own < sizes.slots)
    if not isinstance(pattern, FixedPattern):
        return Written(own[..., None], None)
    offset = own % pattern.stride
    tail = sizes.slots + offset
    if pattern.part == "local":
        return _written_twice(tail, own, own < min(pattern.sinks, sizes.slots))
    column = offset - first
    slot = pattern.sinks + own // pattern.stride * pattern.summary + column
    is_slot = (column >= 0) & (column < pattern.summary)
    if pattern.sinks > 0:
        is_sink = own < pattern.sinks
        slot, is_slot = torch.where(is_sink, own, slot), is_slot | is_sink
    is_slot = is_slot & (slot < sizes.slots)
    if pattern.part == "summary":
        return Written(torch.where(is_slot, slot, sizes.slots)[..., None], is_slot[..., None])
    return _written_twice(tail, slot, is_slot)


def _written_twice(tail: Tensor, slot: Tensor, is_slot: Tensor) -> Written:
    return Written(torch.stack([tail, torch.where(is_slot, slot, tail)], -1), None)


def static_reads(
    pattern: Pattern,
    sizes: Sizes,
    position: Int[Tensor, " batch"],
    first: Int[Tensor, " kv_heads"],
) -> KeptMask:
    """Mark the entries that the last position of each batch row reads, once it is written.

    The arguments are those of `places_of`.
    """
    entry = torch.arange(sizes.entries, device=position.device)
    own = position[:, None, None]
    if isinstance(pattern, StridedPattern):
        reads = pattern.reads(own, entry)
    elif isinstance(pattern, FixedPattern):
        offset = own % pattern.stride
        if pattern.part == "summary":
            closed = own // pattern.stride * pattern.summary
            of_open = (offset + 1 - first[:, None]).clamp(0, pattern.summary)
            reads = entry < pattern.sinks + closed + of_open
            reads = torch.where(entry < pattern.sinks, entry <= own, reads)
        else:
            closed = num_slots(pattern, own)
            reads = torch.where(entry < sizes.slots, entry < closed, entry - sizes.slots <= offset)
    elif isinstance(pattern, LocalPattern):
        # A ring that is full holds the window; a sink is read from its slot once it has left that.
        of_slots = pattern.reads(own, entry) & (entry <= own - pattern.window)
        reads = torch.where(entry < sizes.slots, of_slots, entry - sizes.slots <= own)
    else:
        reads = entry <= own
    return reads.expand(-1, first.shape[0], -1)


def static_places(
    pattern: Pattern,
    sizes: Sizes,
    position: Int[Tensor, " batch"],
    first: Int[Tensor, " kv_heads"],
) -> Int[Tensor, "batch kv_heads entries"]:
    """Return the positions of the entries that `static_reads` marks; others may be anything."""
    own = position[:, None, None]
    begin = own // pattern.stride * pattern.stride if isinstance(pattern, FixedPattern) else own
    held = _held(pattern, sizes, own, begin, first)
    return held.expand(position.shape[0], first.shape[0], -1)


def _held(
    pattern: Pattern,
    sizes: Sizes,
    last: int | Tensor,
    begin: int | Tensor,
    first: Int[Tensor, " kv_heads"],
) -> Int[Tensor, "... kv_heads entries"]:
    """Return the position that each entry holds, or will hold, when the last position is written.

    The tail of a FixedPattern holds the block from `begin` on.
    """
    entry = torch.arange(sizes.entries, device=first.device).expand(len(first), -1)
    of_tail = entry - sizes.slots
    if isinstance(pattern, LocalPattern):
        return torch.where(of_tail < 0, entry, last - (last - of_tail) % sizes.tail)
    if not isinstance(pattern, FixedPattern):
        return entry
    summary = entry - pattern.sinks
    column = first[:, None] + summary % pattern.summary
    of_slot = summary // pattern.summary * pattern.stride + column
    of_slot = torch.where(summary < 0, entry, of_slot)
    of_tail = begin + of_tail
    if pattern.part == "summary":
        of_tail = torch.full_like(entry, -1)
    return torch.where(entry < sizes.slots, of_slot, of_tail)


def sources(
    pattern: Pattern, sizes: Sizes, row: Lengths, first: Int[Tensor, " kv_heads"]
) -> Int[Tensor, "kv_heads entries"]:
    """Return where among the entries [slots | tail] of a batch row each of these entries is found.

    The row is one of a cache that grows, see `plan.kept`; -1 is nowhere, for there is no position
    yet that belongs there, or no position reads it any more.
    """
    seq_len, begin = row
    held = _held(pattern, sizes, seq_len - 1, kept_begin(pattern, seq_len), first)
    entry = torch.arange(sizes.entries, device="cpu").expand(len(first), -1)
    found = torch.where(held >= begin, num_slots(pattern, begin) + held - begin, entry)
    return torch.where((held >= 0) & (held < seq_len), found, -1)


def destinations(
    source: Int[Tensor, "kv_heads entries"], num_kept: int
) -> Int[Tensor, "kv_heads kept"]:
    """Return the way back: which entry holds each of the first `num_kept` of `sources`, or -1."""
    entry = torch.arange(source.shape[1], device="cpu").expand(source.shape)
    found = torch.full((len(source), num_kept + 1), -1, device="cpu")
    # What is nowhere goes behind the others.
    return found.scatter(1, torch.where(source < 0, num_kept, source), entry)[:, :num_kept]
