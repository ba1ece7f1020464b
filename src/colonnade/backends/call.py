"""One call of a backend: its options, and which keys there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from colonnade.backends.dropout import Dropout
from colonnade.pattern import HasMask
from colonnade.shapes import CuSeqlens, Positions, SeenMask


@dataclass(frozen=True)
class Whole:
    """Every position has its key, and the queries are the last positions."""

    begin = 0
    cu_seqlens = None


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents lie one after the other, batch 1, with as many queries as keys.

    Attributes:
        cu_seqlens: [documents + 1]: 0, then where each document ends. A backend looks into it, see
            `documents.documents_of`: a compiler could not branch on it before.
    """

    cu_seqlens: CuSeqlens
    begin = 0


@dataclass(frozen=True)
class Kept:
    """Before a position the keys hold only what all later ones read, as in a cache.

    These are the slots, sinks and summaries, of a causal FixedPattern or of a LocalPattern, see
    `plan.kept`; each key head has the summaries of its own sub-block. The queries are the last
    positions, behind it, and whatever else they read is there.
    """

    begin: int
    """That position; of a FixedPattern the start of a block."""
    cu_seqlens = None


@dataclass(frozen=True, eq=False)
class Seen:
    """Every query reads all keys, or the marked ones, whatever the pattern says.

    That is the case for a decoder's one query over what its cache keeps.

    Attributes:
        mask: [batch, kv_heads, q_len or 1, kv_len], True where a query reads a key; None: all.
        query: [batch or 1, q_len], the position of each query; needed if weights are dropped.
        key: [batch or 1, kv_heads or 1, kv_len], the position of each key; needed then, too.
    """

    mask: SeenMask | None
    query: Positions | None = None
    key: Positions | None = None


Keys: TypeAlias = Whole | Packed | Kept | Seen


class Call(NamedTuple):
    """Everything that is asked of a backend besides the three tensors."""

    pattern: HasMask
    """The positions that each position reads."""
    scale: float
    """Factor on the scores."""
    dropout: Dropout = Dropout()
    """The weights that are dropped."""
    return_lse: bool = True
    """Whether the caller wants the log-sum-exp."""
    keys: Keys = Whole()
    """The keys that there are."""


def only_heads(tensor: Tensor, kv_heads: range, num_kv_heads: int) -> Tensor:
    """Take some key heads of [batch, heads, …], or their groups of query heads."""
    if len(kv_heads) == num_kv_heads:
        return tensor
    grouped: Tensor = tensor.unflatten(1, (num_kv_heads, -1))
    return grouped[:, kv_heads.start : kv_heads.stop : kv_heads.step].contiguous().flatten(1, 2)


def in_order(parts: Sequence[Tensor], kv_heads: Sequence[range]) -> Tensor:
    """Put together again what `only_heads` took apart."""
    if len(parts) == 1:
        return parts[0]
    grouped = [t.unflatten(1, (len(h), -1)) for t, h in zip(parts, kv_heads, strict=True)]
    shape = grouped[0].shape
    together = grouped[0].new_empty(shape[0], sum(map(len, kv_heads)), *shape[2:])
    for heads, part in zip(kv_heads, grouped, strict=True):
        together[:, heads.start : heads.stop : heads.step] = part
    by_head: Tensor = together.flatten(1, 2)
    return by_head
