"""Full patterns in PyTorch's own kernel for CPUs, where that keeps the contract."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from colonnade.backends.call import Call, Whole
from colonnade.backends.tracing.operation import first_order, is_mapped, may_be_counted
from colonnade.pattern import FullPattern
from colonnade.shapes import Key, Output, Query, Value

MASKED_TILE = 256
"""Queries that are computed together where the kernel takes a mask."""


def attend(query: Query, key: Key, value: Value, pattern: FullPattern, call: Call) -> Output:
    """softmax(scale · q kᵀ) v over all earlier keys, or all; where `keeps_the_contract` says so."""
    masked = _is_masked(query, pattern)
    if masked and query.shape[2] != key.shape[2]:
        return _by_tiles(query, key, value, call.scale, pattern)
    return _run(query, key, value, call.scale, masked)


def _is_masked(query: Query, pattern: FullPattern) -> bool:
    """Whether some query does not read some key; the last query reads everything."""
    # A branch: the kernel takes no symbolic bool.
    return False if query.shape[2] == 1 else pattern.causal


def _are_equal(q_len: int, kv_len: int) -> bool:
    """Whether two lengths are equal; to a compiler, whether they are in every call."""
    if not torch.compiler.is_compiling():
        return q_len == kv_len
    # A comparison would hold the program to lengths that are equal, or to lengths that are not.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(q_len == kv_len)


def keeps_the_contract(
    query: Query, key: Key, value: Value, pattern: FullPattern, call: Call
) -> bool:
    """Whether PyTorch's kernel does what `attention` promises, without n² memory.

    It aligns causal masks at the top left, returns no log-sum-exp, adds up gradients in half
    precision, gives NaN for a causal mask with scale <= 0, and takes neither zero keys nor values
    of another width nor strided widths; PyTorch does not count its FLOPs, and torch.vmap runs it
    for one row after the other. Fewer queries than keys take a mask for each tile, which a backward
    would keep, and a compiler would see a loop.
    """
    masked = _is_masked(query, pattern)
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if masked and not _are_equal(query.shape[2], key.shape[2]):
        fits = not (wants_grad or torch.compiler.is_compiling())
    else:
        precise = query.dtype in (torch.float32, torch.float64)
        fits = precise or (query.shape[2] == 1 and not wants_grad)
    dense_widths = query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    return (
        isinstance(call.keys, Whole)  # first: a compiler does not know how many tokens there are
        and query.device.type == "cpu"
        and fits
        and query.shape[3] == value.shape[3]
        and dense_widths
        and query.numel() > 0
        and (call.scale > 0 or not masked)
        and call.dropout.p == 0
        and not call.return_lse
        and not may_be_counted()
        and not is_mapped(query, key, value)
    )


def _run(
    query: Query,
    key: Key,
    value: Value,
    scale: float,
    causal: bool = False,
    reads: Bool[Tensor, "q_len kv_len"] | None = None,
) -> Output:
    query, key, value = first_order(query, key, value)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=reads,
            is_causal=causal,
            scale=scale,
            enable_gqa=True,  # Where heads are equal it does nothing, and no bool is symbolic.
        )
    return first_order(out)[0]


def _by_tiles(query: Query, key: Key, value: Value, scale: float, pattern: FullPattern) -> Output:
    """Compute the last queries of a longer sequence, some at a time under a mask of their own."""
    compute = torch.promote_types(query.dtype, torch.float32)
    key, value = key.to(compute), value.to(compute)
    position = torch.arange(key.shape[2], device="cpu")
    outs = []
    for q, at in zip(
        query.split(MASKED_TILE, 2), position[-query.shape[2] :].split(MASKED_TILE), strict=True
    ):
        stop = int(at[-1]) + 1
        reads = pattern.reads(at[:, None], position[:stop])
        k, v = key[:, :, :stop], value[:, :, :stop]
        outs.append(_run(q.to(compute), k, v, scale, reads=reads))
    return torch.cat(outs, 2).to(query.dtype)
