"""Backend "native": the plan on CPUs, in C++ over ATen's matrix products. float32 and bfloat16.

`attend` makes the plan and calls one operation, forward or backward; csrc/ has what they do:

    problem.h    the plan's table, and how the work is cut and shared out
    operands.h   copies in the layout and type that the products want
    forward.h    tiles of scores, one online softmax
    backward.h   scores once more, transposed; five products a granule of keys
    decode.h     one query over what a cache keeps, without copies
    ceiling.h    the products and exponentials alone, for benchmarks
    library.cpp  the operations

The C++ is compiled for the machine at the first use, see `build`. Arm is untested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from colonnade.backends.tracing import fake
from colonnade.backends.native import build
from colonnade.backends.tracing.planning import make_plan
from colonnade.backends.call import Request
from colonnade.pattern import FixedPattern
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

DTYPES = (torch.float32, torch.bfloat16)


unusable: Callable[..., str | None] = torch.compiler.assume_constant_result(build.unusable)
"""Why nothing runs here, as a clause; None: it runs. See `build.unusable`."""


def declines(query: Query, key: Key, value: Value, request: Request) -> str | None:
    """Why this backend does not take these inputs, or None if it does."""
    pattern = request.pattern
    if not isinstance(pattern, FixedPattern):
        return f"runs FixedPattern only, got a {type(pattern).__name__}"
    if not pattern.causal:
        return "runs causal patterns only, got causal=False"
    if query.device.type != "cpu":
        return f"runs on CPUs only, got query.device={query.device}"
    if query.dtype not in DTYPES:
        return f"computes in {' and '.join(map(str, DTYPES))}, got query.dtype={query.dtype}"
    if request.dropout_p > 0:
        return f"has no dropout, got dropout_p={request.dropout_p}"
    return unusable()


def attend(query: Query, key: Key, value: Value, request: Request) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over what the pattern reads, and the log of its denominator."""
    pattern = request.pattern
    assert isinstance(pattern, FixedPattern)
    plan = make_plan(pattern, query.shape[2], key.shape[2], request, range(key.shape[1]))
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.colonnade.native_forward(
        query, key, value, plan.gather, plan.table, plan.shift, plan.own_from_slots, request.scale
    )
    return out, lse


def decodes(query: Query, key: Key, value: Value) -> bool:
    """Whether `decode` takes these inputs here."""
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and query.dtype in DTYPES
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
        and unusable() is None
    )


def decode(
    query: Query,
    key: Key,
    value: Value,
    reads: Bool[Tensor, "batch kv_heads kept"] | None,
    scale: float | None,
) -> Output:
    """One query of each head over all keys, or those that it `reads`; 0 where there is none.

    Without gradients.
    """
    if scale is None:
        scale = query.shape[3] ** -0.5
    out: Tensor
    out, _ = torch.ops.colonnade.native_decode(query, key, value, reads, scale)
    return out


_PLAN = "Tensor gather, Tensor table, Tensor shift, bool own_from_slots, float scale"
torch.library.define(
    "colonnade::native_forward",
    f"(Tensor query, Tensor key, Tensor value, {_PLAN}) -> (Tensor, Tensor)",
)
torch.library.define(
    "colonnade::native_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_PLAN}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "colonnade::native_decode",
    "(Tensor query, Tensor key, Tensor value, Tensor? reads, float scale) -> (Tensor, Tensor)",
)
torch.library.define(
    "colonnade::native_ceiling",
    "(Tensor like, int qk_dim, int v_dim, float seconds) -> (float, float)",
)


def ceiling(like: Tensor, qk_dim: int, v_dim: int, seconds: float = 0.5) -> tuple[float, float]:
    """Seconds that a pair of query and key takes of one thread, while all are busy, at the least.

    The products of the kernel's own tiles and the exponentials, and nothing else: forward, and
    backward. Measured for `seconds` each.

    Raises:
        NotImplementedError: Nothing of this backend runs here.
    """
    if reason := build.unusable():
        raise NotImplementedError(f"The ceiling is measured by backend 'native', which {reason}.")
    forward, backward = torch.ops.colonnade.native_ceiling(like, qk_dim, v_dim, seconds)
    return forward, backward


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, own_from_slots, scale = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.constants = own_from_slots, scale


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.colonnade.native_backward(
        grad_out, grad_lse, *ctx.saved_tensors, *ctx.constants
    )
    return (*grads, *[None] * 5)


torch.library.register_fake("colonnade::native_forward", fake.forward)
torch.library.register_fake("colonnade::native_backward", fake.backward)
torch.library.register_fake("colonnade::native_decode", fake.forward)
torch.library.register_autograd(
    "colonnade::native_forward", _gradients, setup_context=_setup_context
)
