"""Backend "native": the plan on CPUs, in C++ over ATen's matrix products. float32 and bfloat16.

An operation makes the plan and calls a kernel, forward or backward; csrc/ has what they do:

    problem.h     the plan's table, and how the work is cut and shared out
    operands.h    copies in the layout and type that the products want
    softmax.h     one step of the online softmax, its end, its gradient
    forward.h     tiles of scores, one online softmax
    backward.h    scores once more, transposed; five products a granule of keys
    slot_grads.h  shares of the backward, and the gradients of slots that they add up
    dropout.h     which weights are dropped
    decode.h      one query over what a cache keeps, without copies
    ceiling.h     the products and exponentials alone, for benchmarks
    library.cpp   the kernels as operations of PyTorch

The C++ is compiled for the machine at the first use, see `build`. Arm is untested.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from colonnade.backends.call import Call, Seen
from colonnade.backends.dropout import DROPOUT_SCHEMA, Dropout
from colonnade.backends.native import build as library
from colonnade.backends.planning import (
    PLAN_SCHEMA,
    PlanOptions,
    count_pairs,
    make_places,
    make_plan,
)
from colonnade.backends.tracing.constant import constant_when_compiled
from colonnade.backends.tracing.flops import Sizes, count_forward
from colonnade.backends.tracing.operation import (
    OUTPUT_AND_LSE,
    contents,
    define_attention,
    fake_forward,
    is_mapped,
)
from colonnade.pattern import FixedPattern
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

DTYPES = (torch.float32, torch.bfloat16)


@constant_when_compiled
def reason_unusable(build: bool = True) -> str | None:
    """Return why nothing runs here, as a clause; None: it runs. See `build.reason_unusable`."""
    return library.reason_unusable(build)


def reason_declined(query: Query, key: Key, value: Value, call: Call) -> str | None:
    """Return why this backend does not take a call, or None if it does."""
    pattern = call.pattern
    if isinstance(call.keys, Seen):
        if query.shape[2] != 1:
            return "reads what is kept with one query a head only, and here are more"
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            return "has no gradients for a decoder's query, got requires_grad=True"
        if torch._C._are_functorch_transforms_active() and is_mapped(query, key, value):
            return "does not map a decoder's query, and torch.vmap asks for that"
        if call.dropout.p > 0:
            return f"has no dropout for a decoder's query, got dropout_p={call.dropout.p}"
    elif not isinstance(pattern, FixedPattern):
        return f"runs FixedPattern only, got a {type(pattern).__name__}"
    elif not pattern.causal:
        return "runs causal patterns only, got causal=False"
    if query.device.type != "cpu":
        return f"runs on CPUs only, got query.device={query.device}"
    if query.dtype not in DTYPES:
        return f"computes in {' and '.join(map(str, DTYPES))}, got query.dtype={query.dtype}"
    return reason_unusable()


def attend(query: Query, key: Key, value: Value, call: Call) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over what is read, and the log of its denominator."""
    out: Tensor
    lse: Tensor
    if isinstance(call.keys, Seen):
        mask = call.keys.mask
        out, lse = torch.ops.colonnade.native_decode(
            query, key, value, None if mask is None else mask[:, :, 0], call.scale
        )
        return out, lse
    return _attend(query, key, value, *PlanOptions.of(call), call.scale, *call.dropout)


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.colonnade.native_forward_kernel(
        query, key, value, *_plan(query, key, options)
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.colonnade.native_backward_kernel(
        grad_out, grad_lse, query, key, value, out, lse, *_plan(query, key, options)
    )
    return grads


def _plan(query: Tensor, key: Tensor, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the options of the kernels: _PLAN."""
    num_sets = len(PlanOptions._fields)
    given, scale, dropout = (
        PlanOptions(*options[:num_sets]),
        options[num_sets],
        Dropout(*options[num_sets + 1 :]),
    )
    lengths = query.shape[2], key.shape[2], range(key.shape[1])
    plan = make_plan(given, *lengths)
    dropped: list[Tensor] = []
    if dropout.p > 0:
        places = make_places(given, *lengths)
        assert dropout.seed is not None
        dropped = [dropout.seed, places.document, places.query, places.key]
    kept = dropped, dropout.threshold, dropout.factor, list(dropout[2:])
    return plan.gather, plan.table, plan.shift, plan.own_from_slots, scale, *kept


def _define_kernel(name: str, schema: str) -> None:
    """Declare an operation of the library, and load that when the operation is called too early.

    A program that was exported or packaged elsewhere chooses no backend, and so loads nothing.
    """
    torch.library.define(name, schema)

    @torch.library.impl(name, "CompositeExplicitAutograd")  # The library's own comes before it.
    def load_and_run(query: Tensor, *others: Any) -> Any:
        reason = library.reason_unusable()
        if query.device.type != "cpu":
            reason = f"runs on CPUs only, got tensors on {query.device}"
        if reason is not None:
            raise NotImplementedError(
                f"this program was made with backend 'native', which {reason}. Make it with "
                "backend='eager' to run it without."
            )
        return getattr(torch.ops.colonnade, name.removeprefix("colonnade::"))(query, *others)


_PLAN = (
    "Tensor gather, Tensor table, Tensor shift, bool own_from_slots, float scale, "
    "Tensor[] dropped, int threshold, float factor, int[] first"
)
_define_kernel(
    "colonnade::native_forward_kernel",
    f"(Tensor query, Tensor key, Tensor value, {_PLAN}) -> (Tensor, Tensor)",
)
_define_kernel(
    "colonnade::native_backward_kernel",
    "(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_PLAN}) -> (Tensor, Tensor, Tensor)",
)
_define_kernel(
    "colonnade::native_decode",
    "(Tensor query, Tensor key, Tensor value, Tensor? reads, float scale) -> (Tensor, Tensor)",
)
torch.library.register_fake("colonnade::native_decode", fake_forward)


def _count_entries(sizes: Sizes, reads: Tensor | None, scale: float) -> int:
    """Count what a decoder's query reads; everything, if nobody knows what the mask holds."""
    entries, marked = (sizes.batch, sizes.kv_heads, sizes.kv_len), contents(reads)
    return math.prod(entries) if marked is None else int(marked.expand(entries).sum())


count_forward("colonnade::native_decode", _count_entries)
torch.library.define(
    "colonnade::native_dropout",
    "(Tensor row, Tensor head, Tensor query, Tensor key, Tensor seed, int threshold, float factor) "
    "-> Tensor",
)
torch.library.define(
    "colonnade::native_ceiling",
    "(Tensor like, int qk_dim, int v_dim, float seconds) -> (float, float)",
)


def ceiling(like: Tensor, qk_dim: int, v_dim: int, seconds: float = 0.5) -> tuple[float, float]:
    """Measure the fewest seconds that one thread needs for a pair of query and key.

    The products of the kernel's own tiles and the exponentials are timed, and nothing else, while
    all threads are busy: `seconds` for the forward, and as long for the backward.

    Raises:
        NotImplementedError: This backend does not run here.
    """
    if reason := library.reason_unusable():
        raise NotImplementedError(f"The ceiling is measured by backend 'native', which {reason}.")
    forward, backward = torch.ops.colonnade.native_ceiling(like, qk_dim, v_dim, seconds)
    return forward, backward


_attend = define_attention(
    "colonnade::native",
    f"{PLAN_SCHEMA}, float scale, {DROPOUT_SCHEMA}",
    _forward,
    _backward,
    OUTPUT_AND_LSE,
    count_pairs,
)
