"""The entries of key heads that read one pattern, and which of them go when."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from colonnade.pattern import FixedPattern, Pattern
from colonnade.plan.kept import kept_begin, new_slots, num_slots, tail_room

GROWTH = 1.25
"""A buffer that is full becomes so many times as long: entries are moved a few times each."""

Entries = tuple[Tensor, Tensor]
"""Keys and values, [batch, kv_heads, kept, qk_dim or v_dim]."""


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that have seen, keep and get equally much."""

    rows: list[int]
    all_rows: bool
    seq_len: int
    """Positions before the new ones."""
    begin: int
    """Where the tail begins."""
    count: int
    """New positions."""

    @property
    def end(self) -> int:
        """Positions with the new ones."""
        return self.seq_len + self.count

    @property
    def index(self) -> slice | list[int]:
        """What picks the rows out of a batch; all of them without a copy."""
        return slice(None) if self.all_rows else self.rows


@dataclass
class Store:
    """The entries of key heads that read one pattern: [slots | tail], zeros behind.

    Attributes:
        pattern: Which positions are read.
        max_seq_len: To allocate for.
        buffers: Keys and values, allocated ahead.
        begins: Where each row's tail begins.
        read: What each row's last queries may read.
        width: How many entries the longest of these rows has.
    """

    pattern: Pattern
    max_seq_len: int | None
    buffers: Entries
    begins: list[int]
    read: list[Rows] = field(default_factory=list)
    width: int = 0

    def kept(self, seq_len: int, begin: int) -> int:
        """Entries of a row."""
        return num_slots(self.pattern, begin) + seq_len - begin

    def append(
        self,
        new: Entries,
        before: list[int],
        counts: list[int],
        is_token: Tensor | None,
        evicting: bool,
    ) -> Entries:
        """Entries for the new queries: in place where the tail has room, else copies."""
        room = tail_room(self.pattern) if evicting else None
        ends = [n + c for n, c in zip(before, counts, strict=True)]
        if room is not None and self._longest_tail(ends) > room:
            self.evict(before)
        groups = _grouped(before, self.begins, counts)
        self.read = groups
        self.width = max((self.kept(g.end, g.begin) for g in groups), default=0)
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*new, *self.buffers))
        if not wants_grad and (room is None or self._longest_tail(ends) <= room):
            self._reserve(ends)
            for g in groups:
                at = self.kept(g.seq_len, g.begin)
                for buffer, tensor in zip(self.buffers, new, strict=True):
                    tokens = _tokens(tensor, is_token, g)
                    buffer[g.index, :, at : at + g.count] = tokens
            return self._first(self.width)
        whole = self._with(new, is_token, groups)
        self._keep(whole, ends, groups, evicting, wants_grad)
        return whole

    def evict(self, seq_lens: list[int]) -> None:
        """Move the summaries of closed blocks to the slots, and the tail behind them."""
        for g in _grouped(seq_lens, self.begins, [0] * len(seq_lens)):
            begin = kept_begin(self.pattern, g.seq_len)
            if begin <= g.begin:
                continue
            slots, held = num_slots(self.pattern, g.begin), self.kept(g.seq_len, g.begin)
            moved = [self._moved(t[g.index], g, begin) for t in self.buffers]
            if any(t.requires_grad for t in self.buffers):
                self.buffers = self.buffers[0].clone(), self.buffers[1].clone()
            for buffer, entries in zip(self.buffers, moved, strict=True):
                end = slots + entries.shape[2]
                buffer[g.index, :, slots:end] = entries
                buffer[g.index, :, end:held] = 0
        self.begins = [
            max(kept_begin(self.pattern, n), b) for n, b in zip(seq_lens, self.begins, strict=True)
        ]

    def begin_of_shorter(self, seq_len: int, held: int, begin: int) -> int:
        """Where the tail of a row begins that is cropped from `held` to `seq_len` positions."""
        shorter = kept_begin(self.pattern, seq_len)
        if seq_len == 0:
            return 0
        if isinstance(self.pattern, FixedPattern):
            every_column = num_slots(self.pattern, begin) == begin
            if seq_len >= begin or shorter == seq_len or every_column:
                return min(begin, shorter)
        elif begin == 0 or seq_len == held or kept_begin(self.pattern, seq_len + 1) >= begin:
            return begin
        fixed = isinstance(self.pattern, FixedPattern)
        least = f"{begin}, or a multiple of stride" if fixed else f"{held - 1}, or 0"
        raise ValueError(
            f"seq_len must be at least {least}: what a shorter sequence reads is gone; "
            f"got seq_len={seq_len} for {self.pattern}."
        )

    def crop(self, seq_lens: list[int], begins: list[int]) -> None:
        """Let the rows end earlier."""
        self.begins = begins
        if any(t.requires_grad for t in self.buffers):
            self.buffers = self.buffers[0].clone(), self.buffers[1].clone()
        for row, (seq_len, begin) in enumerate(zip(seq_lens, begins, strict=True)):
            for buffer in self.buffers:
                buffer[row, :, self.kept(seq_len, begin) :] = 0

    def select(self, index: Tensor, rows: list[int]) -> None:
        """Keep some rows, in their order."""
        with torch.inference_mode(False):  # Written to later, in whatever mode.
            keys, values = (t.index_select(0, index.clone().to(t.device)) for t in self.buffers)
        self.buffers = keys, values
        self.begins = [self.begins[row] for row in rows]

    def _longest_tail(self, ends: list[int]) -> int:
        return max((n - b for n, b in zip(ends, self.begins, strict=True)), default=0)

    def _first(self, width: int) -> Entries:
        return self.buffers[0][:, :, :width], self.buffers[1][:, :, :width]

    def _moved(self, entries: Tensor, group: Rows, begin: int) -> Tensor:
        """What stays of the tails of some rows that will begin at `begin`."""
        slots, held = num_slots(self.pattern, group.begin), self.kept(group.end, group.begin)
        index = new_slots(self.pattern, group.begin, begin, entries.shape[1]).to(entries.device)
        index = index[None, :, :, None].expand(entries.shape[0], -1, -1, entries.shape[3])
        summaries = entries[:, :, slots:held].gather(2, index)
        return torch.cat([summaries, entries[:, :, slots + begin - group.begin : held]], 2)

    def _with(self, new: Entries, is_token: Tensor | None, groups: list[Rows]) -> Entries:
        """What is held and what is new, each row's without a gap."""
        if is_token is None and not any(self.kept(g.seq_len, g.begin) for g in groups):
            return new
        found = []
        for buffer, tensor in zip(self.buffers, new, strict=True):
            parts = []
            for g in groups:
                held = buffer[g.index, :, : self.kept(g.seq_len, g.begin)]
                parts.append(pad(torch.cat([held, _tokens(tensor, is_token, g)], 2), self.width))
            found.append(_in_order(parts, groups))
        return found[0], found[1]

    def _keep(
        self,
        whole: Entries,
        ends: list[int],
        groups: list[Rows],
        evicting: bool,
        wants_grad: bool,
    ) -> None:
        """Of `whole`, in place of what was held, what later positions can read."""
        begins = [
            max(kept_begin(self.pattern, n), b) if evicting else b
            for n, b in zip(ends, self.begins, strict=True)
        ]
        self.begins = begins
        width = max((self.kept(n, b) for n, b in zip(ends, begins, strict=True)), default=0)
        if not wants_grad:
            self._reserve(ends)
        kept = []
        for which, entries in enumerate(whole):
            parts = []
            for g in groups:
                begin = max(kept_begin(self.pattern, g.end), g.begin) if evicting else g.begin
                of_rows = entries[g.index]
                slots = of_rows[:, :, : num_slots(self.pattern, g.begin)]
                parts.append(pad(torch.cat([slots, self._moved(of_rows, g, begin)], 2), width))
            found = _in_order(parts, groups)
            if not wants_grad:
                buffer = self.buffers[which]
                buffer[:, :, :width] = found
                buffer[:, :, width:] = 0
                found = buffer
            kept.append(found)
        self.buffers = kept[0], kept[1]

    def _reserve(self, ends: list[int]) -> None:
        """Make the buffers long enough for rows that end there."""
        room = tail_room(self.pattern)
        lengths = list(zip(ends, self.begins, strict=True))
        needed = max((self._capacity(n, b, room) for n, b in lengths), default=0)
        length = self.buffers[0].shape[2]
        if needed <= length:
            return
        capacity = max(needed, int(GROWTH * length))
        if self.max_seq_len is not None:
            last = kept_begin(self.pattern, self.max_seq_len - 1)
            planned = self._capacity(self.max_seq_len, last, room)
            # More comes where nothing is let go for a while.
            capacity = planned if needed <= planned else capacity
        keys, values = (_longer(t, capacity) for t in self.buffers)
        self.buffers = keys, values

    def _capacity(self, seq_len: int, begin: int, room: int | None) -> int:
        """Entries of a row whose tail has all the room that it may come to need."""
        tail = seq_len - begin
        if room is not None:
            left = room if self.max_seq_len is None else min(room, self.max_seq_len - begin)
            tail = max(tail, left)
        return num_slots(self.pattern, begin) + tail


def _grouped(seq_lens: list[int], begins: list[int], counts: list[int]) -> list[Rows]:
    """Rows that are alike, together."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for row, sizes in enumerate(zip(seq_lens, begins, counts, strict=True)):
        groups.setdefault(sizes, []).append(row)
    return [Rows(rows, len(groups) == 1, *sizes) for sizes, rows in groups.items()]


def _tokens(tensor: Tensor, is_token: Tensor | None, group: Rows) -> Tensor:
    """[rows, heads, count, width]: the new entries of some rows, without their padding."""
    of_rows = tensor if group.all_rows else tensor[group.rows]
    if is_token is None:
        return of_rows
    tokens: Tensor = of_rows.transpose(1, 2)[is_token[group.index]]
    by_row: Tensor = tokens.unflatten(0, (of_rows.shape[0], group.count))
    return by_row.transpose(1, 2)


def _in_order(parts: list[Tensor], groups: list[Rows]) -> Tensor:
    """What was computed for groups of rows, as one batch."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([row for group in groups for row in group.rows]).argsort()
    return torch.cat(parts).index_select(0, order.to(parts[0].device))


def pad(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the entries."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, width - tensor.shape[2]))


def _longer(tensor: Tensor, length: int) -> Tensor:
    """The same entries in a longer buffer, with zeros behind."""
    # Written to later, in whatever mode.
    with torch.inference_mode(False):
        longer = tensor.new_zeros(*tensor.shape[:2], length, tensor.shape[3])
    longer[:, :, : tensor.shape[2]] = tensor.detach()
    return longer
