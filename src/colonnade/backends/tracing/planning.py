"""The plan of a call: kept for the next one, or an operation where something records operations.

To a compiler the sizes of an operation's results are unknown, so that any length may come.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from colonnade.backends.call import Request, document_lengths
from colonnade.pattern import FixedPattern, Part
from colonnade.plan.table import Plan, Row, fixed_plan, own_from_slots, packed_plan


def make_plan(
    pattern: FixedPattern, q_len: int, kv_len: int, request: Request, heads: range
) -> Plan:
    """The plan of the last `q_len` of `kv_len` keys, or of documents, for some key heads.

    Raises:
        ValueError: What cu_seqlens says does not fit `kv_len`.
    """
    if request.cu_seqlens is None and not _is_watched():
        return _kept(pattern, q_len, kv_len, tuple(heads), request.reduced)
    p = pattern
    sets = p.stride, p.summary, p.subblocks, p.part, p.causal
    gather, table, shift = _plan(
        *sets, q_len, kv_len, request.reduced, request.cu_seqlens, list(heads)
    )
    return Plan(gather, table, shift, own_from_slots(pattern))


def _is_watched() -> bool:
    """Whether something records operations or runs them in its own way, with its own lengths."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


@torch.library.custom_op(
    "colonnade::plan",
    mutates_args=(),
    schema="(int stride, int summary, int subblocks, str part, bool causal, "
    "SymInt q_len, SymInt kv_len, SymInt reduced, Tensor? cu_seqlens, int[] heads) "
    "-> (Tensor, Tensor, Tensor)",
)
def _plan(
    stride: int,
    summary: int,
    subblocks: int,
    part: Part,
    causal: bool,
    q_len: int,
    kv_len: int,
    reduced: int,
    cu_seqlens: Tensor | None,
    heads: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    pattern = FixedPattern(stride, summary, subblocks, part, causal)
    if cu_seqlens is None:
        # A compiler may write into what an operation gave it.
        plan = _kept(pattern, q_len, kv_len, tuple(heads), reduced)
        return plan.gather.clone(), plan.table.clone(), plan.shift.clone()
    plan = packed_plan(pattern, document_lengths(cu_seqlens, kv_len), heads)
    return plan.gather.contiguous(), plan.table, plan.shift


@functools.lru_cache(maxsize=8)
def _kept(
    pattern: FixedPattern, q_len: int, kv_len: int, heads: tuple[int, ...], reduced: int
) -> Plan:
    """A short sequence's plan takes longer than its attention, and layers share one.

    Whatever the mode or default device of the call that makes it, it serves all others.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        plan = fixed_plan(pattern, q_len, kv_len, heads, reduced)
        return replace(plan, gather=plan.gather.contiguous())


@_plan.register_fake
def _plan_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    # As new_dynamic_size, which refuses unless fullgraph=True and so breaks the graph.
    shapes = torch.library.get_ctx()._shape_env
    heads = len(arguments[-1])
    return (
        torch.empty(heads, allocate_size(shapes), dtype=torch.long),
        torch.empty(allocate_size(shapes), len(Row._fields), dtype=torch.long),
        torch.empty(heads, dtype=torch.long),
    )
