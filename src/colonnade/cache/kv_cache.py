"""Attention over what a decoder keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool
from torch import Tensor

from colonnade.cache.store import Entries, Rows, Store, pad
from colonnade.backends.tracing.autocast import cast_as_autocast_would
from colonnade.ops.check import check_finite, check_tensors
from colonnade.ops.heads import Patterns, check_patterns, runs_of_heads
from colonnade.ops.kept import attend_held, attend_last
from colonnade.pattern import FullPattern, Pattern, StridedPattern, check_count
from colonnade.plan.kept import kept_begin, num_slots
from colonnade.shapes import Key, Output, Query, Value


class KVCache:
    """Keys and values of the positions that later ones can still read; for causal patterns.

    A FixedPattern keeps, after n positions with l = stride and c = summary, the c summaries of
    each of the n // l closed blocks and the open block: n // l · c + n mod l entries for each key
    head, at most c·n/l + l, in place of n. Part "local" keeps the open block only, a LocalPattern
    its window. StridedPattern and FullPattern keep everything: each position is read again by some
    later one, for ever. Attention over what is kept equals attention over the whole sequence.

    Rows of a batch may have different lengths, see `padding_mask`. Memory is allocated ahead, so
    that a token costs constant time on average. Where gradients are wanted, entries are copied
    instead of written in place, and gradients flow through the cache.

    Args:
        pattern: A causal pattern, or a tuple of them, one for each run of key heads, as
            `nn.SelfAttention` takes it.
        max_seq_len: Allocate for so many positions at once, and refuse more. None: grow.

    Raises:
        TypeError: `pattern` is neither a pattern nor a tuple of them, or `max_seq_len` no int.
        ValueError: `max_seq_len` is below 1, or the tuple is empty.
        NotImplementedError: A pattern that is not causal.
    """

    def __init__(self, pattern: Patterns, max_seq_len: int | None = None) -> None:
        patterns = pattern if isinstance(pattern, tuple) else (pattern,)
        check_patterns(pattern, len(patterns))
        for each in patterns:
            if not each.causal:
                raise NotImplementedError(f"KVCache holds causal patterns only, got {each}.")
        if max_seq_len is not None:
            check_count("max_seq_len", max_seq_len, minimum=1)
        self.pattern = pattern
        self.max_seq_len = max_seq_len
        self.evicting = True
        self.reset()

    def __repr__(self) -> str:
        patterns = self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)
        whole = any(isinstance(each, StridedPattern | FullPattern) for each in patterns)
        kept = "every entry is kept" if whole else f"{self.num_stored} entries kept"
        return f"KVCache({self.pattern}, seq_len={self.seq_len}: {kept})"

    @property
    def seq_len(self) -> int:
        """How many positions were appended; of the longest row, where they differ."""
        return max(self.seq_lens, default=0)

    @property
    def num_stored(self) -> int:
        """How many entries each key head keeps; the most of any row and head."""
        return max((s.kept(n, b) for s in self._stores for n, b in self._lengths(s)), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(t.nbytes for store in self._stores for t in store.buffers)

    def reset(self) -> None:
        """Forget everything, the sizes of a batch too; memory is given back."""
        self.seq_lens: list[int] = []
        self._stores: list[Store] = []
        self._heads: list[tuple[int, int]] = []
        self._is_token: Tensor | None = None

    def attend(
        self,
        query: Query,
        key: Key,
        value: Value,
        scale: float | None = None,
        padding_mask: Bool[Tensor, "batch q_len"] | None = None,
    ) -> Output:
        """Append the next positions' keys and values, and attend with their queries.

        Equals the same rows of `attention` over the whole sequence. A query that has no key gives
        0, and so does padding.

        Args:
            query: [batch, heads, q_len, qk_dim].
            key: [batch, kv_heads, q_len, qk_dim].
            value: [batch, kv_heads, q_len, v_dim].
            scale: Factor on the scores; 1/sqrt(qk_dim) if None.
            padding_mask: [batch, q_len], True where there is a token; the others are left out, so
                that rows get as many positions as they have tokens. None: all.

        Raises:
            TypeError, ValueError: As `attention` and `append`; the cache stays as it was.
        """
        query, key, value = cast_as_autocast_would(query, key, value)
        check_tensors(query, key, value)
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "query, key and value must be those of the same new positions, got "
                f"query.shape={tuple(query.shape)} and key.shape={tuple(key.shape)}."
            )
        if scale is not None:
            check_finite("scale", scale)
        return self._read(query, self._append(key, value, padding_mask), scale, 0.0)

    def append(
        self, key: Key, value: Value, padding_mask: Bool[Tensor, "batch q_len"] | None = None
    ) -> Entries:
        """Append keys and values, and give what the queries of these positions may read.

        Returns:
            (keys, values), [batch, kv_heads, kept, …]: the summaries of closed blocks, then every
            position from the first block on that is still open for one of the new queries. A
            shorter row, or run of heads, is followed by zeros. They may be views of the cache, good
            until it is used next.

        Raises:
            TypeError: Other types than before, or a padding mask that is no bool tensor.
            ValueError: Shapes that do not fit, together or with those before, or more positions
                than `max_seq_len`. The cache stays as it was.
        """
        key, value = cast_as_autocast_would(key, value)
        check_tensors(key, key, value)
        pieces = self._append(key, value, padding_mask)
        if len(pieces) == 1:
            return pieces[0]
        width = max(k.shape[2] for k, _ in pieces)
        keys = torch.cat([pad(k, width) for k, _ in pieces], 1)
        return keys, torch.cat([pad(v, width) for _, v in pieces], 1)

    def read(
        self,
        query: Query,
        keys: Key,
        values: Value,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Output:
        """Attend with the queries of the positions that were appended last.

        `keys` and `values` are what `append` returned; together the two calls are `attend`.
        """
        pieces = [(keys, values)]
        if len(self._stores) > 1:
            pieces = [
                (keys[:, first:stop, : store.width], values[:, first:stop, : store.width])
                for store, (first, stop) in zip(self._stores, self._heads, strict=True)
            ]
        return self._read(query, pieces, scale, dropout_p)

    def crop(self, seq_len: int | list[int]) -> None:
        """Forget the positions from `seq_len` on; rows that are shorter stay.

        Args:
            seq_len: For all rows, or a list with a number for each.

        Raises:
            TypeError: Anything but integers.
            ValueError: The shorter sequence would read what is gone. Of closed blocks only the
                summaries are left: back to a block's start is possible, into it is not.
        """
        if not isinstance(seq_len, list):
            check_count("seq_len", seq_len, minimum=0)
        wanted = seq_len if isinstance(seq_len, list) else [seq_len] * len(self.seq_lens)
        for number in wanted:
            check_count("seq_len", number, minimum=0)
        if len(wanted) != len(self.seq_lens):
            raise ValueError(
                f"seq_len must have a number for each of {len(self.seq_lens)} rows, "
                f"got seq_len={seq_len}."
            )
        lengths = [min(pair) for pair in zip(wanted, self.seq_lens, strict=True)]
        begins = [
            [
                s.begin_of_shorter(n, m, b)
                for n, m, b in zip(lengths, self.seq_lens, s.begins, strict=True)
            ]
            for s in self._stores
        ]
        for store, of_store in zip(self._stores, begins, strict=True):
            store.crop(lengths, of_store)
        self.seq_lens = lengths

    def evict(self) -> None:
        """Let go of what later positions cannot read.

        It happens by itself when the next position is appended, unless `evicting` is False: then
        everything from then on stays, so that `crop` can go back to it.
        """
        for store in self._stores:
            store.evict(self.seq_lens)

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, as in beam search.

        Raises:
            TypeError: `index` is no tensor of integers.
            ValueError: Not one index for each row, or an index without a row.
        """
        if self._check_index(index) != len(self.seq_lens):
            raise ValueError(
                f"index must have one entry for each of {len(self.seq_lens)} rows, "
                f"got index.shape={tuple(index.shape)}."
            )
        self.select(index)

    def select(self, index: Tensor) -> None:
        """Keep the rows index[0], index[1], … in this order; a row may come more than once.

        Raises:
            TypeError: `index` is no tensor of integers.
            ValueError: An index without a row.
        """
        self._check_index(index)
        rows = index.tolist()
        self.seq_lens = [self.seq_lens[row] for row in rows]
        for store in self._stores:
            store.select(index, rows)

    def repeat(self, n: int) -> None:
        """Each row n times, one after the other, as `repeat_interleave`."""
        check_count("n", n, minimum=1)
        self.select(torch.arange(len(self.seq_lens)).repeat_interleave(n))

    def _check_index(self, index: Tensor) -> int:
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
            found = getattr(index, "dtype", type(index).__name__)
            raise TypeError(f"index must be a tensor of int32 or int64, got {found}.")
        rows = len(self.seq_lens)
        if index.dim() != 1 or not all(0 <= row < rows for row in index.tolist()):
            raise ValueError(f"index must be a row of numbers in [0, {rows}), got index={index}.")
        return len(index)

    def _lengths(self, store: Store) -> Iterator[tuple[int, int]]:
        """(seq_len, begin) of each row, as if everything that can go were gone."""
        for seq_len, begin in zip(self.seq_lens, store.begins, strict=True):
            new = kept_begin(store.pattern, seq_len) if self.evicting else begin
            yield seq_len, max(new, begin)

    def _append(
        self, key: Key, value: Value, padding_mask: Bool[Tensor, "batch q_len"] | None
    ) -> list[Entries]:
        _check_padding(padding_mask, key)
        is_token = None
        if padding_mask is not None and not padding_mask.all():
            is_token = padding_mask.to(key.device)
        batch, num_kv_heads, length = key.shape[:3]
        counts = [length] * batch if is_token is None else is_token.sum(1).tolist()
        before = self.seq_lens if self._stores else [0] * batch
        self._check_fits(key, value, before, counts)
        if not self._stores:
            check_patterns(self.pattern, num_kv_heads)
            for pattern, first, stop in runs_of_heads(self.pattern, num_kv_heads):
                self._heads.append((first, stop))
                size = batch, stop - first, 0
                empty = key.new_empty(*size, key.shape[3]), value.new_empty(*size, value.shape[3])
                self._stores.append(Store(pattern, self.max_seq_len, empty, [0] * batch))
        of_stores = [(key, value)]
        if len(self._stores) > 1:
            of_stores = [(key[:, first:stop], value[:, first:stop]) for first, stop in self._heads]
        pieces = [
            store.append(new, before, counts, is_token, self.evicting)
            for store, new in zip(self._stores, of_stores, strict=True)
        ]
        self.seq_lens = [n + count for n, count in zip(before, counts, strict=True)]
        self._is_token = is_token
        return pieces

    def _check_fits(self, key: Key, value: Value, before: list[int], counts: list[int]) -> None:
        # Another batch size is refused below.
        longest = max((n + c for n, c in zip(before, counts, strict=False)), default=0)
        if self.max_seq_len is not None and longest > self.max_seq_len:
            raise ValueError(
                "the cache has room for max_seq_len positions, got "
                f"max_seq_len={self.max_seq_len}, {self.seq_len} of them taken, "
                f"and {max(counts)} more."
            )
        if not self._stores:
            return
        for name, tensor, which in (("key", key, 0), ("value", value, 1)):
            held = [store.buffers[which] for store in self._stores]
            shape = (len(before), sum(t.shape[1] for t in held), held[0].shape[3])
            if (*tensor.shape[:2], tensor.shape[3]) != shape:
                raise ValueError(
                    f"{name} must have batch, heads and head width as before, {shape}, "
                    f"got {name}.shape={tuple(tensor.shape)}."
                )
            if tensor.dtype != held[0].dtype:
                raise TypeError(
                    f"{name} must have the dtype of those before, {held[0].dtype}, "
                    f"got {name}.dtype={tensor.dtype}."
                )
            if tensor.device != held[0].device:
                raise ValueError(
                    f"{name} must be on the device of those before, {held[0].device}, "
                    f"got {name}.device={tensor.device}."
                )

    def _read(
        self, query: Query, pieces: list[Entries], scale: float | None, dropout_p: float
    ) -> Output:
        group = query.shape[1] // sum(k.shape[1] for k, _ in pieces)
        outs = []
        for store, (first, stop), (k, v) in zip(self._stores, self._heads, pieces, strict=True):
            q = query[:, first * group : stop * group]
            outs.append(self._read_run(store, q, k, v, scale, dropout_p))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _read_run(
        self,
        store: Store,
        query: Query,
        key: Key,
        value: Value,
        scale: float | None,
        dropout_p: float,
    ) -> Output:
        options = scale, dropout_p
        if len(store.read) == 1 and self._is_token is None:
            return _attend_rows(store.pattern, store.read[0], query, key, value, options)
        is_token = self._is_token
        if is_token is None:
            is_token = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
        is_token = is_token.to(query.device)
        if query.shape[2] == 1:
            of_row = {row: group for group in store.read for row in group.rows}
            ends = [of_row[row].end for row in range(query.shape[0])]
            begins = [of_row[row].begin for row in range(query.shape[0])]
            of_rows = ends, begins, is_token[:, 0]
            return attend_last(query, key, value, store.pattern, *of_rows, *options)
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        for rows in store.read:
            for row in rows.rows:
                width = num_slots(store.pattern, rows.begin) + rows.end - rows.begin
                q = query[row, None, :, is_token[row]]
                k, v = key[row, None, :, :width], value[row, None, :, :width]
                out[row, :, is_token[row]] = _attend_rows(store.pattern, rows, q, k, v, options)[0]
        return out


def _attend_rows(
    pattern: Pattern,
    rows: Rows,
    query: Query,
    key: Key,
    value: Value,
    options: tuple[float | None, float],
) -> Output:
    return attend_held(query, key, value, pattern, rows.end, rows.begin, *options)


def _check_padding(padding_mask: Tensor | None, key: Key) -> None:
    if padding_mask is None:
        return
    if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
        found = getattr(padding_mask, "dtype", type(padding_mask).__name__)
        raise TypeError(f"padding_mask must be a bool tensor, True at tokens, got {found}.")
    if padding_mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            "padding_mask must be [batch, new positions], got "
            f"padding_mask.shape={tuple(padding_mask.shape)} and key.shape={tuple(key.shape)}."
        )
