"""What is right, from the definition alone: plain loops over plain sets, no code of the package.

The sets are written once more from Child et al. 2019 (arXiv:1904.10509), sections 4 and 5.
"""

from __future__ import annotations

import math

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


def fixed_mask(n: int, heads: int, **pattern: object) -> Tensor:
    """[heads, n, n] from the sets, entry by entry."""
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for head in range(heads):
        for i in range(n):
            for j in fixed_set(i, n, head=head, **pattern):  # type: ignore[arg-type]
                mask[head, i, j] = True
    return mask


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
