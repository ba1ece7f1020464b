"""The entries of all head groups of a cache of fixed size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from colonnade.backends.call import Call, Seen
from colonnade.backends.choice import choose
from colonnade.backends.tracing.device import is_capturing
from colonnade.backends.tracing.uncompiled import caller_without_compiler
from colonnade.cache.groups import Groups, check_as_before, too_many
from colonnade.cache.static import StaticStore
from colonnade.cache.store import KeysAndValues
from colonnade.ops.check import check_padding
from colonnade.ops.heads import Patterns, head_groups
from colonnade.ops.kept import KeptHeads, Layout
from colonnade.shapes import Key, Query, Value

Method = TypeVar("Method", bound=Callable[..., Any])


class StaticGroups:
    """A store of fixed size for each head group; none before the first positions.

    It does for `KVCache` what `Groups` does.

    Attributes:
        stores: In the order of the key heads.
        uncompiled: Calls a function where a compiler must not follow.
    """

    def __init__(self, patterns: Patterns, max_seq_len: int) -> None:
        self.patterns = patterns
        self.max_seq_len = max_seq_len
        self.stores: list[StaticStore] = []
        self.uncompiled = caller_without_compiler()
        # Made here: for another cache a compiler takes the number for a symbol, and writes no text.
        self._rule = f"the cache has room for max_seq_len={max_seq_len} positions, got more."
        self._of_chunk: Layout | None = None

    @property
    def seq_lens(self) -> list[int]:
        """Number of positions of each batch row."""
        return self.stores[0].seq_len.tolist() if self.stores else []

    @property
    def layout(self) -> Layout | None:
        """How the entries lie for the queries of the positions that were appended last."""
        if self._of_chunk is not None or not self.stores:
            return self._of_chunk
        groups = [
            KeptHeads(store.heads, [], store.sizes.entries, store.reads(), store.places)
            for store in self.stores
        ]
        return Layout(groups, None, 1)

    def append(
        self,
        key: Key,
        value: Value,
        padding_mask: Bool[Tensor, "batch q_len"] | None,
        evicting: bool,
        asked: tuple[Query, Call, str] | None = None,
    ) -> tuple[list[KeysAndValues], Layout]:
        """Append new positions as `Groups.append` does.

        Raises:
            NotImplementedError: Everything is to be kept, or gradients are wanted.
        """
        _refuse_what_has_no_room(key, value, evicting)
        if not self.takes_chunk(key):
            return self._step(key, value, padding_mask, asked)
        growing = self._unpacked()
        entries, layout = growing.append(key, value, padding_mask, True, asked)
        if not self.stores:
            kv_heads = key.shape[1]
            self.stores = [
                StaticStore.empty(
                    group, self.max_seq_len, group.of(key, kv_heads), group.of(value, kv_heads)
                )
                for group in head_groups(self.patterns, kv_heads)
            ]
        for store, grown in zip(self.stores, growing.stores, strict=True):
            store.pack(grown)
        self._of_chunk = layout
        return entries, layout

    def _step(
        self,
        key: Key,
        value: Value,
        padding_mask: Bool[Tensor, "batch 1"] | None,
        asked: tuple[Query, Call, str] | None,
    ) -> tuple[list[KeysAndValues], Layout]:
        check_as_before(self.stores, key, value)
        is_token = padding_mask
        if padding_mask is not None:
            check_padding(padding_mask, "the new positions", (key.shape[0], 1))
            is_token = padding_mask.to(key.device)
        self._require_room(is_token)
        if asked is not None and asked[2] != "auto":
            query, call, backend = asked
            for tensors, expected in self._calls_of_step(query, key, value, call):
                choose(*tensors, expected, backend)
        self._of_chunk = None
        for store in self.stores:
            store.step(
                store.heads.of(key, key.shape[1]), store.heads.of(value, key.shape[1]), is_token
            )
        layout = self.layout
        assert layout is not None, "there are stores"
        return [store.buffers for store in self.stores], layout

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a process has to make for itself."""
        return {name: each for name, each in self.__dict__.items() if name != "uncompiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a cache that was copied, or pickled."""
        self.__dict__.update(state, uncompiled=caller_without_compiler())

    def _require_room(self, is_token: Bool[Tensor, "batch 1"] | None) -> None:
        """Refuse more than `max_seq_len` positions; in a graph, when that runs."""
        before = self.stores[0].seq_len
        after = before + (1 if is_token is None else is_token[:, 0])
        if torch.compiler.is_compiling() or is_capturing(before.device):
            torch._assert_async((after <= self.max_seq_len).all(), self._rule)
        elif max(after.tolist(), default=0) > self.max_seq_len:
            raise ValueError(too_many(self.max_seq_len, max(before.tolist()), 1))

    def calls(
        self,
        query: Query,
        key: Key,
        value: Value,
        call: Call,
        counts: Sequence[int],
        is_token: Tensor | None,
        evicting: bool,
    ) -> Iterator[tuple[tuple[Query, Key, Value], Call]]:
        """Yield the call that will follow `append` for each head group, with its tensors."""
        _refuse_what_has_no_room(key, value, evicting)
        if not self.takes_chunk(key):
            return self._calls_of_step(query, key, value, call)
        return self._unpacked().calls(query, key, value, call, counts, is_token, True)

    def _calls_of_step(
        self, query: Query, key: Key, value: Value, call: Call
    ) -> Iterator[tuple[tuple[Query, Key, Value], Call]]:
        for store in self.stores:
            q = store.heads.of(query, key.shape[1])
            yield (
                (q, *store.buffers),
                call._replace(pattern=store.pattern, keys=Seen(None)),
            )

    def check_new(
        self, key: Key, value: Value, padding_mask: Bool[Tensor, "batch q_len"] | None
    ) -> tuple[list[int], Tensor | None]:
        """Refuse what cannot be appended; return how many tokens come, and which they are."""
        return self._unpacked().check_new(key, value, padding_mask)

    def takes_chunk(self, new: Tensor) -> bool:
        """Whether new positions are more than a step: one position behind others.

        A tensor of them is given.
        """
        return new.shape[2] != 1 or not self.stores

    def clear(self) -> None:
        """Forget every position; the buffers stay where they are."""
        self._of_chunk = None
        for store in self.stores:
            store.clear()

    def _unpacked(self) -> Groups:
        """Return a copy that grows."""
        growing = Groups(self.patterns, self.max_seq_len)
        growing.stores = [store.unpacked() for store in self.stores]
        return growing


def _refuse_what_has_no_room(key: Key, value: Value, evicting: bool) -> None:
    if not evicting:
        raise NotImplementedError(
            "a cache with static=True has no room for positions that may be taken back, got "
            "evicting=False (assisted decoding asks for it). Use a cache without static=True."
        )
    if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
        raise NotImplementedError(
            "a cache with static=True is written in place and has no gradients, got keys or values "
            "with requires_grad=True. Call it under torch.no_grad(), or use a cache without "
            "static=True."
        )


def chunks_uncompiled(method: Method) -> Method:
    """Have a method of `KVCache` called as it is where a compiler meets a chunk for a static cache.

    It works with numbers on the host, which would break the graph anyway.
    """

    @functools.wraps(method)
    def call(cache: Any, *arguments: Any, **options: Any) -> Any:
        if cache.static and torch.compiler.is_compiling():
            new = arguments[0] if arguments else options.get("query", options.get("key"))
            if cache._groups.takes_chunk(new):
                return cache._groups.uncompiled(method, cache, *arguments, **options)
        return method(cache, *arguments, **options)

    return call  # type: ignore[return-value]  # It takes and gives the same.
