"""What a cache hands out of its entries, and takes back to read them."""

from __future__ import annotations

import torch
from torch import Tensor

from colonnade.cache.store import KeysAndValues
from colonnade.ops.kept import Layout
from colonnade.shapes import Key, Query, Value


class Entries(KeysAndValues):
    """The entries that the queries of appended positions may read; unpacks as (keys, values).

    [batch, kv_heads, kept, …] each: the summaries of closed blocks, then every position from the
    first block on that is still open for one of these queries. A shorter batch row, or head group,
    is followed by zeros. They may be views of the cache, good until it is used next.
    """

    layout: Layout | None = None
    """The way in which `KVCache.read` reads them; None: as those that were appended last."""


def pairs_of_groups(
    query: Query, keys: Key, values: Value, layout: Layout, numbers_matter: bool
) -> list[KeysAndValues]:
    """Return the entries of each head group, out of those of all heads.

    Args:
        query: The queries that will read them.
        keys: What `KVCache.append` returned.
        values: The values of the same entries.
        layout: The way in which they lie.
        numbers_matter: Whether all key heads must be there, because their numbers say what is read.

    Raises:
        ValueError: They are not those of the layout.
    """
    if query.shape[2] != layout.q_len:
        raise ValueError(
            f"query must be those of the {layout.q_len} positions that were appended, got "
            f"query.shape={tuple(query.shape)}."
        )
    kv_heads, entries = layout.groups[-1].heads.stop, max(g.width for g in layout.groups)
    if not numbers_matter:
        kv_heads = keys.shape[1]
    if keys.shape[1:3] != (kv_heads, entries):
        raise ValueError(
            "keys and values must be those that append returned, [batch, kv_heads, entries] = "
            f"{(keys.shape[0], kv_heads, entries)}, got {tuple(keys.shape[:3])}."
        )
    if len(layout.groups) == 1:
        return [KeysAndValues(keys, values)]
    return [
        KeysAndValues(
            *(t[:, group.heads.first : group.heads.stop, : group.width] for t in (keys, values))
        )
        for group in layout.groups
    ]


def check_index(index: Tensor, rows: int) -> int:
    """Refuse anything but numbers of batch rows; return how many there are."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64):
        found = getattr(index, "dtype", type(index).__name__)
        raise TypeError(f"index must be a tensor of int32 or int64, got {found}.")
    if index.dim() != 1 or not all(0 <= row < rows for row in index.tolist()):
        raise ValueError(f"index must be a row of numbers in [0, {rows}), got index={index}.")
    return len(index)
