"""The public operations: validate the inputs, choose a backend, run it.

The way from here to the arithmetic: `attention` → a backend's `attend` (which makes the plan) → its
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from colonnade.backends import native, reference
from colonnade.backends.eager import fixed as eager
from colonnade.backends.tracing.autocast import cast_as_autocast_would, without_autocast
from colonnade.ops.check import check_cu_seqlens, check_packed_tensors, check_tensors, make_request
from colonnade.backends.call import Request
from colonnade.pattern import FixedPattern, HasMask
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


@runtime_checkable
class Backend(Protocol):
    """What a module in this folder offers to be a backend."""

    def unusable(self, build: bool = True) -> str | None:
        """Why it runs nothing in this process, as a clause after its name; None if it runs.

        What has to be built first is built, unless told not to `build`.
        """

    def declines(self, query: Tensor, key: Tensor, value: Tensor, request: Request) -> str | None:
        """Why it does not take these inputs, as a clause after its name; None if it does."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, request: Request
    ) -> tuple[Tensor, Tensor | None]:
        """Output and log-sum-exp; None in its place only where nobody asked for it."""


BACKENDS: dict[str, Backend] = {"native": native, "eager": eager, "reference": reference}
"""In the order in which "auto" tries them."""


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
            evaluation. The log-sum-exp is that of the weights before dropout. Randomness comes
            from PyTorch's default generator, so that recomputation in activation checkpointing
            drops the same weights.
        return_lse: Return (out, lse), lse [batch, heads, q_len] the natural logarithm of the
            softmax's denominator, in float32 (float64 for float64); differentiable.
        backend: "auto", or a name from `backends()`. A backend asked for by name runs or raises.

    Returns:
        [batch, heads, q_len, v_dim] in the inputs' type, or (out, lse).

    Raises:
        TypeError: An argument of the wrong type, or inputs of different types.
        ValueError: Shapes that do not fit, or an unknown backend.
        NotImplementedError: The named backend does not take these inputs.

    Source: Child et al. 2019, arXiv:1904.10509, section 4.
    """
    query, key, value = cast_as_autocast_would(query, key, value)
    check_tensors(query, key, value)
    request = make_request(query, pattern, scale, dropout_p, return_lse)
    out, lse = _run(query, key, value, request, backend)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


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
        dropout_p: Dropout on the weights.
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
    query, key, value = cast_as_autocast_would(query, key, value)
    check_packed_tensors(query, key, value)
    check_cu_seqlens(cu_seqlens)
    request = make_request(query, pattern, scale, dropout_p, return_lse, cu_seqlens)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    out, lse = _run(q, k, v, request, backend)
    # squeeze, for the gradient of out[0] would be a copy into zeros.
    out = out.squeeze(0).transpose(0, 1)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse.squeeze(0)


def attention_reduced(
    query: Query,
    key: Key,
    value: Value,
    pattern: FixedPattern,
    reduced: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Output:
    """`attention` over keys that hold, of the first `reduced` blocks, only the summaries.

    What a cache keeps: kv_len = reduced · summary + the positions from reduced · stride on, and
    the queries are the last of them. Each key head has the summaries of its own sub-block.
    """
    assert pattern.causal
    assert pattern.part != "local"
    assert query.shape[2] <= key.shape[2] - reduced * pattern.summary
    query, key, value = cast_as_autocast_would(query, key, value)
    check_tensors(query, key, value)
    request = make_request(query, pattern, scale, dropout_p, False, reduced=reduced)
    return _run(query, key, value, request, backend)[0]


def _run(
    query: Query, key: Key, value: Value, request: Request, backend: str
) -> tuple[Output, LogSumExp | None]:
    chosen = BACKENDS[_choose(query, key, value, request, backend)]
    # Inside, float32 means float32: autocast would run the products in half precision after all.
    with without_autocast(query.device.type):
        return chosen.attend(query, key, value, request)


def backends(build: bool = True) -> dict[str, str | None]:
    """Each backend by name, with the reason why it is not usable here; None: it is.

    Args:
        build: Whether "native" is compiled if it never was. Only then it is known for sure.
    """
    return {name: BACKENDS[name].unusable(build) for name in sorted(BACKENDS)}


@dataclass(frozen=True)
class Explanation:
    """Which backend "auto" takes for some inputs.

    Attributes:
        backend: The one that runs.
        others: Each other backend, and why it does not run.
    """

    backend: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name} does not run: {why}." for name, why in self.others.items()]
        return "\n".join([f"{self.backend} runs.", *lines])


def explain(query: Query, key: Key, value: Value, pattern: HasMask) -> Explanation:
    """Which backend `attention` takes for these inputs, and why not each other one.

    Raises:
        TypeError, ValueError: As `attention` for the same inputs.
    """
    query, key, value = cast_as_autocast_would(query, key, value)
    check_tensors(query, key, value)
    request = make_request(query, pattern)
    chosen = _choose(query, key, value, request, "auto")
    others = {}
    for name, backend in BACKENDS.items():
        if name != chosen:
            why = backend.declines(query, key, value, request)
            others[name] = f"it {why}" if why else f"{chosen} comes first and takes these inputs"
    return Explanation(chosen, others)


def _choose(query: Tensor, key: Tensor, value: Tensor, request: Request, backend: str) -> str:
    """The name of the backend that runs: the one asked for, or the first that takes the inputs."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got backend={backend!r}.")
    if backend != "auto" and backend not in BACKENDS:
        names = ["auto", *sorted(BACKENDS)]
        raise ValueError(f"backend must be one of {names}, got backend={backend!r}.")
    takes = (n for n, b in BACKENDS.items() if b.declines(query, key, value, request) is None)
    if backend == "auto":
        return next(takes)
    why_not = BACKENDS[backend].declines(query, key, value, request)
    if why_not is not None:
        raise NotImplementedError(f"backend {backend!r} {why_not}. Use backend={next(takes)!r}.")
    return backend
