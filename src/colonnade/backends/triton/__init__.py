"""Backend "triton": the plan on GPUs, in Triton. float32, bfloat16 and float16.

An operation makes the plan and launches kernels, one forward and three backward:

    work.py            lists of work from the table, a line for each program
    configurations.py  sizes of tiles
    tuning.py          other sizes, timed if that is asked for
    launch.py          from tensors and a plan to launches
    tiles.py           what a kernel is handed, and what it does with a tile
    dropout.py         which weights of a tile are dropped
    forward.py         slots, then own keys, in one online softmax
    backward.py        gradients without atomics: the same bits in every run

It takes CUDA and XPU devices (PyTorch calls those of ROCm CUDA too). With TRITON_INTERPRET=1 set
before the start, Triton interprets the kernels on the CPU: slow, and exact, so that they can be
tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from colonnade.backends.call import Call, Seen
from colonnade.backends.dropout import DROPOUT_SCHEMA, Dropout
from colonnade.backends.planning import (
    PLAN_SCHEMA,
    PlanOptions,
    count_pairs,
    make_places,
    make_plan,
)
from colonnade.backends.tracing.constant import constant_when_compiled
from colonnade.backends.tracing.operation import OUTPUT_AND_LSE, define_attention
from colonnade.backends.triton.configurations import (
    CHECKED,
    WIDEST,
    name_of,
    reason_no_tile_fits,
)
from colonnade.pattern import FixedPattern
from colonnade.plan.places import lie_in_quads
from colonnade.plan.table import heads_by_plan
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

if TYPE_CHECKING:
    from colonnade.backends.triton.launch import Group

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""The least compute capability of NVIDIA that Triton and bfloat16 take."""


@constant_when_compiled
def reason_unusable(build: bool = True) -> str | None:
    """Return why nothing runs here, as a clause; None: it runs. Triton builds when it is called."""
    if not _is_installed():
        return "needs the package triton, which is not installed; `pip install triton` gets it"
    if not (_is_interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "needs a GPU, and PyTorch sees none"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant_when_compiled
def _is_interpreted() -> bool:
    """Whether Triton will interpret kernels; it reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true", "t")


def reason_declined(query: Query, key: Key, value: Value, call: Call) -> str | None:
    """Return why this backend does not take a call, or None if it does."""
    pattern = call.pattern
    if isinstance(call.keys, Seen):
        return "runs patterns, not what a cache marks"
    if not isinstance(pattern, FixedPattern):
        return f"runs FixedPattern only, got a {type(pattern).__name__}"
    if query.dtype not in DTYPES:
        return f"computes in {', '.join(map(str, DTYPES))}, got query.dtype={query.dtype}"
    widths = query.shape[3], value.shape[3]
    if not all(1 <= width <= WIDEST for width in widths):
        return f"takes widths from 1 to {WIDEST}, got qk_dim={widths[0]} and v_dim={widths[1]}"
    devices = ("cpu",) if _is_interpreted() else ("cuda", "xpu")
    if query.device.type not in devices:
        return f"runs on {' and '.join(devices)} only here, got query.device={query.device}"
    return reason_unusable() or _reason_no_tile_fits(query.dtype, max(widths), query.device)


@constant_when_compiled
def _reason_no_tile_fits(dtype: torch.dtype, width: int, device: torch.device) -> str | None:
    if _is_interpreted():
        return None
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return "needs a GPU of compute capability {}.{}, got {}.{}".format(*OLDEST, *capability)
    return reason_no_tile_fits(dtype, width, device)


@constant_when_compiled
def reason_by_name_alone(device: torch.device) -> str | None:
    """Return why it runs on a device only if it is asked for, as a clause; None: for "auto" too."""
    if _is_interpreted():
        return "is interpreted, and runs if it is asked for by name alone"
    target = name_of(device)
    if target in CHECKED:
        return None
    return f"runs if it is asked for by name alone: its machine code was not checked for {target}"


def attend(query: Query, key: Key, value: Value, call: Call) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over what is read, and the log of its denominator."""
    return _attend(query, key, value, *PlanOptions.of(call), call.scale, *call.dropout)


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from colonnade.backends.triton import launch

    groups, scale, longest = _groups(query, key, options)
    return launch.forward(groups, query, key, value, scale, longest)


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
    from colonnade.backends.triton import launch

    groups, scale, longest = _groups(query, key, options)
    tensors = grad_out, grad_lse, query, key, value, out, lse
    return launch.backward(groups, *tensors, scale, longest)


def _groups(query: Tensor, key: Tensor, options: tuple[Any, ...]) -> tuple[list[Group], float, int]:
    """Return the groups of key heads with their plans, the scale, and the most queries of a row."""
    from colonnade.backends.triton.launch import Group

    num_sets = len(PlanOptions._fields)
    given, scale = PlanOptions(*options[:num_sets]), options[num_sets]
    lengths, all_heads = (query.shape[2], key.shape[2]), heads_by_plan(given.pattern, key.shape[1])
    groups = [Group(heads, make_plan(given, *lengths, heads)) for heads in all_heads]
    dropout = Dropout(*options[num_sets + 1 :])
    if dropout.p > 0:
        in_quads = dropout.first_position % 4 == 0 and lie_in_quads(given.pattern)
        groups = [
            group._replace(
                dropout=dropout,
                places=make_places(given, *lengths, group.heads),
                words="quads" if in_quads else "each",
            )
            for group in groups
        ]
    return groups, scale, max(min(given.stride, lengths[0]), 1)


_attend = define_attention(
    "colonnade::triton",
    f"{PLAN_SCHEMA}, float scale, {DROPOUT_SCHEMA}",
    _forward,
    _backward,
    OUTPUT_AND_LSE,
    count_pairs,
)
