"""Autocast around the operation: its type for the inputs, and none of it inside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from colonnade.backends.tracing.constant import constant_when_compiled

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that autocast casts; it leaves float64 alone."""


def cast_as_autocast_would(*tensors: Any) -> tuple[Any, ...]:
    """Cast tensors to the type of autocast where that is on, as for PyTorch's own attention."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors
    device = tensors[0].device.type
    if not _autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in AUTOCAST_DTYPES else t for t in tensors)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context in which float32 means float32."""
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    """Whether autocast is on; some devices, such as "meta", know none."""
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


@constant_when_compiled  # The compiler of torch 2.11 cannot trace what this calls.
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
