"""Backend "reference": softmax over a dense mask. The specification that the others are held to.

It takes any pattern, and any other object with a `mask(seq_len, num_heads)` method: attention over
an arbitrary connectivity S. Time and memory grow like q_len · kv_len.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from jaxtyping import Int
from torch import Tensor

from colonnade.backends.call import Call, Kept, Packed, Seen, Whole
from colonnade.backends.documents import by_documents, check_documents
from colonnade.backends.dropout import factors
from colonnade.backends.tracing.operation import may_decide
from colonnade.pattern import HasMask, Pattern
from colonnade.plan.kept import kept_positions, num_positions
from colonnade.plan.places import kept_places, last_places
from colonnade.shapes import (
    CuSeqlens,
    Key,
    LogSumExp,
    Mask,
    Output,
    Positions,
    Query,
    SeenMask,
    Value,
)


def reason_unusable(build: bool = True) -> None:
    """It runs wherever PyTorch does, and has nothing to be built."""


def reason_declined(query: Query, key: Key, value: Value, call: Call) -> None:
    """It takes everything."""


def attend(query: Query, key: Key, value: Value, call: Call) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v under a dense mask, and the log of its denominator."""
    if isinstance(call.keys, Packed) and may_decide(call.keys.cu_seqlens):
        alone = call._replace(keys=Whole())
        out, lse = by_documents(
            lambda numbers, q, k, v: _attend(q, k, v, alone, numbers),
            call.keys.cu_seqlens,
            query,
            key,
            value,
        )
        return out, lse
    return _attend(query, key, value, call, torch.arange(query.shape[0], device=query.device))


def _attend(
    query: Query, key: Key, value: Value, call: Call, row: Int[Tensor, " batch"]
) -> tuple[Output, LogSumExp]:
    """Attend with the batch rows, or documents, of these numbers."""
    compute = torch.promote_types(query.dtype, torch.float32)
    q_len, kv_len, num_kv_heads = query.shape[2], key.shape[2], key.shape[1]
    # Whatever the default device is; a compiler cannot enter another one.
    with nullcontext() if torch.compiler.is_compiling() else torch.device("cpu"):
        mask = _mask(call, q_len, kv_len, num_kv_heads)
    mask = mask.to(query.device)[:, :, None]
    grouped = query.unflatten(1, (num_kv_heads, -1)).to(compute)
    scores = grouped @ key[:, :, None].to(compute).mT * call.scale
    # A row that reads nothing has no softmax: it runs over zeros, and is set aside afterwards.
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    if call.dropout.p > 0:
        document, *places = _places(call, q_len, kv_len, num_kv_heads)
        document, q_place, k_place = (each.to(query.device) for each in (document, *places))
        head = torch.arange(query.shape[1], device=query.device).view(1, num_kv_heads, -1, 1)
        row = row[:, None, None, None] + document
        k_place = k_place[:, :, None]
        weights = weights * factors(call.dropout, row, head, q_place[:, None, None], k_place)
    out = weights @ value[:, :, None].to(compute)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def _mask(call: Call, q_len: int, kv_len: int, num_kv_heads: int) -> SeenMask:
    """[batch or 1, kv_heads, q_len or 1, kv_len], True where a query reads a key."""
    pattern, keys = call.pattern, call.keys
    if isinstance(keys, Seen):
        every = torch.ones(1, num_kv_heads, 1, kv_len, dtype=torch.bool, device="cpu")
        return every if keys.mask is None else keys.mask
    if isinstance(keys, Kept):
        assert isinstance(pattern, Pattern)
        seq_len = num_positions(pattern, kv_len, keys.begin)
        kept = kept_positions(pattern, seq_len, keys.begin, num_kv_heads)
        whole = pattern.mask(seq_len, num_kv_heads)
        mask = torch.stack([whole[head][:, positions] for head, positions in enumerate(kept)])
    elif isinstance(keys, Packed):
        mask = _mask_of_documents(pattern, keys.cu_seqlens, kv_len, num_kv_heads)
    else:
        shape = num_kv_heads, kv_len, kv_len
        mask = _checked(pattern.mask(kv_len, num_kv_heads), shape)
    # Not a slice: a compiler would ask whether there are fewer queries than keys.
    last = torch.arange(q_len, device=mask.device) + (mask.shape[1] - q_len)
    return mask.index_select(1, last)[None]


def _places(
    call: Call, q_len: int, kv_len: int, num_kv_heads: int
) -> tuple[Positions, Positions, Positions]:
    """Return documents, and the positions of queries and keys.

    They are [q_len or 1], [batch or 1, q_len] and [batch or 1, kv_heads or 1, kv_len].
    """
    pattern, keys = call.pattern, call.keys
    if isinstance(keys, Seen):
        assert keys.query is not None
        assert keys.key is not None
        return torch.zeros(1, dtype=torch.long, device=keys.query.device), keys.query, keys.key
    if isinstance(keys, Packed):
        document, inside = _inside(keys.cu_seqlens, kv_len)
        return document, inside[None], inside[None, None]
    if isinstance(keys, Kept):
        assert isinstance(pattern, Pattern)
        places = kept_places(pattern, q_len, kv_len, keys.begin, num_kv_heads)
    else:
        places = last_places(q_len, kv_len)
    return places.document, places.query[None], places.key[None]


def _inside(ends: CuSeqlens, total: int) -> tuple[Positions, Positions]:
    """Return the document of each token, and its position there, where nobody may look at them."""
    position = torch.arange(total, device=ends.device)
    # Of all boundaries, which are two at least: a compiler asks whether there is only one number.
    document = (position[:, None] >= ends).sum(1) - 1
    return document, position - ends[document]


def _mask_of_documents(pattern: HasMask, ends: CuSeqlens, total: int, num_kv_heads: int) -> Mask:
    """Mark what is read inside each document, where nobody may look at how long they are."""
    if not isinstance(pattern, Pattern):
        raise NotImplementedError(
            "an object that has only a mask needs the lengths of documents, and cu_seqlens has no "
            "contents here: it is a meta or fake tensor, torch.vmap maps it, or a compiler holds "
            "it. Use a Pattern, or attention for each document."
        )
    check_documents(ends, total)
    document, inside = _inside(ends, total)
    together = document[:, None] == document
    read = [pattern.reads(inside[:, None], inside, head) for head in range(num_kv_heads)]
    return torch.stack(read) & together


def _checked(mask: Mask, shape: tuple[int, int, int]) -> Mask:
    """Refuse the mask of an object if it would broadcast or mean something else."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        found = (
            f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        )
        raise ValueError(
            "pattern.mask(seq_len, num_heads) must be a bool tensor [num_heads, seq_len, seq_len] "
            f"= {shape}, got {found}."
        )
    return mask
