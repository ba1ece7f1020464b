"""One call of a backend: its options, and which keys there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from colonnade.pattern import HasMask
from colonnade.shapes import CuSeqlens, SeenMask


@dataclass(frozen=True)
class Whole:
    """Every position has its key, and the queries are the last positions."""

    reduced = 0
    cu_seqlens = None


@dataclass(frozen=True, eq=False)
class Packed:
    """Documents lie one after the other, batch 1, with as many queries as keys.

    Attributes:
        cu_seqlens: [documents + 1]: 0, then where each document ends. A backend looks into it, see
            `documents.documents_of`: a compiler could not branch on it before.
    """

    cu_seqlens: CuSeqlens
    reduced = 0


@dataclass(frozen=True)
class Kept:
    """The keys hold only the summaries of the leading blocks, as in a cache.

    The pattern is a causal FixedPattern, and the queries are the last positions, behind these
    blocks. Each key head has the summaries of its own sub-block.
    """

    reduced: int
    """Number of leading blocks of which the keys hold only the summary columns."""
    cu_seqlens = None


@dataclass(frozen=True, eq=False)
class Seen:
    """Every query reads all keys, or the marked ones, whatever the pattern says.

    That is the case for a decoder's one query over what its cache keeps.

    Attributes:
        mask: [batch, kv_heads, q_len or 1, kv_len], True where a query reads a key; None: all.
    """

    mask: SeenMask | None


Keys: TypeAlias = Whole | Packed | Kept | Seen


class Call(NamedTuple):
    """Everything that is asked of a backend besides the three tensors."""

    pattern: HasMask
    """The positions that each position reads."""
    scale: float
    """Factor on the scores."""
    dropout_p: float = 0.0
    """Share of the weights that is dropped."""
    return_lse: bool = True
    """Whether the caller wants the log-sum-exp."""
    keys: Keys = Whole()
    """The keys that there are."""


def only_heads(tensor: Tensor, kv_heads: Sequence[int], num_kv_heads: int) -> Tensor:
    """Take some key heads of [batch, heads, …], or their groups of query heads."""
    if len(kv_heads) == num_kv_heads:
        return tensor
    index = torch.tensor(kv_heads, device=tensor.device)
    grouped: Tensor = tensor.unflatten(1, (num_kv_heads, -1))
    return grouped.index_select(1, index).flatten(1, 2)


def in_order(parts: Sequence[Tensor], kv_heads: Sequence[Sequence[int]]) -> Tensor:
    """Put together again what `only_heads` took apart."""
    if len(parts) == 1:
        return parts[0]
    grouped = [t.unflatten(1, (len(h), -1)) for t, h in zip(parts, kv_heads, strict=True)]
    order = torch.tensor([head for heads in kv_heads for head in heads], device="cpu").argsort()
    return torch.cat(grouped, 1).index_select(1, order.to(parts[0].device)).flatten(1, 2)
