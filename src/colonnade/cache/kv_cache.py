"""Keys and values that a decoder keeps, and attention over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Bool
from torch import Tensor

from colonnade.backends.choice import Explanation, check_backend, explain_call
from colonnade.backends.tracing.autocast import cast_as_autocast_would
from colonnade.cache.entries import Entries, check_index, pairs_of_groups
from colonnade.cache.groups import Groups
from colonnade.cache.static import StaticStore
from colonnade.cache.static_groups import StaticGroups, chunks_uncompiled
from colonnade.cache.store import Store, pad
from colonnade.ops.check import check_tensors, check_together, make_call
from colonnade.ops.heads import Patterns, check_patterns, depends_on_head, join_heads
from colonnade.ops.kept import attend_kept
from colonnade.pattern import FullPattern, StridedPattern, check_count, check_flag
from colonnade.plan.kept import evicted, num_kept
from colonnade.shapes import Key, LogSumExp, Output, Query, Value


class KVCache:
    """Keys and values of the positions that later ones can still read; for causal patterns.

    A FixedPattern keeps, after n positions with l = stride and c = summary, the c summaries of
    each of the n // l closed blocks and the open block: n // l · c + n mod l entries for each key
    head, at most c·n/l + l instead of n, and its sinks once block 0 has closed. Part "local" keeps
    the open block and sinks, a LocalPattern its window and sinks. StridedPattern and FullPattern
    keep everything, for each position is read again by some later one. Attention over what is kept
    equals attention over the whole sequence.

    Rows of a batch may have different lengths, see `padding_mask`. Memory is allocated ahead, so
    that a token costs constant time on average. Where gradients are wanted, entries are copied
    instead of written in place, and gradients flow through the cache.

    Args:
        pattern: A causal pattern, or a tuple of them, one for each group of key heads, as
            `nn.SelfAttention` takes it.
        max_seq_len: Allocate for that many positions at once, and refuse more. None: grow.
        backend: "auto", or the backend that has to run. One that does not take an attention which
            is needed raises, and the cache stays as it was.
        static: Keep everything in buffers whose size and place never change, so that
            torch.compile(fullgraph=True) takes a step of one position whole, without compiling it
            again, and CUDA graphs can replay it. It needs `max_seq_len`; batch size and type are
            those of the first positions, which come uncompiled; and there are no gradients.

    Raises:
        TypeError: `pattern` is neither a pattern nor a tuple of them, `max_seq_len` no int,
            `backend` no str, or `static` no bool.
        ValueError: `max_seq_len` is below 1, or None with `static`; the tuple is empty; or no
            backend has that name.
        NotImplementedError: A pattern that is not causal.
    """

    def __init__(
        self,
        pattern: Patterns,
        max_seq_len: int | None = None,
        backend: str = "auto",
        *,
        static: bool = False,
    ) -> None:
        self.pattern = pattern
        self._patterns = pattern if isinstance(pattern, tuple) else (pattern,)
        check_patterns(pattern, len(self._patterns))
        check_backend(backend)
        for each in self._patterns:
            if not each.causal:
                raise NotImplementedError(f"KVCache holds causal patterns only, got {each}.")
        if max_seq_len is not None:
            check_count("max_seq_len", max_seq_len, minimum=1)
        check_flag("static", static)
        if static and max_seq_len is None:
            raise ValueError("static=True needs max_seq_len, got max_seq_len=None.")
        self.static = static
        self.max_seq_len = max_seq_len
        self.backend = backend
        self.evicting = True
        self._groups = self._empty()

    def _empty(self) -> Groups | StaticGroups:
        if self.static:
            assert self.max_seq_len is not None, "checked"
            return StaticGroups(self.pattern, self.max_seq_len)
        return Groups(self.pattern, self.max_seq_len)

    def __repr__(self) -> str:
        whole = any(isinstance(each, StridedPattern | FullPattern) for each in self._patterns)
        kept = "every entry is kept" if whole else f"{self.num_stored} entries kept"
        return f"KVCache({self.pattern}, seq_len={self.seq_len}: {kept})"

    @property
    def seq_lens(self) -> list[int]:
        """Number of positions that were appended to each batch row; empty before the first."""
        return self._groups.seq_lens

    @property
    def lengths(self) -> Tensor:
        """[batch]: `seq_lens` as the tensor in which a cache with static=True counts."""
        assert isinstance(self._groups, StaticGroups), "others count with numbers"
        return self._groups.stores[0].seq_len

    @property
    def seq_len(self) -> int:
        """Number of positions that were appended; of the longest batch row, where they differ."""
        return max(self.seq_lens, default=0)

    @property
    def num_stored(self) -> int:
        """Number of entries that each key head keeps; the most of any batch row and head."""
        kept = [
            num_kept(store.pattern, *(evicted(store.pattern, row) if self.evicting else row))
            for store in self._groups.stores
            for row in store.rows
        ]
        return max(kept, default=0)

    @property
    def nbytes(self) -> int:
        """Number of bytes that are allocated."""
        return sum(t.nbytes for store in self._groups.stores for t in store.buffers)

    def reset(self) -> None:
        """Forget everything, the sizes of a batch too; memory is given back.

        With static=True the buffers stay where they are, and sizes with them.
        """
        if isinstance(self._groups, StaticGroups):
            self._groups.clear()
        else:
            self._groups = self._empty()

    @overload
    def attend(
        self,
        query: Query,
        key: Key,
        value: Value,
        scale: float | None = None,
        padding_mask: Bool[Tensor, "batch q_len"] | None = None,
        *,
        return_lse: Literal[False] = False,
    ) -> Output: ...
    @overload
    def attend(
        self,
        query: Query,
        key: Key,
        value: Value,
        scale: float | None = None,
        padding_mask: Bool[Tensor, "batch q_len"] | None = None,
        *,
        return_lse: Literal[True],
    ) -> tuple[Output, LogSumExp]: ...
    @chunks_uncompiled
    def attend(
        self,
        query: Query,
        key: Key,
        value: Value,
        scale: float | None = None,
        padding_mask: Bool[Tensor, "batch q_len"] | None = None,
        *,
        return_lse: bool = False,
    ) -> Output | tuple[Output, LogSumExp]:
        """Append the next positions' keys and values, and attend with their queries.

        Equals the same rows of `attention` over the whole sequence. A query that has no key gives
        0 and a log-sum-exp of -inf, and so does padding.

        Args:
            query: [batch, heads, q_len, qk_dim].
            key: [batch, kv_heads, q_len, qk_dim].
            value: [batch, kv_heads, q_len, v_dim].
            scale: Factor on the scores; 1/sqrt(qk_dim) if None.
            padding_mask: [batch, q_len], True where there is a token; the others are left out, so
                that batch rows get as many positions as they have tokens. None: all.
            return_lse: Return (out, lse), lse [batch, heads, q_len]; see `attention`.

        Raises:
            TypeError, ValueError: As `attention` and `append`; the cache stays as it was.
            NotImplementedError: The backend that the cache was given does not take this; the cache
                stays as it was.
        """
        query, key, value = cast_as_autocast_would(query, key, value)
        check_tensors(query, key, value)
        if query.shape[2] != key.shape[2]:
            raise ValueError(
                "query, key and value must be those of the same new positions, got "
                f"query.shape={tuple(query.shape)} and key.shape={tuple(key.shape)}."
            )
        call = make_call(query, self._patterns[0], scale, 0.0, return_lse)
        entries, layout = self._groups.append(
            key, value, padding_mask, self.evicting, (query, call, self.backend)
        )
        out, lse = attend_kept(query, entries, layout, call, self.backend)
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    @chunks_uncompiled
    def append(
        self, key: Key, value: Value, padding_mask: Bool[Tensor, "batch q_len"] | None = None
    ) -> Entries:
        """Append keys and values, and return what the queries of these positions may read.

        Returns:
            (keys, values), see `Entries`; `read` takes them.

        Raises:
            TypeError: Other types than before, or a padding mask that is no bool tensor.
            ValueError: Shapes that do not fit, together or with those before, or more positions
                than `max_seq_len`. The cache stays as it was.
        """
        key, value = cast_as_autocast_would(key, value)
        check_tensors(key, key, value)
        pairs, layout = self._groups.append(key, value, padding_mask, self.evicting)
        keys, values = pairs[0]
        if len(pairs) > 1:
            width = max(group.width for group in layout.groups)
            keys, values = (
                join_heads([pad(t, width) for t in ts]) for ts in zip(*pairs, strict=True)
            )
        entries = Entries(keys, values)
        if layout.groups[0].reads is None:  # Else it follows from what the cache holds.
            entries.layout = layout
        return entries

    @overload
    def read(
        self,
        query: Query,
        keys: Key | Entries,
        values: Value | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        *,
        return_lse: Literal[False] = False,
    ) -> Output: ...
    @overload
    def read(
        self,
        query: Query,
        keys: Key | Entries,
        values: Value | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        *,
        return_lse: Literal[True],
    ) -> tuple[Output, LogSumExp]: ...
    @chunks_uncompiled
    def read(
        self,
        query: Query,
        keys: Key | Entries,
        values: Value | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        *,
        return_lse: bool = False,
    ) -> Output | tuple[Output, LogSumExp]:
        """Attend with the queries of appended positions; after `append` it is `attend`.

        Args:
            query: [batch, heads, q_len, qk_dim].
            keys: What `append` returned; or its keys alone, for the positions appended last.
            values: Its values, if `keys` are its keys.
            scale: Factor on the scores; 1/sqrt(qk_dim) if None.
            dropout_p: Share of the weights that is dropped.
            return_lse: Return (out, lse), lse [batch, heads, q_len].

        Raises:
            TypeError, ValueError: As `attention`; or nothing was appended, the queries are not
                those of the appended positions, or `values` come with all that `append` returned.
            NotImplementedError: The backend that the cache was given does not take this.
        """
        layout, is_given = self._groups.layout, isinstance(keys, Entries)
        if isinstance(keys, Entries):
            if values is not None:
                raise ValueError(
                    "what append returned holds the values too: give it alone, and scale and "
                    "dropout_p by name."
                )
            layout, (keys, values) = keys.layout or layout, keys
        if layout is None or values is None:
            raise ValueError("read needs what append returned, and nothing was appended.")
        query, k, v = cast_as_autocast_would(query, keys, values)
        check_together(query, k, v, "[batch, heads, seq, head_dim]")
        # Heads that read alike may be repeated, for example.
        pairs = pairs_of_groups(query, k, v, layout, depends_on_head(self.pattern))
        if is_given and layout.groups[0].reads is not None:
            pairs = [store.buffers for store in self._groups.stores]
        call = make_call(query, self._patterns[0], scale, dropout_p, return_lse)
        out, lse = attend_kept(query, pairs, layout, call, self.backend)
        if not return_lse:
            return out
        assert lse is not None
        return out, lse

    def explain(
        self,
        query: Query,
        key: Key,
        value: Value,
        padding_mask: Bool[Tensor, "batch q_len"] | None = None,
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Explanation | tuple[Explanation, ...]:
        """Say which backend `attend` would take for these positions, and why not each other one.

        With `dropout_p`, which `attend` has not, it is that of `append` and `read`.

        Returns:
            One explanation, or with a tuple of patterns one for each.

        Raises:
            TypeError, ValueError, NotImplementedError: As `attend` for the same inputs.
        """
        query, key, value = cast_as_autocast_would(query, key, value)
        check_tensors(query, key, value)
        call = make_call(query, self._patterns[0], scale, dropout_p)
        step = self._groups.check_new(key, value, padding_mask)
        found = tuple(
            explain_call(*tensors, of_heads, self.backend)
            for tensors, of_heads in self._groups.calls(
                query, key, value, call, *step, self.evicting
            )
        )
        return found if isinstance(self.pattern, tuple) else found[0]

    def crop(self, seq_len: int | list[int]) -> None:
        """Forget the positions from `seq_len` on; batch rows that are shorter stay.

        Args:
            seq_len: For all batch rows, or a list with a number for each.

        Raises:
            TypeError: Anything but integers.
            ValueError: The shorter sequence would read what is gone. Of closed blocks only the
                summaries are left: back to a block's start is possible, into it is not.
        """
        for number in seq_len if isinstance(seq_len, list) else [seq_len]:
            check_count("seq_len", number, minimum=0)
        wanted = seq_len if isinstance(seq_len, list) else [seq_len] * len(self.seq_lens)
        if len(wanted) != len(self.seq_lens):
            raise ValueError(
                f"seq_len must have a number for each of {len(self.seq_lens)} rows, "
                f"got seq_len={seq_len}."
            )
        stores: Sequence[Store | StaticStore] = self._groups.stores
        shorter = [store.shorter(wanted) for store in stores]
        for store, rows in zip(stores, shorter, strict=True):
            store.crop(rows)

    def evict(self) -> None:
        """Let go of what no later position reads.

        It happens by itself when the next position is appended, unless `evicting` is False: then
        everything from then on stays, so that `crop` can go back to it.
        """
        for store in self._groups.stores:
            store.evict()

    def reorder(self, index: Tensor) -> None:
        """Make batch row b what batch row index[b] was, as in beam search.

        Raises:
            TypeError: `index` is no tensor of integers.
            ValueError: Not one index for each row, or an index without a row.
        """
        if check_index(index, len(self.seq_lens)) != len(self.seq_lens):
            raise ValueError(
                f"index must have one entry for each of {len(self.seq_lens)} rows, "
                f"got index.shape={tuple(index.shape)}."
            )
        self.select(index)

    def select(self, index: Tensor) -> None:
        """Keep the batch rows index[0], index[1], … in this order; one may come more than once.

        Raises:
            TypeError: `index` is no tensor of integers.
            ValueError: An index without a row.
        """
        check_index(index, len(self.seq_lens))
        rows = index.tolist()
        for store in self._groups.stores:
            store.select(index, rows)

    def repeat(self, n: int) -> None:
        """Repeat each batch row n times, one after the other, as `repeat_interleave` does."""
        check_count("n", n, minimum=1)
        self.select(torch.arange(len(self.seq_lens), device="cpu").repeat_interleave(n))
