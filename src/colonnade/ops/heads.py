"""Attention whose heads may read different patterns, over plain, padded or packed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from colonnade.backends.dropout import Dropout
from colonnade.ops.attention import attend, attend_packed
from colonnade.ops.check import as_dropout, check_not_traced
from colonnade.ops.packing import Packing
from colonnade.ops.sink_logits import check_sink_logits, with_sink_logits
from colonnade.pattern import Pattern
from colonnade.shapes import Key, Output, Query, Value

Patterns: TypeAlias = Pattern | tuple[Pattern, ...]
"""One pattern for all heads, or one for each of several head groups."""


def depends_on_head(patterns: Patterns) -> bool:
    """Whether the number of a key head says what it reads."""
    if isinstance(patterns, tuple):
        return len(patterns) > 1 or depends_on_head(patterns[0])
    return getattr(patterns, "subblocks", 1) > 1


class HeadGroup(NamedTuple):
    """Key heads first … stop - 1, which read one pattern."""

    pattern: Pattern
    first: int
    stop: int

    def of(self, tensor: Tensor, num_kv_heads: int) -> Tensor:
        """Take the group's key heads of [batch, heads, …], or the query heads that read them."""
        each = tensor.shape[1] // num_kv_heads
        return tensor[:, self.first * each : self.stop * each]

    def part_of(self, dropout: Dropout, each: int) -> Dropout:
        """Return the group's part of a dropout; a key head has that many query heads."""
        return dropout._replace(first_head=dropout.first_head + self.first * each)


class HeadOptions(NamedTuple):
    """What the heads of one group have of their own, besides tensors."""

    pattern: Pattern
    dropout: Dropout
    sink_logits: Float[Tensor, " heads"] | None
    """See `with_sink_logits`; None: there are none."""

    def finish(
        self,
        out: Float[Tensor, "*batch heads q_len v_dim"],
        lse: Float[Tensor, "*batch heads q_len"] | None,
    ) -> Float[Tensor, "*batch heads q_len v_dim"]:
        """Return the output of a call with the learnt sink logits, which ask for its lse."""
        if self.sink_logits is None:
            return out
        assert lse is not None, "asked for"
        return with_sink_logits(out, lse, self.sink_logits)


def head_groups(patterns: Patterns, num_kv_heads: int) -> Iterator[HeadGroup]:
    """Split the key heads into one group for each pattern; the first ones are longer by one."""
    if not isinstance(patterns, tuple):
        yield HeadGroup(patterns, 0, num_kv_heads)
        return
    check_not_traced()
    each, longer = divmod(num_kv_heads, len(patterns))
    first = 0
    for index, pattern in enumerate(patterns):
        stop = first + each + (index < longer)
        yield HeadGroup(pattern, first, stop)
        first = stop


def in_head_groups(
    attend: Callable[[HeadOptions, Query, Key, Value], Tensor],
    patterns: Patterns,
    dropout: Dropout,
    query: Query,
    key: Key,
    value: Value,
    sink_logits: Tensor | None = None,
) -> Output:
    """Call `attend` for each head group by itself, and put the results together.

    All of them drop weights by one seed, which is drawn here if it was not before.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    dropout = dropout.drawn(query.device)
    if sink_logits is not None:
        check_sink_logits(sink_logits, heads)
    parts = []
    for group in head_groups(patterns, kv_heads):
        logits = None if sink_logits is None else group.of(sink_logits[None], kv_heads)[0]
        options = HeadOptions(group.pattern, group.part_of(dropout, heads // kv_heads), logits)
        parts.append(attend(options, *(group.of(t, kv_heads) for t in (query, key, value))))
    return join_heads(parts)


def join_heads(parts: Sequence[Tensor]) -> Tensor:
    """Put the results of head groups together: [batch, heads, …]."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


class _Options(TypedDict):
    scale: float | None
    dropout: Dropout
    return_lse: bool
    backend: str


def attention_in_groups(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    packing: Packing | None = None,
    scale: float | None = None,
    dropout: float | Dropout = 0.0,
    backend: str = "auto",
    sink_logits: Float[Tensor, " heads"] | None = None,
) -> Output:
    """`attention`, or under a packing `attention_varlen`, for each head group by its pattern.

    Args:
        query: [batch, heads, q_len, qk_dim].
        key: [batch, kv_heads, kv_len, qk_dim].
        value: [batch, kv_heads, kv_len, v_dim].
        patterns: Anything that `check_patterns` accepts.
        packing: Which tokens there are, and which belong together; 0 comes out where there is none.
        scale: Factor on the scores; 1/sqrt(qk_dim) if None.
        dropout: Share of the weights that is dropped; or, of a part of a larger call, which part.
        backend: "auto", or the backend that has to run.
        sink_logits: One more score in the softmax of each query head; see `with_sink_logits`.
    """

    def attend_group(of_heads: HeadOptions, query: Query, key: Key, value: Value) -> Output:
        options: _Options = {
            "scale": scale,
            "dropout": of_heads.dropout,
            "return_lse": sink_logits is not None,
            "backend": backend,
        }
        if packing is None:
            return of_heads.finish(*attend(query, key, value, of_heads.pattern, **options))
        q, k, v = (packing.pack(t.transpose(1, 2)) for t in (query, key, value))
        out, lse = attend_packed(q, k, v, packing.cu_seqlens, of_heads.pattern, **options)
        finished = of_heads.finish(out.transpose(0, 1), lse)
        return packing.unpack(finished.transpose(0, 1)).transpose(1, 2)

    dropout = as_dropout(dropout)
    return in_head_groups(attend_group, patterns, dropout, query, key, value, sink_logits)


def check_patterns(patterns: Patterns, num_kv_heads: int) -> None:
    """Refuse anything but a pattern, or a tuple of at most as many as there are key heads."""
    for pattern in patterns if isinstance(patterns, tuple) else (patterns,):
        if not isinstance(pattern, Pattern):
            raise TypeError(
                f"pattern must be a Pattern or a tuple of them, got a {type(pattern).__name__}."
            )
    if isinstance(patterns, tuple) and not 1 <= len(patterns) <= num_kv_heads:
        raise ValueError(
            "a tuple of patterns needs a key head for each, got "
            f"len(pattern)={len(patterns)} and num_kv_heads={num_kv_heads}."
        )
