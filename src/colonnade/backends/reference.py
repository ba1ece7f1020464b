"""Backend "reference": softmax over a dense mask. The specification that the others are held to.

It takes any pattern, and any other object with a `mask(seq_len, num_heads)` method: attention over
an arbitrary connectivity S. Time and memory grow like q_len · kv_len.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.backends.call import Request, by_documents
from colonnade.pattern import FixedPattern
from colonnade.plan.kept import kept_positions
from colonnade.shapes import Key, LogSumExp, Mask, Output, Query, Value


def unusable(build: bool = True) -> None:
    """It runs wherever PyTorch does, and has nothing to be built."""
    return


def declines(query: Query, key: Key, value: Value, request: Request) -> str | None:
    """Why this backend does not take these inputs: it takes all."""
    return None


def attend(query: Query, key: Key, value: Value, request: Request) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over the mask's last q_len rows, and the log of its denominator."""
    if request.cu_seqlens is not None:
        alone = replace(request, cu_seqlens=None)
        out, lse = by_documents(
            lambda q, k, v: attend(q, k, v, alone), request.cu_seqlens, query, key, value
        )
        return out, lse
    compute = torch.promote_types(query.dtype, torch.float32)
    q_len, kv_len, num_kv_heads = query.shape[2], key.shape[2], key.shape[1]
    mask = _mask(request, kv_len, num_kv_heads)
    mask = mask[:, None, mask.shape[1] - q_len :].to(query.device)
    grouped = query.unflatten(1, (num_kv_heads, -1)).to(compute)
    scores = grouped @ key[:, :, None].to(compute).mT * request.scale
    # A row that reads nothing has no softmax: it runs over zeros, and is set aside afterwards.
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    weights = F.dropout(weights, request.dropout_p)
    out = weights @ value[:, :, None].to(compute)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def _mask(request: Request, kv_len: int, num_kv_heads: int) -> Mask:
    """[kv_heads, positions, kv_len]: all positions are as many as keys, unless some are reduced."""
    pattern = request.pattern
    if request.reduced == 0:
        shape = num_kv_heads, kv_len, kv_len
        return _checked(pattern.mask(kv_len, num_kv_heads), shape)
    assert isinstance(pattern, FixedPattern)
    seq_len = kv_len + request.reduced * (pattern.stride - pattern.summary)
    kept = [kept_positions(pattern, seq_len, request.reduced, h) for h in range(num_kv_heads)]
    mask = pattern.mask(seq_len, num_kv_heads)
    return torch.stack([mask[head][:, positions] for head, positions in enumerate(kept)])


def _checked(mask: Mask, shape: tuple[int, int, int]) -> Mask:
    """A mask from any object, refused if it would broadcast or mean something else."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        found = (
            f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        )
        raise ValueError(
            "pattern.mask(seq_len, num_heads) must be a bool tensor [num_heads, seq_len, seq_len] "
            f"= {shape}, got {found}."
        )
    return mask
