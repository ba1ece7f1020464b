"""One attention whose heads may read different patterns, over plain, padded or packed batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from colonnade.ops.attention import attention, attention_varlen
from colonnade.ops.packing import Packing
from colonnade.pattern import Pattern
from colonnade.shapes import Key, Output, Query, Value

Patterns: TypeAlias = Pattern | tuple[Pattern, ...]
"""One pattern for all heads, or one for each of several runs of key heads."""


def attend(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    packing: Packing | None = None,
    **options: Any,
) -> Output:
    """`attention`, or under a packing `attention_varlen`, for each run of heads by its pattern.

    Args:
        query: [batch, heads, q_len, qk_dim].
        key: [batch, kv_heads, kv_len, qk_dim].
        value: [batch, kv_heads, kv_len, v_dim].
        patterns: What `check_patterns` lets pass.
        packing: Which tokens there are, and which belong together; 0 comes out where there is none.
        **options: To the operation: scale, dropout_p, backend.
    """
    outs = []
    for pattern, first, stop in runs_of_heads(patterns, key.shape[1]):
        group = query.shape[1] // key.shape[1]
        q, k, v = query[:, first * group : stop * group], key[:, first:stop], value[:, first:stop]
        if packing is None:
            out = attention(q, k, v, pattern, **options)
        else:
            q, k, v = (packing.pack(t.transpose(1, 2)) for t in (q, k, v))
            out = attention_varlen(q, k, v, packing.cu_seqlens, pattern, **options)
            assert isinstance(out, Tensor)
            out = packing.unpack(out).transpose(1, 2)
        assert isinstance(out, Tensor)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


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


def runs_of_heads(patterns: Patterns, num_kv_heads: int) -> Iterator[tuple[Pattern, int, int]]:
    """Each pattern with its key heads first … stop - 1; the first runs are longer by one."""
    if not isinstance(patterns, tuple):
        patterns = (patterns,)
    each, longer = divmod(num_kv_heads, len(patterns))
    first = 0
    for index, pattern in enumerate(patterns):
        stop = first + each + (index < longer)
        yield pattern, first, stop
        first = stop
