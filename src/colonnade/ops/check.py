"""Checks of the arguments: each mistake is met here, with its rule and its values."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from colonnade.backends.call import Call, Keys, Whole
from colonnade.backends.dropout import Dropout
from colonnade.backends.tracing.autocast import AUTOCAST_DTYPES
from colonnade.pattern import HasMask, Pattern

DTYPES = (torch.float64, *AUTOCAST_DTYPES)
WHOLE = Whole()


def check_not_traced() -> None:
    """Refuse torch.jit.trace, which would take the lengths and documents of one call for all.

    The older ONNX exporter traces, too.
    """
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            "torch.jit.trace, and torch.onnx.export with dynamo=False, would keep the lengths of "
            "one call for all others. Use torch.export, or torch.onnx.export with dynamo=True."
        )


def check_has_data(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a meta tensor whose numbers are needed, because another one has numbers."""
    if tensor.is_meta and not other.is_meta:
        raise ValueError(
            f"{name} must have data if {other_name} has, got {name}.device={tensor.device} and "
            f"{other_name}.device={other.device}."
        )


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse anything but [batch, heads, seq, head_dim] tensors that fit together."""
    check_together(query, key, value, "[batch, heads, seq, head_dim]")
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            "query must not be longer than key: its rows are the last positions of the sequence; "
            f"got {_of('shape', query, key, value)}."
        )


def check_packed_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse anything but [total, heads, head_dim] tensors that fit together."""
    check_together(query, key, value, "[total, heads, head_dim]")


def check_together(query: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    """Refuse tensors that are not in a layout, or do not fit together but for their lengths.

    Heads are the second axis of the layout, and widths the last one.
    """
    check_not_traced()
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}.")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {DTYPES}, got {name}.dtype={tensor.dtype}.")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {name}.layout={tensor.layout}.")
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{name} must be {layout}, got {name}.shape={tuple(tensor.shape)}.")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one dtype, got {_of('dtype', query, key, value)}. "
            "Convert them, for example with query.to(value.dtype)."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value must be on one device, got {_of('device', query, key, value)}."
        )
    fit = query.shape[0] == key.shape[0] and query.shape[-1] == key.shape[-1]
    if not fit or key.shape[:-1] != value.shape[:-1]:
        shared = "batch" if query.dim() == 4 else "length"
        raise ValueError(
            f"query, key and value must agree in {shared}, query and key in head width, "
            f"key and value in heads and length; got {_of('shape', query, key, value)}."
        )
    if 0 in (query.shape[1], key.shape[1]) or query.shape[1] % key.shape[1] != 0:
        raise ValueError(
            "query's heads must be a multiple of key's, at least 1; "
            f"got {_of('shape', query, key, value)}."
        )
    if 0 in (key.shape[-1], value.shape[-1]):
        raise ValueError(f"head widths must be at least 1, got {_of('shape', query, key, value)}.")


def _of(attribute: str, query: Tensor, key: Tensor, value: Tensor) -> str:
    """Print an attribute of all three, only on the way to an error.

    A compiler would take a printed length for a constant.
    """
    found = [getattr(tensor, attribute) for tensor in (query, key, value)]
    if attribute == "shape":
        found = [tuple(shape) for shape in found]
    return ", ".join(
        f"{name}.{attribute}={each}"
        for name, each in zip(("query", "key", "value"), found, strict=True)
    )


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    """Refuse anything but a row of integers; `documents_of` checks the numbers in it."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got a {type(cu_seqlens).__name__}.")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens must be int32 or int64, got cu_seqlens.dtype={cu_seqlens.dtype}."
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens must be [documents + 1], got cu_seqlens.shape={tuple(cu_seqlens.shape)}."
        )


def check_padding(padding_mask: Tensor | None, name: str, shape: tuple[int, int]) -> None:
    """Refuse anything but None and a bool mask [batch, seq_len] of the tensor of that name."""
    if padding_mask is None:
        return
    if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
        found = getattr(padding_mask, "dtype", type(padding_mask).__name__)
        raise TypeError(f"padding_mask must be a bool tensor, True at tokens, got {found}.")
    if padding_mask.shape != shape:
        raise ValueError(
            f"padding_mask must be [batch, seq_len] of {name}, here {tuple(shape)}, got "
            f"padding_mask.shape={tuple(padding_mask.shape)}."
        )


def make_call(
    query: Tensor,
    pattern: HasMask,
    scale: float | None = None,
    dropout: float | Dropout = 0.0,
    return_lse: bool = True,
    keys: Keys = WHOLE,
) -> Call:
    """Check the options of a call, and fill in the scale.

    A part of a larger call brings the `Dropout` of that one, instead of a probability.
    """
    # A Protocol asks for every method by name: slow, so what everybody passes goes first.
    if not isinstance(pattern, Pattern) and (
        isinstance(pattern, type) or not isinstance(pattern, HasMask)
    ):
        kind = type(pattern).__name__
        found = f"the class {pattern.__name__}" if isinstance(pattern, type) else f"a {kind}"
        raise TypeError(
            f"pattern must be a Pattern or have a method mask(seq_len, num_heads), got {found}."
        )
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    check_finite("scale", scale)
    return Call(pattern, float(scale), as_dropout(dropout), return_lse, keys)


def as_dropout(dropout: float | Dropout) -> Dropout:
    """Check the share of the weights that is dropped."""
    if isinstance(dropout, Dropout):
        return dropout
    check_probability("dropout_p", dropout)
    return Dropout(float(dropout))


def check_finite(name: str, number: float) -> None:
    """Refuse anything but a finite number."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"{name} must be a float, got {name}={number!r}.")
    # An int may be too large for a float to hold.
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {name}={number!r}.")


def check_probability(name: str, number: float) -> None:
    """Refuse anything but a number from 0 to 1."""
    check_finite(name, number)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {name}={number}.")
