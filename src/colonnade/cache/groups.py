"""The entries of all head groups, each of which reads a pattern of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from colonnade.backends.call import Call
from colonnade.backends.choice import choose
from colonnade.backends.tracing.memo import remembered
from colonnade.backends.tracing.operation import contents
from colonnade.cache.store import KeysAndValues, Store
from colonnade.ops.check import check_padding
from colonnade.ops.heads import HeadGroup, Patterns, check_patterns, head_groups
from colonnade.ops.kept import KeptHeads, Layout, expected_call
from colonnade.plan.kept import Lengths
from colonnade.shapes import Key, Query, Value


@runtime_checkable
class _HasBuffers(Protocol):
    """A store, of whatever kind."""

    heads: HeadGroup
    buffers: KeysAndValues


class Groups:
    """A store for each head group; none before the first positions.

    Attributes:
        stores: In the order of the key heads.
        layout: How the entries lie for the queries of the positions that were appended last.
    """

    def __init__(self, patterns: Patterns, max_seq_len: int | None) -> None:
        self.patterns = patterns
        self.max_seq_len = max_seq_len
        self.stores: list[Store] = []
        self.layout: Layout | None = None

    @property
    def seq_lens(self) -> list[int]:
        """Number of positions of each batch row."""
        return [row.seq_len for row in self.stores[0].rows] if self.stores else []

    def append(
        self,
        key: Key,
        value: Value,
        padding_mask: Bool[Tensor, "batch q_len"] | None,
        evicting: bool,
        asked: tuple[Query, Call, str] | None = None,
    ) -> tuple[list[KeysAndValues], Layout]:
        """Append new positions; return the entries of each head group, and how they lie.

        A query, its call and the backend that has to run it may be `asked` for: the backend is
        tried before anything changes.
        """
        counts, is_token = self.check_new(key, value, padding_mask)
        if asked is not None and asked[2] != "auto":
            query, call, backend = asked
            for tensors, expected in self.calls(
                query, key, value, call, counts, is_token, evicting
            ):
                choose(*tensors, expected, backend)
        self.stores = self.stores or self._new_stores(key, value)
        entries, groups = [], []
        for store in self.stores:
            new = key, value
            if len(self.stores) > 1:
                new = store.heads.of(key, key.shape[1]), store.heads.of(value, value.shape[1])
            of_heads, rows = store.append(*new, counts, is_token, evicting)
            entries.append(of_heads)
            groups.append(KeptHeads(store.heads, rows, of_heads.keys.shape[2]))
        self.layout = Layout(groups, is_token, key.shape[2])
        return entries, self.layout

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
        """Yield the call that will follow `append` for each head group, with its tensors.

        Nothing is changed. The tensors have the type, device and need of gradients of those that
        will be read, not their length.
        """
        for store in self.stores or self._new_stores(key, value):
            q, k, v = (store.heads.of(t, key.shape[1]) for t in (query, key, value))
            if any(t.requires_grad for t in store.buffers):
                k, v = store.buffers
            step = store.next_step(counts, evicting)
            kept = KeptHeads(store.heads, step.groups, step.width)
            yield (q, k, v), expected_call(call, kept, is_token, query.shape[2])

    def _new_stores(self, key: Key, value: Value) -> list[Store]:
        """Make a store for each head group, with the sizes of these tensors and no entry."""
        batch, kv_heads = key.shape[:2]
        empty = key[:, :, :0].detach(), value[:, :, :0].detach()
        return [
            Store(
                heads,
                self.max_seq_len,
                KeysAndValues(*(heads.of(t, kv_heads) for t in empty)),
                [Lengths()] * batch,
            )
            for heads in head_groups(self.patterns, kv_heads)
        ]

    def check_new(
        self, key: Key, value: Value, padding_mask: Bool[Tensor, "batch q_len"] | None
    ) -> tuple[list[int], Tensor | None]:
        """Refuse what cannot be appended; return how many tokens come, and which they are."""
        batch, num_kv_heads, length = key.shape[:3]
        counts, is_token = [length] * batch, None
        if padding_mask is not None:
            check_padding(padding_mask, "the new positions", (batch, length))
            if contents(padding_mask) is None or key.is_meta:
                raise NotImplementedError(
                    "a cache counts the tokens in padding_mask, which has no contents here: it "
                    "or the key is a meta or fake tensor, or torch.vmap maps it. Leave it out."
                )
            counts = _num_tokens(padding_mask)
            if any(count < length for count in counts):
                # A copy: it is read again with the entries, whatever becomes of the caller's.
                is_token = padding_mask.clone().to(key.device)
        before = self.seq_lens or [0] * batch
        # Another batch size is refused below.
        longest = max((n + c for n, c in zip(before, counts, strict=False)), default=0)
        if self.max_seq_len is not None and longest > self.max_seq_len:
            raise ValueError(too_many(self.max_seq_len, max(before), max(counts)))
        if self.stores:
            check_as_before(self.stores, key, value)
        else:
            check_patterns(self.patterns, num_kv_heads)
        return counts, is_token


@remembered
def _num_tokens(padding_mask: Bool[Tensor, "batch q_len"]) -> list[int]:
    """Count the tokens of each batch row, once for all layers of a step."""
    counts: list[int] = padding_mask.sum(1).tolist()
    return counts


def too_many(max_seq_len: int, taken: int, more: int) -> str:
    """Return the error for more positions than a cache has room for."""
    return (
        f"the cache has room for max_seq_len positions, got max_seq_len={max_seq_len}, {taken} of "
        f"them taken, and {more} more."
    )


def check_as_before(stores: Sequence[_HasBuffers], key: Key, value: Value) -> None:
    """Refuse new keys or values that do not go on from those that are kept."""
    for index, (name, tensor) in enumerate((("key", key), ("value", value))):
        buffer = stores[0].buffers[index]
        shape = (buffer.shape[0], stores[-1].heads.stop, buffer.shape[3])
        if (*tensor.shape[:2], tensor.shape[3]) != shape:
            raise ValueError(
                f"{name} must have batch, heads and head width as before, {shape}, "
                f"got {name}.shape={tuple(tensor.shape)}."
            )
        if tensor.dtype != buffer.dtype:
            raise TypeError(
                f"{name} must have the dtype of those before, {buffer.dtype}, "
                f"got {name}.dtype={tensor.dtype}."
            )
        if tensor.device != buffer.device:
            raise ValueError(
                f"{name} must be on the device of those before, {buffer.device}, "
                f"got {name}.device={tensor.device}."
            )
