"""Entries in buffers that never change their size or place: for steps that a compiler takes whole.

A step of one position is index arithmetic on tensors, see `plan.static`. Chunks of positions are
rare, so they take the way of a cache that grows, with numbers on the host: what is kept is copied
into stores that grow, the chunk is appended there, and what stays of it is copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from colonnade.backends.tracing.device import on_device
from colonnade.cache.store import KeysAndValues, Store, shorter_rows
from colonnade.ops.heads import HeadGroup
from colonnade.pattern import LocalPattern, Pattern
from colonnade.plan.kept import Lengths, grouped, kept_begin, num_kept
from colonnade.plan.static import (
    Sizes,
    destinations,
    first_columns,
    places_of,
    sources,
    static_places,
    static_reads,
    static_sizes,
)
from colonnade.shapes import KeptMask, Key, Positions, Value


@dataclass
class StaticStore:
    """The entries of key heads that read one pattern, in buffers of fixed size.

    Attributes:
        heads: The key heads, and the pattern that they read.
        max_seq_len: Most positions of a batch row.
        sizes: Number of entries of each kind.
        buffers: Keys and values.
        seq_len: [batch], the number of positions of each batch row.
        is_new: [batch], whether the last step brought each row a position.
        first: [kv_heads], see `first_columns`.
    """

    heads: HeadGroup
    max_seq_len: int
    sizes: Sizes
    buffers: KeysAndValues
    seq_len: Int[Tensor, " batch"]
    is_new: Bool[Tensor, " batch"]
    first: Int[Tensor, " kv_heads"]

    @classmethod
    def empty(cls, heads: HeadGroup, max_seq_len: int, key: Key, value: Value) -> StaticStore:
        """Return a store without a position, for keys and values like those of these heads."""
        batch, kv_heads = key.shape[:2]
        sizes = static_sizes(heads.pattern, max_seq_len, kv_heads)
        # Written to later, in whatever mode.
        with torch.inference_mode(False):
            buffers = KeysAndValues(
                *(t.new_zeros(batch, kv_heads, sizes.entries, t.shape[3]) for t in (key, value))
            )
            seq_len = torch.zeros(batch, dtype=torch.long, device=key.device)
            is_new = torch.zeros(batch, dtype=torch.bool, device=key.device)
            first = first_columns(heads.pattern, kv_heads).to(key.device)
        for tensor in (*buffers, seq_len, is_new, first):
            # CUDA graphs then take them where they are, instead of copying them at every step.
            torch._dynamo.mark_static_address(tensor)
        return cls(heads, max_seq_len, sizes, buffers, seq_len, is_new, first)

    @property
    def pattern(self) -> Pattern:
        """The pattern of these heads."""
        return self.heads.pattern

    @property
    def rows(self) -> list[Lengths]:
        """Lengths of each batch row."""
        return [Lengths(n, kept_begin(self.pattern, n)) for n in self.seq_len.tolist()]

    def step(self, key: Key, value: Value, is_token: Bool[Tensor, "batch 1"] | None) -> None:
        """Take in one position of each batch row that has a token."""
        # Where the row is full an assertion stops the program, if need be after the write.
        position = self.seq_len.clamp(max=self.max_seq_len - 1)
        index, is_kept = places_of(self.pattern, self.sizes, position, self.first)
        batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
        head = torch.arange(index.shape[1], device=index.device)[:, None]
        for buffer, new in zip(self.buffers, (key, value), strict=True):
            entries = new.expand(-1, -1, index.shape[2], -1)
            if is_kept is not None:
                entries = torch.where(is_kept[..., None], entries, 0)
            if is_token is not None:
                there = buffer[batch, head, index]
                entries = torch.where(is_token[..., None, None], entries, there)
            buffer.index_put_((batch, head, index), entries)
        if is_token is None:
            self.seq_len.add_(1)
            self.is_new.fill_(True)
        else:
            self.seq_len.add_(is_token[:, 0])
            self.is_new.copy_(is_token[:, 0])

    def reads(self) -> KeptMask:
        """Mark the entries that the positions of the last step read."""
        reads = static_reads(self.pattern, self.sizes, self.seq_len - 1, self.first)
        return reads & self.is_new[:, None, None]

    def places(self) -> tuple[Positions, Positions]:
        """Return the positions [batch, 1] of the last step, and those of the entries they read."""
        last = self.seq_len - 1
        return last[:, None], static_places(self.pattern, self.sizes, last, self.first)

    def unpacked(self) -> Store:
        """Return a copy that grows."""
        rows, first = self.rows, self.first.cpu()
        width = max((num_kept(self.pattern, *row) for row in rows), default=0)
        copies = [t.new_zeros(*t.shape[:2], width, t.shape[3]) for t in self.buffers]
        for group in grouped(self.pattern, rows, [0] * len(rows), 0):
            row = rows[group.rows[0]]
            source = sources(self.pattern, self.sizes, row, first)
            index = destinations(source, num_kept(self.pattern, *row))
            for copy, buffer in zip(copies, self.buffers, strict=True):
                copy[group.pick, :, : index.shape[1]] = _taken(buffer[group.pick], index)
        return Store(self.heads, None, KeysAndValues(*copies), rows)

    def pack(self, store: Store) -> None:
        """Become what a store that grows is; of closed blocks the summaries alone."""
        first = self.first.cpu()
        for group in grouped(self.pattern, store.rows, [0] * len(store.rows), 0):
            row = store.rows[group.rows[0]]
            index = sources(self.pattern, self.sizes, row, first)
            for buffer, entries in zip(self.buffers, store.buffers, strict=True):
                buffer[group.pick] = _taken(entries[group.pick], index)
        lengths = torch.tensor([row.seq_len for row in store.rows], device="cpu")
        self.seq_len.copy_(on_device(lengths, self.seq_len.device))
        self.is_new.fill_(False)

    def shorter(self, seq_lens: Sequence[int]) -> list[Lengths]:
        """The lengths of the batch rows once they are cropped; rows that are shorter stay.

        Raises:
            ValueError: A row would read what is gone.
        """
        advice = (
            "A cache with static=True has no room for more; one without keeps it after "
            "cache.evicting = False."
        )
        is_ring = isinstance(self.pattern, LocalPattern)
        return shorter_rows(self.pattern, self.rows, seq_lens, advice, is_ring=is_ring)

    def crop(self, rows: list[Lengths]) -> None:
        """Let the batch rows end earlier."""
        store = self.unpacked()
        store.crop(rows)
        self.pack(store)

    def evict(self) -> None:
        """Do nothing: there is room for what later positions read, and for nothing else."""

    def select(self, index: Tensor, rows: list[int]) -> None:
        """Give each batch row the entries of the row that `index` names.

        Raises:
            ValueError: There would be another number of rows.
        """
        if len(rows) != len(self.seq_len):
            raise ValueError(
                f"a cache with static=True keeps its number of batch rows, {len(self.seq_len)}, "
                f"got index of {len(rows)} rows. Repeat or select rows of the inputs, or use a "
                "cache without static=True."
            )
        index = on_device(index.clone(), self.seq_len.device)
        for tensor in (*self.buffers, self.seq_len, self.is_new):
            tensor.copy_(tensor.index_select(0, index))

    def clear(self) -> None:
        """Forget every position."""
        for tensor in (*self.buffers, self.seq_len, self.is_new):
            tensor.zero_()


def _taken(entries: Tensor, index: Int[Tensor, "kv_heads taken"]) -> Tensor:
    """[rows, kv_heads, taken, width]: the entries at `index`, and 0 where that is -1."""
    if entries.shape[2] == 0:
        return entries.new_zeros(*entries.shape[:2], index.shape[1], entries.shape[3])
    index = on_device(index, entries.device)[None, :, :, None]
    where = index.clamp(min=0).expand(entries.shape[0], -1, -1, entries.shape[3])
    return entries.gather(2, where).masked_fill(index < 0, 0)
