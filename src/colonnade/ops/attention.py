"""The public operation: validate the inputs, choose a backend, run it.

The way from here to the arithmetic: `attention` → a backend's `attend` (which makes the plan) → its
kernel.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from colonnade.ops import eager, reference
from colonnade.ops.autocast import AUTOCAST_DTYPES, cast_as_autocast_would, without_autocast
from colonnade.pattern import HasMask
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

DTYPES = (torch.float64, *AUTOCAST_DTYPES)


@runtime_checkable
class Backend(Protocol):
    """What a module in this folder offers to be a backend."""

    def declines(self, query: Tensor, key: Tensor, value: Tensor, pattern: HasMask) -> str | None:
        """Why it does not take these inputs, as a clause after its name; None if it does."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: HasMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""


BACKENDS: dict[str, Backend] = {"eager": eager, "reference": reference}  # type: ignore[dict-item]
"""In the order in which "auto" tries them. (A module is no Protocol of narrower types to mypy.)"""


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
        dropout_p: Dropout on the weights is not there yet; only 0.0 is taken.
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
    _check_tensors(query, key, value)
    _check_options(pattern, scale, dropout_p)
    chosen = BACKENDS[_choose(query, key, value, pattern, backend)]
    if scale is None:
        scale = 1 / math.sqrt(query.shape[3])
    # Inside, float32 means float32: autocast would run the products in half precision after all.
    with without_autocast(query.device.type):
        out, lse = chosen.attend(query, key, value, pattern, float(scale))
    return (out, lse) if return_lse else out


def backends() -> dict[str, str | None]:
    """Each backend by name, with the reason why it is not usable here; None: it is."""
    return dict.fromkeys(sorted(BACKENDS))


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
    _check_tensors(query, key, value)
    _check_options(pattern, None, 0.0)
    chosen = _choose(query, key, value, pattern, "auto")
    others = {}
    for name, backend in BACKENDS.items():
        if name != chosen:
            why = backend.declines(query, key, value, pattern)
            others[name] = f"it {why}" if why else f"{chosen} comes first and takes these inputs"
    return Explanation(chosen, others)


def _choose(query: Tensor, key: Tensor, value: Tensor, pattern: HasMask, backend: str) -> str:
    """The name of the backend that runs: the one asked for, or the first that takes the inputs."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got backend={backend!r}.")
    if backend != "auto" and backend not in BACKENDS:
        names = ["auto", *sorted(BACKENDS)]
        raise ValueError(f"backend must be one of {names}, got backend={backend!r}.")
    if backend != "auto":
        why_not = BACKENDS[backend].declines(query, key, value, pattern)
        if why_not is not None:
            raise NotImplementedError(f"backend {backend!r} {why_not}. Use backend='reference'.")
        return backend
    return next(
        name
        for name, candidate in BACKENDS.items()
        if candidate.declines(query, key, value, pattern) is None
    )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}.")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {DTYPES}, got {name}.dtype={tensor.dtype}.")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {name}.layout={tensor.layout}.")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be [batch, heads, seq, head_dim], "
                f"got {name}.shape={tuple(tensor.shape)}."
            )
    if not query.dtype == key.dtype == value.dtype:
        found = ", ".join(f"{name}.dtype={t.dtype}" for name, t in named.items())
        raise TypeError(f"query, key and value must have one dtype, got {found}.")
    if not query.device == key.device == value.device:
        found = ", ".join(f"{name}.device={t.device}" for name, t in named.items())
        raise ValueError(f"query, key and value must be on one device, got {found}.")
    _check_shapes(query, key, value)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    batch, heads, q_len, qk_dim = query.shape
    _, kv_heads, kv_len, v_dim = value.shape
    found = ", ".join(
        f"{name}.shape={tuple(t.shape)}"
        for name, t in (("query", query), ("key", key), ("value", value))
    )
    if key.shape != (batch, kv_heads, kv_len, qk_dim) or value.shape[0] != batch:
        raise ValueError(
            "query, key and value must agree in batch, query and key in head width, "
            f"key and value in heads and length; got {found}."
        )
    if kv_heads == 0 or heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"query's heads must be a multiple of key's, at least 1; got {found}.")
    if qk_dim == 0 or v_dim == 0:
        raise ValueError(f"head widths must be at least 1, got {found}.")
    if q_len > kv_len:
        raise ValueError(
            "query must not be longer than key: its rows are the last positions of the sequence; "
            f"got {found}."
        )


def _check_options(pattern: object, scale: object, dropout_p: object) -> None:
    if isinstance(pattern, type) or not isinstance(pattern, HasMask):
        kind = type(pattern).__name__
        found = f"the class {pattern.__name__}" if isinstance(pattern, type) else f"a {kind}"
        raise TypeError(
            f"pattern must be a Pattern or have a method mask(seq_len, num_heads), got {found}."
        )
    for name, number in (("scale", scale), ("dropout_p", dropout_p)):
        if number is None and name == "scale":
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name} must be a float, got {name}={number!r}.")
        # An int may be too large for a float to hold.
        if not abs(number) <= sys.float_info.max:
            raise ValueError(f"{name} must be finite, got {name}={number!r}.")
    assert isinstance(dropout_p, int | float)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], got dropout_p={dropout_p}.")
    if dropout_p > 0:
        raise NotImplementedError(
            f"attention has no dropout on its weights yet, got dropout_p={dropout_p}. Use 0.0."
        )
