"""The public operations: check the inputs, and let the backend that is chosen run them.

The way from here to the arithmetic: `attention` → `choice.run` → a backend's `attend`, which makes
the plan and calls its kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

from torch import Tensor

from colonnade.backends.call import Packed
from colonnade.backends.choice import Explanation, explain_call, run
from colonnade.backends.documents import check_documents
from colonnade.backends.dropout import Dropout
from colonnade.backends.tracing.autocast import cast_as_autocast_would
from colonnade.ops.check import (
    check_cu_seqlens,
    check_has_data,
    check_packed_tensors,
    check_tensors,
    make_call,
)
from colonnade.pattern import HasMask
from colonnade.shapes import (
    CuSeqlens,
    Key,
    LogSumExp,
    Output,
    PackedKey,
    PackedLogSumExp,
    PackedOutput,
    PackedQuery,
    PackedValue,
    Query,
    Value,
)


@overload
def attention(
    query: Query,
    key: Key,
    value: Value,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Output: ...
@overload
def attention(
    query: Query,
    key: Key,
    value: Value,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Output, LogSumExp]: ...
def attention(
    query: Query,
    key: Key,
    value: Value,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Output | tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over the keys that `pattern` lets each query read.

    The queries are the last q_len of the kv_len positions: the result equals the last q_len rows
    of attention over the whole [kv_len, kv_len] pattern. Query head h reads key head
    h // (heads // kv_heads), and that key head's sub-block. A query that reads nothing gives 0,
    a log-sum-exp of -inf, and gradients of 0. Half-precision inputs are computed in float32.
    There are first derivatives in reverse mode; backend "reference" has those of every order, and
    in forward mode "auto" takes it.

    Args:
        query: [batch, heads, q_len, qk_dim]; float64, float32, bfloat16 or float16.
        key: [batch, kv_heads, kv_len, qk_dim]; heads is a multiple of kv_heads, kv_len >= q_len.
        value: [batch, kv_heads, kv_len, v_dim].
        pattern: Which positions each position reads. Backend "reference" also takes any object
            with a method `mask(seq_len, num_heads)` that gives a bool tensor
            [num_heads, seq_len, seq_len].
        scale: Factor on the scores; 1/sqrt(qk_dim) if None.
        dropout_p: Each weight is dropped with this probability and the others are divided by
            1 - dropout_p, whenever it is above 0, as in `scaled_dot_product_attention`: pass 0 in
            evaluation. The log-sum-exp is that of the weights before dropout. Which weights are
            dropped is a function of a seed, batch row, head and positions, in every backend the
            same. The seed is drawn from the default generator of the inputs' device, so that
            recomputation in activation checkpointing drops the same weights.
        return_lse: Return (out, lse), lse [batch, heads, q_len] the natural logarithm of the
            softmax's denominator, in float32 (float64 for float64); differentiable.
        backend: "auto", or a name from `backends()`. A backend asked for by name runs or raises.

    Returns:
        [batch, heads, q_len, v_dim] in the inputs' type, or (out, lse).

    Raises:
        TypeError: An argument of the wrong type, or inputs of different types.
        ValueError: Shapes that do not fit, or an unknown backend.
        NotImplementedError: The named backend does not take these inputs; or, when it is asked for,
            a derivative of second order.

    Source: Child et al. 2019, arXiv:1904.10509, section 4.
    """
    out, lse = attend(
        query,
        key,
        value,
        pattern,
        scale=scale,
        dropout=dropout_p,
        return_lse=return_lse,
        backend=backend,
    )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def attend(
    query: Query,
    key: Key,
    value: Value,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout: float | Dropout = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[Output, LogSumExp | None]:
    """`attention`, maybe a part of a larger one: then `dropout` says of which part."""
    query, key, value = cast_as_autocast_would(query, key, value)
    check_tensors(query, key, value)
    call = make_call(query, pattern, scale, dropout, return_lse)
    return run(query, key, value, call, backend)


@overload
def attention_varlen(
    query: PackedQuery,
    key: PackedKey,
    value: PackedValue,
    cu_seqlens: CuSeqlens,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> PackedOutput: ...
@overload
def attention_varlen(
    query: PackedQuery,
    key: PackedKey,
    value: PackedValue,
    cu_seqlens: CuSeqlens,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[PackedOutput, PackedLogSumExp]: ...
def attention_varlen(
    query: PackedQuery,
    key: PackedKey,
    value: PackedValue,
    cu_seqlens: CuSeqlens,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> PackedOutput | tuple[PackedOutput, PackedLogSumExp]:
    """`attention` inside each of several documents that lie one after the other.

    Document d is the rows cu_seqlens[d] … cu_seqlens[d+1] - 1. Blocks restart at every document;
    nothing crosses a boundary, nothing is padded, and a document may be empty. A FixedPattern or
    FullPattern takes one plan for all documents, other patterns a batch for each length.

    Args:
        query: [total, heads, qk_dim].
        key: [total, kv_heads, qk_dim].
        value: [total, kv_heads, v_dim].
        cu_seqlens: [documents + 1] of int32 or int64: 0, then where each document ends.
        pattern: As for `attention`, and so are the other arguments.
        scale: Factor on the scores; 1/sqrt(qk_dim) if None.
        dropout_p: Dropout on the weights; a document counts as the batch row of its number.
        return_lse: Return (out, lse), lse [heads, total].
        backend: "auto", or a name from `backends()`.

    Returns:
        [total, heads, v_dim] in the inputs' type, or (out, lse).

    Raises:
        TypeError: As `attention`; or cu_seqlens is no tensor of integers.
        ValueError: As `attention`; or cu_seqlens does not start at 0, decreases, or does not end
            at total.
        NotImplementedError: The named backend does not take these inputs.
    """
    out, lse = attend_packed(
        query,
        key,
        value,
        cu_seqlens,
        pattern,
        scale=scale,
        dropout=dropout_p,
        return_lse=return_lse,
        backend=backend,
    )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def attend_packed(
    query: PackedQuery,
    key: PackedKey,
    value: PackedValue,
    cu_seqlens: CuSeqlens,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout: float | Dropout = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> tuple[PackedOutput, PackedLogSumExp | None]:
    """`attention_varlen`, maybe a part of a larger one: then `dropout` says of which part."""
    query, key, value = cast_as_autocast_would(query, key, value)
    check_packed_tensors(query, key, value)
    check_cu_seqlens(cu_seqlens)
    check_has_data("cu_seqlens", cu_seqlens, "query", query)
    if query.is_meta:  # No backend will look.
        check_documents(cu_seqlens, query.shape[0])
    call = make_call(query, pattern, scale, dropout, return_lse, Packed(cu_seqlens))
    q, k, v = _as_one_row(query, key, value)
    out, lse = run(q, k, v, call, backend)
    # squeeze, for the gradient of out[0] would be a copy into zeros.
    out = out.squeeze(0).transpose(0, 1)
    return out, None if lse is None else lse.squeeze(0)


def _as_one_row(*tensors: Tensor) -> Iterator[Tensor]:
    """Lay [total, heads, head_dim] out as [1, heads, total, head_dim]."""
    return (t.transpose(0, 1)[None] for t in tensors)


def explain(
    query: Query | PackedQuery,
    key: Key | PackedKey,
    value: Value | PackedValue,
    pattern: HasMask,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    cu_seqlens: CuSeqlens | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """Say which backend the same call would take, and why not each other one. Nothing is computed.

    The call is `attention`, or `attention_varlen` if there are `cu_seqlens`; so are the arguments
    and their checks.

    Args:
        query: [batch, heads, q_len, qk_dim]; with `cu_seqlens` [total, heads, qk_dim].
        key: [batch, kv_heads, kv_len, qk_dim]; with `cu_seqlens` [total, kv_heads, qk_dim].
        value: [batch, kv_heads, kv_len, v_dim]; with `cu_seqlens` [total, kv_heads, v_dim].
        pattern: The positions that each position reads.
        scale: Factor on the scores; 1/sqrt(qk_dim) if None.
        dropout_p: Dropout on the weights.
        cu_seqlens: [documents + 1]: 0, then where each document ends.
        return_lse: Whether the log-sum-exp is wanted as well.
        backend: "auto", or a name from `backends()`.

    Raises:
        TypeError, ValueError, NotImplementedError: As the call.
    """
    query, key, value = cast_as_autocast_would(query, key, value)
    if cu_seqlens is None:
        check_tensors(query, key, value)
        call = make_call(query, pattern, scale, dropout_p, return_lse)
    else:
        check_packed_tensors(query, key, value)
        check_cu_seqlens(cu_seqlens)
        check_has_data("cu_seqlens", cu_seqlens, "query", query)
        call = make_call(query, pattern, scale, dropout_p, return_lse, Packed(cu_seqlens))
        check_documents(cu_seqlens, key.shape[0])
        query, key, value = _as_one_row(query, key, value)
    return explain_call(query, key, value, call, backend)
