"""The entries of key heads that read one pattern, and which of them go when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.backends.tracing.device import on_device
from colonnade.ops.heads import HeadGroup
from colonnade.pattern import FixedPattern, LocalPattern, Pattern
from colonnade.plan.kept import (
    Lengths,
    RowGroup,
    Step,
    begin_of_shorter,
    evicted,
    grouped,
    holds_all,
    kept_begin,
    new_slots,
    next_step,
    num_kept,
    num_slots,
    tail_room,
)
from colonnade.shapes import Key, Value

GROWTH = 1.25
"""Factor by which a full buffer grows: an entry is moved a few times, whatever the length."""


class KeysAndValues(NamedTuple):
    """Keys and values, [batch, kv_heads, kept, qk_dim or v_dim]."""

    keys: Key
    values: Value


@dataclass
class Store:
    """The entries of key heads that read one pattern: [slots | tail], zeros behind.

    Attributes:
        heads: The key heads, and the pattern that they read.
        max_seq_len: Number of positions to allocate for.
        buffers: Keys and values, allocated ahead.
        rows: Lengths of each batch row.
    """

    heads: HeadGroup
    max_seq_len: int | None
    buffers: KeysAndValues
    rows: list[Lengths]

    @property
    def pattern(self) -> Pattern:
        """The pattern of these heads."""
        return self.heads.pattern

    def next_step(self, counts: Sequence[int], evicting: bool) -> Step:
        """Work out what happens when counts[b] positions are appended to batch row b."""
        num_kv_heads = self.heads.stop - self.heads.first
        return next_step(self.heads.pattern, self.rows, counts, num_kv_heads, evicting)

    def append(
        self, key: Key, value: Value, counts: Sequence[int], is_token: Tensor | None, evicting: bool
    ) -> tuple[KeysAndValues, list[RowGroup]]:
        """Take new positions in: in place where the tail has room, else into copies.

        Returns:
            What their queries may read, and of which batch rows.
        """
        step = self.next_step(counts, evicting)
        if step.evicts:
            self.evict()
        wants_grad = torch.is_grad_enabled() and (
            key.requires_grad
            or value.requires_grad
            or self.buffers.keys.requires_grad
            or self.buffers.values.requires_grad
        )
        if step.fits and not wants_grad:
            if step.width > self.buffers.keys.shape[2]:
                self._reserve(counts)
            for buffer, tensor in zip(self.buffers, (key, value), strict=True):
                for group in step.groups:
                    new = tensor
                    if is_token is not None or not group.all_rows:
                        new = _tokens(tensor, is_token, group)
                    buffer[group.pick, :, group.num_kept : group.width] = new
            self.rows = step.rows
            keys, values = self.buffers
            width = step.width
            return KeysAndValues(keys[:, :, :width], values[:, :, :width]), step.groups
        whole = [
            self._with_new(buffer, tensor, is_token, step.groups, step.width)
            for buffer, tensor in zip(self.buffers, (key, value), strict=True)
        ]
        self._keep(whole, step, evicting, wants_grad)
        return KeysAndValues(*whole), step.groups

    def evict(self) -> None:
        """Move the summaries of closed blocks to the slots, and the tail behind them."""
        for group in grouped(self.pattern, self.rows, [0] * len(self.rows), 0):
            begin = kept_begin(self.pattern, group.seq_len)
            if begin <= group.begin:
                continue
            first = num_slots(self.pattern, group.begin)
            moved = [self._moved(t[group.pick], group, begin) for t in self.buffers]
            self._own_buffers()
            for buffer, entries in zip(self.buffers, moved, strict=True):
                end = first + entries.shape[2]
                buffer[group.pick, :, first:end] = entries
                buffer[group.pick, :, end : group.num_kept] = 0
        self.rows = [evicted(self.pattern, row) for row in self.rows]

    def shorter(self, seq_lens: Sequence[int]) -> list[Lengths]:
        """The lengths of the batch rows once they are cropped; rows that are shorter stay.

        Raises:
            ValueError: A row would read what is gone.
        """
        advice = (
            "Set cache.evicting = False before you append positions that may have to be taken back."
        )
        return shorter_rows(self.pattern, self.rows, seq_lens, advice)

    def crop(self, rows: list[Lengths]) -> None:
        """Let the batch rows end earlier."""
        self.rows = rows
        self._own_buffers()
        for index, row in enumerate(rows):
            for buffer in self.buffers:
                buffer[index, :, num_kept(self.pattern, *row) :] = 0

    def select(self, index: Tensor, rows: list[int]) -> None:
        """Keep some batch rows, in their order."""
        with torch.inference_mode(False):  # Written to later, in whatever mode.
            self.buffers = KeysAndValues(
                *(t.index_select(0, on_device(index.clone(), t.device)) for t in self.buffers)
            )
        self.rows = [self.rows[row] for row in rows]

    def _own_buffers(self) -> None:
        """Copy buffers that gradients flow through, for they are about to be written to."""
        if any(t.requires_grad for t in self.buffers):
            self.buffers = KeysAndValues(*(t.clone() for t in self.buffers))

    def _moved(self, entries: Tensor, group: RowGroup, begin: int) -> Tensor:
        """The entries that stay of the tails of some batch rows that will begin at `begin`."""
        first = num_slots(self.pattern, group.begin)
        index = new_slots(self.pattern, group.begin, begin, entries.shape[1])
        index = on_device(index, entries.device)
        index = index[None, :, :, None].expand(entries.shape[0], -1, -1, entries.shape[3])
        tail = entries[:, :, first : group.width]
        return torch.cat([tail.gather(2, index), tail[:, :, begin - group.begin :]], 2)

    def _with_new(
        self,
        buffer: Tensor,
        new: Tensor,
        is_token: Tensor | None,
        groups: list[RowGroup],
        width: int,
    ) -> Tensor:
        """A copy of the entries with the new ones, each batch row's without a gap."""
        if is_token is None and not any(group.num_kept for group in groups):
            return new
        parts = []
        for group in groups:
            kept = buffer[group.pick, :, : group.num_kept]
            parts.append(pad(torch.cat([kept, _tokens(new, is_token, group)], 2), width))
        return _in_order(parts, groups)

    def _keep(self, whole: list[Tensor], step: Step, evicting: bool, wants_grad: bool) -> None:
        """Keep what later positions can read of `whole`, instead of what was kept before."""
        self.rows = step.rows
        if evicting:
            self.rows = [evicted(self.pattern, row) for row in self.rows]
        width = max((num_kept(self.pattern, *row) for row in self.rows), default=0)
        if not wants_grad:
            self._reserve([0] * len(self.rows))
        kept = []
        for buffer, entries in zip(self.buffers, whole, strict=True):
            parts = []
            for group in step.groups:
                begin = self.rows[group.rows[0]].begin
                of_rows = entries[group.pick]
                slots = of_rows[:, :, : num_slots(self.pattern, group.begin)]
                parts.append(pad(torch.cat([slots, self._moved(of_rows, group, begin)], 2), width))
            found = _in_order(parts, step.groups)
            if not wants_grad:
                buffer[:, :, :width] = found
                buffer[:, :, width:] = 0
                found = buffer
            kept.append(found)
        self.buffers = KeysAndValues(*kept)

    def _reserve(self, counts: Sequence[int]) -> None:
        """Make the buffers long enough for that many more positions in each batch row."""
        room = tail_room(self.pattern)
        ends = [
            Lengths(row.seq_len + count, row.begin)
            for row, count in zip(self.rows, counts, strict=True)
        ]
        needed = max((self._capacity(row, room) for row in ends), default=0)
        length = self.buffers.keys.shape[2]
        if needed <= length:
            return
        capacity = max(needed, int(GROWTH * length))
        if self.max_seq_len is not None:
            last = kept_begin(self.pattern, self.max_seq_len - 1)
            planned = self._capacity(Lengths(self.max_seq_len, last), room)
            # More comes where nothing is let go for a while.
            capacity = planned if needed <= planned else capacity
        self.buffers = KeysAndValues(*(_longer(t, capacity) for t in self.buffers))

    def _capacity(self, row: Lengths, room: int | None) -> int:
        """Entries of a batch row whose tail has all the room that it may come to need."""
        tail = row.seq_len - row.begin
        if room is not None:
            left = room if self.max_seq_len is None else min(room, self.max_seq_len - row.begin)
            tail = max(tail, left)
        return num_slots(self.pattern, row.begin) + tail


def shorter_rows(
    pattern: Pattern,
    rows: Sequence[Lengths],
    seq_lens: Sequence[int],
    advice: str,
    *,
    is_ring: bool = False,
) -> list[Lengths]:
    """Return the lengths of batch rows once they are cropped; rows that are shorter stay.

    Args:
        pattern: What the rows read.
        rows: Their lengths.
        seq_lens: The lengths that are asked for.
        advice: The end of the error, for whoever needs what is gone.
        is_ring: Whether a window is kept in a ring, which overwrites what came before it.

    Raises:
        ValueError: A row would read what is gone.
    """
    found = []
    for row, wanted in zip(rows, seq_lens, strict=True):
        seq_len = min(wanted, row.seq_len)
        begin = begin_of_shorter(pattern, row, seq_len)
        is_shorter = 0 < seq_len < row.seq_len
        if begin is None or (is_ring and is_shorter and not holds_all(pattern, row, seq_len)):
            least = f"{row.seq_len if is_ring else row.seq_len - 1}, or 0"
            if isinstance(pattern, LocalPattern) and pattern.sinks > 0:
                least = f"{least}, or at most sinks"
            if isinstance(pattern, FixedPattern):
                least = f"{row.begin}, or a multiple of stride"
            raise ValueError(
                f"seq_len must be at least {least}: what a shorter sequence reads is gone; "
                f"got seq_len={seq_len} for {pattern}. {advice}"
            )
        found.append(Lengths(seq_len, begin))
    return found


def _tokens(tensor: Tensor, is_token: Tensor | None, group: RowGroup) -> Tensor:
    """[rows, heads, count, width]: the new entries of some batch rows, without their padding."""
    of_rows = tensor if group.all_rows else tensor[group.rows]
    if is_token is None:
        return of_rows
    tokens: Tensor = of_rows.transpose(1, 2)[is_token[group.pick]]
    by_row: Tensor = tokens.unflatten(0, (of_rows.shape[0], group.num_new))
    return by_row.transpose(1, 2)


def _in_order(parts: list[Tensor], groups: list[RowGroup]) -> Tensor:
    """One batch of what was computed for groups of batch rows."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for group in groups for row in group.rows], device="cpu").argsort()
    return torch.cat(parts).index_select(0, on_device(order, parts[0].device))


def pad(tensor: Tensor, width: int) -> Tensor:
    """Put zeros behind the entries, up to `width`."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, width - tensor.shape[2]))


def _longer(tensor: Tensor, length: int) -> Tensor:
    """The same entries in a longer buffer, with zeros behind."""
    # Written to later, in whatever mode.
    with torch.inference_mode(False):
        longer = tensor.new_zeros(*tensor.shape[:2], length, tensor.shape[3])
    longer[:, :, : tensor.shape[2]] = tensor.detach()
    return longer
