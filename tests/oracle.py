"""What is right, from the definition alone: plain loops over plain sets, no code of the package.

The sets are written once more from Child et al. 2019 (arXiv:1904.10509), sections 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def fixed_set(
    i: int,
    n: int,
    stride: int,
    summary: int,
    head: int = 0,
    subblocks: int = 1,
    part: str = "merged",
    causal: bool = True,
) -> set[int]:
    """The positions that position i of n reads."""
    g = head - subblocks * (head // subblocks)
    candidates = [j for j in range(n) if j <= i or not causal]
    own = {j for j in candidates if math.floor(j / stride) == math.floor(i / stride)}
    columns = set(range(stride - (g + 1) * summary, stride - g * summary))
    summaries = {j for j in candidates if j - stride * math.floor(j / stride) in columns}
    return {"merged": own | summaries, "local": own, "summary": summaries}[part]


def strided_set(i: int, n: int, stride: int, part: str = "merged") -> set[int]:
    """The positions that position i of n reads; the paper's A1 has stride + 1 keys."""
    local = set(range(max(0, i - stride), i + 1))
    column = {i - stride * steps for steps in range(n)} & set(range(n))
    return {"merged": local | column, "local": local, "summary": column}[part]


def local_set(i: int, n: int, window: int) -> set[int]:
    """The positions that position i of n reads."""
    return {j for j in range(n) if i - window < j <= i}


def full_set(i: int, n: int, causal: bool = True) -> set[int]:
    """The positions that position i of n reads."""
    return {j for j in range(n) if j <= i or not causal}


def mask_of_sets(n: int, heads: int, read: Callable[[int, int], set[int]]) -> Tensor:
    """[heads, n, n] from the sets read(head, i), row by row."""
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for head in range(heads):
        for i in range(n):
            mask[head, i, list(read(head, i))] = True
    return mask


def fixed_mask(n: int, heads: int, **pattern: object) -> Tensor:
    """[heads, n, n] of a fixed pattern."""
    return mask_of_sets(
        n,
        heads,
        lambda head, i: fixed_set(i, n, head=head, **pattern),
    )


def loop_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention one query at a time over the keys of its set; mask is [kv_heads, q_len, kv_len].

    Differentiable, in whatever type the inputs have.
    """
    batch, heads, q_len, _ = query.shape
    group = heads // key.shape[1]
    outs, lses = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                read = mask[h // group, i].nonzero().flatten()
                if len(read) == 0:
                    outs.append(0 * value[b, h // group].sum(0))
                    lses.append(value.new_full((), -math.inf))
                    continue
                scores = scale * (key[b, h // group, read] @ query[b, h, i])
                peak = scores.max().detach()
                weights = torch.exp(scores - peak)
                outs.append(weights @ value[b, h // group, read] / weights.sum())
                lses.append(peak + torch.log(weights.sum()))
    out = torch.stack(outs).reshape(batch, heads, q_len, -1)
    return out, torch.stack(lses).reshape(batch, heads, q_len)
