"""Fake kernels and gradients of an operation, stated once for all backends.

An operation forward takes query, key, value and whatever else it needs, and gives output and
log-sum-exp. The one backward takes the gradients of both, query, key and value, those results that
it asked to be saved, and the rest; it gives the gradients of query, key and value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from colonnade.backends.tracing.autocast import without_autocast

LSE = slice(1, 2)
OUTPUT_AND_LSE = slice(0, 2)


def register(name: str, backward: Callable[..., Any], saved: slice) -> None:
    """Give the operation `name`_forward fake kernels and gradients, by `backward`.

    Args:
        name: Of the operation, with its namespace.
        backward: The operation `name`_backward.
        saved: The results that it needs: LSE or OUTPUT_AND_LSE.
    """

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        is_tensor = [isinstance(each, Tensor) for each in inputs]
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        ctx.save_for_backward(*output[saved], *tensors)
        ctx.others = [
            None if given else each for each, given in zip(inputs, is_tensor, strict=True)
        ]
        ctx.is_tensor = is_tensor

    def gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        count = saved.stop - saved.start
        kept = ctx.saved_tensors  # Unpacked once: under checkpointing a second time is an error.
        results, tensors = kept[:count], iter(kept[count:])
        inputs = [
            next(tensors) if given else other
            for other, given in zip(ctx.others, ctx.is_tensor, strict=True)
        ]
        # The caller's autocast would run float32 products in half precision.
        with without_autocast(grad_out.device.type):
            grads = backward(grad_out, grad_lse, *inputs[:3], *results, *inputs[3:])
        return (*grads, *[None] * (len(inputs) - 3))

    torch.library.register_fake(f"{name}_forward", fake_forward)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    torch.library.register_autograd(f"{name}_forward", gradients, setup_context=set_up)


def fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp without the numbers."""
    compute = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(query.shape[:3], dtype=compute),
    )


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
