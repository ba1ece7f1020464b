"""Backend "reference": softmax over a dense mask. The specification that the others are held to.

It takes any pattern, and any other object with a `mask(seq_len, num_heads)` method: attention over
an arbitrary connectivity S. Time and memory grow like q_len · kv_len.
"""

from __future__ import annotations

import math

import torch

from colonnade.pattern import HasMask
from colonnade.shapes import Key, LogSumExp, Output, Query, Value


def declines(query: Query, key: Key, value: Value, pattern: HasMask) -> str | None:
    """Why this backend does not take these inputs: it takes all."""
    return None


def attend(
    query: Query, key: Key, value: Value, pattern: HasMask, scale: float
) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over the mask's last q_len rows, and the log of its denominator."""
    compute = torch.promote_types(query.dtype, torch.float32)
    q_len, kv_len, num_kv_heads = query.shape[2], key.shape[2], key.shape[1]
    mask = pattern.mask(kv_len, num_kv_heads)[:, None, kv_len - q_len :].to(query.device)
    grouped = query.unflatten(1, (num_kv_heads, -1)).to(compute)
    scores = grouped @ key[:, :, None].to(compute).mT * scale
    # A row that reads nothing has no softmax: it runs over zeros, and is set aside afterwards.
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    out = weights @ value[:, :, None].to(compute)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)
