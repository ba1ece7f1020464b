"""The definition, written a second time: plain sets and plain loops, no code of the package.

The sets are those of Child et al. 2019 (arXiv:1904.10509), sections 4 and 5. The loops read like
the formula; the dense products give the same numbers faster, and the loops are the test of them.
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
    sinks: int = 0,
) -> set[int]:
    """Return the positions that position i of n reads.

    Block b is the positions [b·stride, (b+1)·stride), and sub-block g its columns
    [stride - (g+1)·summary, stride - g·summary). Sinks are the first positions of all.
    """
    g = head - subblocks * math.floor(head / subblocks)
    begin = stride * math.floor(i / stride)
    own = set(range(begin, begin + stride))
    columns = range(stride - (g + 1) * summary, stride - g * summary)
    summaries = {block + column for block in range(0, n, stride) for column in columns}
    read = {"merged": own | summaries, "local": own, "summary": summaries}[part]
    return (read | set(range(sinks))) & full_set(i, n, causal)


def strided_set(i: int, n: int, stride: int, part: str = "merged") -> set[int]:
    """Return the positions that position i of n reads; the paper's A1 has stride + 1 keys."""
    local = set(range(max(0, i - stride), i + 1))
    column = set(range(i, -1, -stride))
    return {"merged": local | column, "local": local, "summary": column}[part]


def local_set(i: int, n: int, window: int, sinks: int = 0) -> set[int]:
    """Return the positions that position i of n reads."""
    return set(range(max(0, i - window + 1), i + 1)) | set(range(min(sinks, i + 1)))


def full_set(i: int, n: int, causal: bool = True) -> set[int]:
    """Return the positions that position i of n reads."""
    return set(range(i + 1 if causal else n))


def mask_of_sets(n: int, heads: int, read: Callable[[int, int], set[int]]) -> Tensor:
    """Return [heads, n, n], drawn row by row from the sets read(head, i)."""
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for head in range(heads):
        for i in range(n):
            mask[head, i, list(read(head, i))] = True
    return mask


def fixed_mask(
    n: int,
    heads: int,
    stride: int,
    summary: int,
    subblocks: int = 1,
    part: str = "merged",
    causal: bool = True,
) -> Tensor:
    """Return the mask [heads, n, n] of a fixed pattern."""

    def read(head: int, i: int) -> set[int]:
        return fixed_set(i, n, stride, summary, head, subblocks, part, causal)

    return mask_of_sets(n, heads, read)


def loop_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, one query at a time over the keys of its set.

    The mask is [kv_heads, q_len, kv_len]. Differentiable, in whatever type the inputs have.
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


def dense_weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale · q kᵀ), [batch, heads, q_len, kv_len], and the scores' log-sum-exp.

    Both under the mask [kv_heads, q_len, kv_len]; a query that reads nothing has weights of 0.
    """
    group = query.shape[1] // key.shape[1]
    mask = mask.repeat_interleave(group, 0)
    empty = ~mask.any(-1, keepdim=True)
    scores = scale * query @ key.repeat_interleave(group, 1).mT
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    return weights, scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return what `loop_attention` returns, by dense products."""
    weights, lse = dense_weights(query, key, mask, scale)
    return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1), lse
