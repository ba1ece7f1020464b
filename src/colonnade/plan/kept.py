"""What a decoder keeps: [slots | tail], the summaries of closed blocks and every position after them.

Row b of a batch may have its own `seq_len` and `begin`, the position where its tail begins.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, Pattern
from colonnade.shapes import Gather, KeptMask, Positions

Length = TypeVar("Length", int, Tensor)


def kept_begin(pattern: Pattern, seq_len: int) -> int:
    """The first position that has to be kept whatever it is, after `seq_len` positions.

    That of the open block, or of the window; strided and full patterns keep everything.
    """
    if isinstance(pattern, FixedPattern):
        return seq_len // pattern.stride * pattern.stride
    return max(seq_len - pattern.window, 0) if isinstance(pattern, LocalPattern) else 0


def num_slots(pattern: Pattern, begin: Length) -> Length:
    """The summaries that each key head keeps of the blocks before position `begin`."""
    if isinstance(pattern, FixedPattern) and pattern.part != "local":
        return begin // pattern.stride * pattern.summary
    return begin * 0


def tail_room(pattern: Pattern) -> int | None:
    """How long a tail becomes before something of it can go; None: nothing ever can.

    Twice a window, so that what is left of one is moved once in as many tokens.
    """
    if isinstance(pattern, FixedPattern):
        return pattern.stride
    return 2 * pattern.window if isinstance(pattern, LocalPattern) else None


def new_slots(pattern: Pattern, begin: int, end: int, num_kv_heads: int) -> Gather:
    """Where the summaries of the blocks from `begin` to `end` lie, counted from `begin`."""
    if not isinstance(pattern, FixedPattern) or pattern.part == "local":
        return torch.zeros(num_kv_heads, 0, dtype=torch.long)
    columns = [pattern.summary_columns(head) for head in range(num_kv_heads)]
    of_block = torch.stack([torch.arange(c.start, c.stop) for c in columns])
    return (torch.arange(0, end - begin, pattern.stride)[:, None] + of_block[:, None]).flatten(1)


def kept_positions(pattern: FixedPattern, seq_len: int, reduced: int, head: int) -> Positions:
    """The positions that a key head keeps whose first `reduced` blocks are summaries alone."""
    begin = reduced * pattern.stride
    slots = new_slots(pattern, 0, begin, head + 1)[head]
    return torch.cat([slots, torch.arange(begin, seq_len)])


def last_reads(
    pattern: Pattern, seq_len: Positions, begin: Positions, width: int, num_kv_heads: int
) -> KeptMask:
    """Which of the first `width` kept entries each row's last position reads.

    Args:
        pattern: Causal.
        seq_len: [batch]; a row without a position reads nothing.
        begin: [batch]: where each row's tail begins.
        width: Entries.
        num_kv_heads: Key heads.
    """
    entry = torch.arange(width)
    slots = num_slots(pattern, begin)[:, None]
    query, key = seq_len[:, None] - 1, begin[:, None] + entry - slots
    of_tail = [pattern.reads(query, key, head) for head in range(num_kv_heads)]
    return torch.where((entry < slots)[:, None], True, torch.stack(of_tail, 1))


def last_span(pattern: Pattern, seq_len: int, begin: int, num_kv_heads: int) -> range | None:
    """The kept entries that the last position reads, where they are one run, the same for all."""
    slots = num_slots(pattern, begin)
    held = slots + seq_len - begin
    if isinstance(pattern, FullPattern):
        return range(held)
    if isinstance(pattern, LocalPattern):
        return range(max(held - pattern.window, 0), held)
    if not isinstance(pattern, FixedPattern) or kept_begin(pattern, seq_len - 1) != begin:
        return None
    if pattern.part == "summary":
        first = min(pattern.summary_columns(head).start for head in range(num_kv_heads))
        return range(slots) if seq_len - 1 - begin < first else None
    return range(held)
