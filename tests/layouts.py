"""Memory layouts: the same numbers, lying in memory as a user's tensors may lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.cases import Inputs


def heads_last(tensor: Tensor) -> Tensor:
    """Return it as [batch, seq, heads, width] in memory, as projections leave it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def misaligned(tensor: Tensor) -> Tensor:
    """Return it one entry behind the place where an allocation begins."""
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "heads last": heads_last,
    "width first": lambda t: t.mT.contiguous().mT,
    "every second row": lambda t: torch.stack([t, t], 3).flatten(2, 3)[:, :, ::2],
    "every second entry": lambda t: torch.stack([t, t], 4).flatten(3, 4)[..., ::2],
    "misaligned": misaligned,
}
"""Each takes [batch, heads, seq, width] and returns equal numbers."""


def laid_out(inputs: Inputs, layout: str) -> Inputs:
    """Return the inputs in one of LAYOUTS; the log-sum-exp's gradient stays as it is."""
    query, key, value, grad_out = map(LAYOUTS[layout], inputs[:4])
    return Inputs(query, key, value, grad_out, inputs.grad_lse)


def expanded(inputs: Inputs) -> Inputs:
    """Return others with strides of 0: one key head for all, and a gradient that is one number."""
    one = inputs.key[:1, :1] if len(inputs.key) else inputs.key
    grad_out = inputs.grad_out.new_ones(())
    return inputs._replace(
        key=one.expand_as(inputs.key), grad_out=grad_out.expand_as(inputs.grad_out)
    )
