"""What every backend's operations give, to a compiler: shapes and types without the numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    compute = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(query.shape[:3], dtype=compute),
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
